"""Faults of the machine (a full disk, too many open files, no memory) as an OutputError of one line.

Libraries hide the system's error: `torch.save` raises RuntimeError, safetensors an error of Rust, numpy an OSError
without a number. `fault_of` finds the system's error behind them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfold.errors import Interrupted, KvfoldError, OutputError

_ROOM = "free some space; the same command continues from here"
_FILES = "raise the limit (ulimit -n), or run fewer processes at once; the same command continues from here"
_MEMORY = "free some memory, or choose a smaller batch or model; the same command continues from here"
_FAULTS = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("the disk quota is used up", _ROOM),
    errno.EFBIG: ("the file is larger than the system allows", "raise the limit (ulimit -f), or choose another disk"),
    errno.EIO: ("the disk cannot be read or written", "check the disk; the same command continues from here"),
    errno.ENOMEM: ("the memory is used up", _MEMORY),
    errno.EMFILE: ("too many files are open", _FILES),
    errno.ENFILE: ("too many files are open on this machine", _FILES),
    errno.EACCES: ("no permission to write", "choose another path"),
    errno.EPERM: ("no permission to write", "choose another path"),
    errno.EROFS: ("the file system is read-only", "choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose another path"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another path"),
    errno.EISDIR: ("a directory is there", "choose another path, or move it away"),
    errno.ELOOP: ("the path goes through too many symbolic links", "choose another path"),
    errno.EBUSY: ("the path is in use, such as a mount point", "choose another path"),
    errno.EXDEV: ("the path is on two file systems", "choose another path"),
    errno.ESTALE: ("the network file system lost the file", "mount it again; the same command continues from here"),
}
_OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
)
"""Errors that no path and no flag causes: they are faults of the machine wherever they occur."""

_NUMBER = re.compile(r"\(os error (\d+)\)")  # of Rust libraries: safetensors, tokenizers
_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's `tofile`
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos", re.S)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|CUDA out of memory|Cannot allocate memory", re.I)


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Raise OutputError for a fault of the machine, in whatever error a library hides it."""
    try:
        yield
    except KvfoldError:
        raise
    except Exception as error:
        found = fault_of(error, where, paths=True)
        if found is None:
            raise
        raise found from error


def fault_of(error: BaseException, where: object = None, *, paths: bool = False) -> KvfoldError | None:
    """The machine's fault behind an error as OutputError, or None.

    With `paths`, a path that cannot be written is a fault too. Ctrl-C that a library turned into an error of its own
    is Interrupted.
    """
    chain = list(_chain(error))
    if any(isinstance(each, KeyboardInterrupt) for each in chain):
        return Interrupted("stopped", where=where, next="the same command continues")
    for each in chain:
        number = _number(each)
        if number in _FAULTS and (paths or number in _OF_THE_MACHINE):
            what, remedy = _FAULTS[number]
            return OutputError(what, where=getattr(each, "filename", None) or where, next=remedy)
    if any(_SHORT.search(str(each)) or _TORCH_WRITER.search(str(each)) for each in chain):
        return OutputError("a file could not be written to its end: is the disk full?", where=where, next=_ROOM)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and, where it has no number of its own, the errors behind it."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        hides = isinstance(each, RuntimeError) or (isinstance(each, OSError) and each.errno is None)
        behind = None if each.__suppress_context__ else each.__context__
        each = (each.__cause__ or behind) if hides else None


def _number(error: BaseException) -> int | None:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):
        return errno.ENOMEM
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None
