"""A few threads that copy and hash tensors beside the one that converts."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from types import TracebackType
from typing import Any, Self

from kvfold.progress import Progress

CREW = min(4, os.cpu_count() or 1)  # threads


class Crew:
    """A few threads with a short queue, so that files fill in order; the first failure stops the rest."""

    def __init__(self, progress: Progress) -> None:
        self._pool = ThreadPoolExecutor(CREW)
        self._pending: deque[Future[int]] = deque()
        self._progress = progress

    def give(self, work: Callable[..., int], *given: Any) -> None:
        """Hand over work, which returns the bytes it wrote; wait when the queue is full. Raises what work raised."""
        self._pending.append(self._pool.submit(work, *given))
        if len(self._pending) > 4 * CREW:
            self._progress.advance(self._pending.popleft().result())

    def __enter__(self) -> Self:
        """Start every thread now: one whose start is interrupted would not be waited for, and write on by itself."""
        together = Barrier(CREW)
        try:
            for each in [self._pool.submit(together.wait) for _ in range(CREW)]:
                each.result()
        except BaseException:
            together.abort()
            self._pool.shutdown(cancel_futures=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._pending:
                self._progress.advance(self._pending.popleft().result())
        finally:
            self._pool.shutdown(cancel_futures=True)
