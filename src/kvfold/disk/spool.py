"""A spool: the hidden states of rows of text between two layers of a model that is read layer by layer.

Its size is known in advance. Spools that fit into `budget` are in memory, the others on disk. The file is in kvfold's
cache folder and has no name there, so the system frees it when the process ends. It is read and written, not mapped: a
full disk is then an error and not a crash.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import ClassVar

import torch
from torch import Tensor

from kvfold import ranks
from kvfold.contracts.effort import SPOOLED
from kvfold.disk.output import cache_folder, disk_errors, free_bytes
from kvfold.errors import OutputError
from kvfold.machine import best_device, device_memory, host_empty

HOST_SHARE = 4  # beside a GPU, spools may take 1/4 of the host's memory; PyTorch may pin twice what it is asked for


def spool_bytes(tokens: int, width: int, dtype: str = "float32") -> int:
    """Bytes on disk of the hidden states of `tokens` tokens, `width` numbers each."""
    kind: torch.dtype = getattr(torch, dtype)
    return tokens * width * kind.itemsize


def check_room(needed: int) -> None:
    """Raise OutputError if fewer than `needed` bytes are free in kvfold's cache folder."""
    free = free_bytes(cache_folder())
    if needed > free:
        raise OutputError(
            "hidden states of the text do not fit on the disk",
            where=cache_folder(),
            got=f"{needed:,} bytes",
            allowed=f"{free:,}",
            next="use less text, or set KVFOLD_CACHE to a folder with more room",
        )


def budget() -> int:
    """Bytes of all open spools that may be in memory: few where the processor computes, whose memory the model needs.

    Beside a GPU, pinned memory of the host saves most of the time in which hidden states are copied (not measured).
    """
    if best_device() == "cpu":
        return SPOOLED
    return max(SPOOLED, device_memory("cpu") // HOST_SHARE // ranks.current().local_world)


class Spool:
    """Rows of hidden states, `width` numbers of type `dtype` per token; a context manager.

    Rows are written from any device, and read onto `device`.
    Rows may differ in length; adjacent rows of one length are read and written together. Raises OutputError if the disk
    has no room for all rows or refuses to write. Threads may read at the same time.
    """

    _held: ClassVar[int] = 0  # bytes of the open spools in memory

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> None:
        self.lengths, self.width, self.device = tuple(lengths), width, device
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.bytes = spool_bytes(sum(self.lengths), width, dtype)
        check_room(self.bytes)
        self._starts = [0, *accumulate(self.lengths)]
        folder = cache_folder() / "spool"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by this context
        self._held_N: Tensor | None = None
        if Spool._held + self.bytes <= budget():
            self._held_N = host_empty((self._starts[-1] * width,), self.dtype)
            Spool._held += self.bytes
        self._written: set[int] = set()

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the space; the rows are lost."""
        if self._held_N is not None:
            Spool._held -= self.bytes
            self._held_N = None
        self._file.close()

    def batches(self, tokens: int) -> Iterator[tuple[int, int]]:
        """All rows in order as (first row, number of rows): adjacent rows of one length, of at most `tokens` tokens.

        A row that is longer comes alone.
        """
        first = 0
        for length, same in groupby(self.lengths):
            count, most = len(list(same)), max(1, tokens // max(1, length))
            for row in range(0, count, most):
                yield first + row, min(most, count - row)
            first += count

    def read(self, row: int, count: int = 1) -> Tensor:
        """`count` rows from `row` on, `hidden_BTD`, not to be changed. Raises EOFError if they were never written."""
        size = (count, self._length(row, count), self.width)
        if self._file.closed:
            raise ValueError("the spool is closed")
        if not self._written.issuperset(range(row, row + count)):
            raise EOFError(f"rows {row} to {row + count - 1} of a spool were never written")
        if self._held_N is not None:
            return self._held_N[self._place(row) : self._place(row + count)].view(size).to(self.device)
        hidden_BTD = torch.empty(size, dtype=self.dtype)
        left, place = _octets(hidden_BTD), self._place(row) * self.dtype.itemsize
        while left:
            got = os.preadv(self._file.fileno(), [left], place)  # may read less
            left, place = left[got:], place + got
        return hidden_BTD.to(self.device)

    def write(self, row: int, hidden_BTD: Tensor) -> None:
        """Write rows from `row` on, rounded to the spool's dtype."""
        count, length, width = hidden_BTD.shape
        if (length, width) != (self._length(row, count), self.width):
            raise ValueError(f"rows of {(length, width)} in a spool of {(self._length(row, count), self.width)}")
        if self._held_N is not None:
            self._held_N[self._place(row) : self._place(row + count)].view(hidden_BTD.shape).copy_(hidden_BTD)
            self._written.update(range(row, row + count))
            return
        left = _octets(hidden_BTD.detach().to("cpu", self.dtype).contiguous())
        place = self._place(row) * self.dtype.itemsize
        with disk_errors(cache_folder()):
            while left:
                put = os.pwrite(self._file.fileno(), left, place)
                left, place = left[put:], place + put
        self._written.update(range(row, row + count))

    def _place(self, row: int) -> int:
        """The number at which a row begins."""
        return self._starts[row] * self.width

    def _length(self, row: int, count: int) -> int:
        found = set(self.lengths[row : row + count])
        if len(found) != 1 or row + count > len(self):
            raise ValueError(f"rows {row} to {row + count - 1} of a spool are not there, or not of one length")
        return found.pop()


def _octets(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data
