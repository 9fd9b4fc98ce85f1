"""Threads that copy and hash tensors while another thread converts."""

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
    """Threads with a short queue, so that files are filled in order. The first failure stops the rest."""

    def __init__(self, progress: Progress) -> None:
        self._pool = ThreadPoolExecutor(CREW)
        self._pending: deque[Future[int]] = deque()
        self._progress = progress

    def give(self, work: Callable[..., int], *arguments: Any) -> None:
        """Queue work that returns the bytes it wrote, waiting for space. Raises what earlier work raised."""
        self._pending.append(self._pool.submit(work, *arguments))
        if len(self._pending) > 4 * CREW:
            self._progress.advance(self._pending.popleft().result())

    def __enter__(self) -> Self:
        """Start every thread now: a thread whose start was interrupted would not be joined, and would go on writing."""
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
