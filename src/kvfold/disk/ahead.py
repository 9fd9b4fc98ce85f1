"""Reading ahead: a thread reads the parameters that are needed next, while the processor or a GPU computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvfold.disk.checkpoint import Checkpoint
from kvfold.machine import host_empty

if TYPE_CHECKING:
    from torch import Tensor


class Ahead:
    """The parameters of a checkpoint, those that `start` names in copies that a thread makes; `close` ends the thread.

    A copy is held until it is asked for, or until the next `start`.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.source, self._pool = source, ThreadPoolExecutor(1, "reading ahead")
        self._next: dict[str, Future[Tensor]] = {}

    def start(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Begin to read these parameters, given with their shapes, in this order."""
        for left in self._next.values():
            left.cancel()
        self._next = {name: self._pool.submit(self._read, name, shape) for name, shape in wanted.items()}

    def parameter(self, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter as `Checkpoint.parameter` returns it, which raises here what it raised in the thread."""
        reading = self._next.pop(name, None)
        return self.source.parameter(name, shape) if reading is None else reading.result()

    def close(self) -> None:
        """Wait for the one parameter that is being read, and drop the others."""
        self._pool.shutdown(cancel_futures=True)
        self._next.clear()

    def _read(self, name: str, shape: Sequence[int]) -> Tensor:
        mapped = self.source.parameter(name, shape)
        return host_empty(mapped.shape, mapped.dtype).copy_(mapped)
