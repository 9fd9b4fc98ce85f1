"""A spool: the hidden states of rows of text, on disk between two layers of a model that is read layer by layer.

Its size is known in advance. The file is in kvfold's cache folder and has no name there, so the system frees it when
the process ends. It is read and written, not mapped: a full disk is then an error and not a crash.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from kvfold.disk.output import cache_folder, disk_errors, free_bytes
from kvfold.errors import OutputError


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


class Spool:
    """Rows of hidden states on disk, `width` numbers of type `dtype` per token; a context manager.

    Rows are written from any device, and read onto `device`.
    Rows may differ in length; adjacent rows of one length are read and written together. Raises OutputError if the disk
    has no room for all rows or refuses to write.
    """

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

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk space; the rows are lost."""
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
        """A copy of `count` rows from `row` on, `hidden_BTD`. Raises EOFError if they were never written."""
        hidden_BTD = torch.empty(count, self._length(row, count), self.width, dtype=self.dtype)
        left = _octets(hidden_BTD)
        self._seek(row)
        while left:
            got = self._file.readinto(left)  # unbuffered: may read less
            if not got:
                raise EOFError(f"rows {row} to {row + count - 1} of a spool were never written")
            left = left[got:]
        return hidden_BTD.to(self.device)

    def write(self, row: int, hidden_BTD: Tensor) -> None:
        """Write rows from `row` on, rounded to the spool's dtype."""
        count, length, width = hidden_BTD.shape
        if (length, width) != (self._length(row, count), self.width):
            raise ValueError(f"rows of {(length, width)} in a spool of {(self._length(row, count), self.width)}")
        left = _octets(hidden_BTD.detach().to("cpu", self.dtype).contiguous())
        with disk_errors(cache_folder()):
            self._seek(row)
            while left:
                left = left[self._file.write(left) :]

    def _seek(self, row: int) -> None:
        self._file.seek(self._starts[row] * self.width * self.dtype.itemsize)

    def _length(self, row: int, count: int) -> int:
        found = set(self.lengths[row : row + count])
        if len(found) != 1 or row + count > len(self):
            raise ValueError(f"rows {row} to {row + count - 1} of a spool are not there, or not of one length")
        return found.pop()


def _octets(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy().data
