"""A lock on a folder in which one process works: it ends with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import stat
import weakref
from pathlib import Path
from typing import ClassVar

from kvfold.errors import OutputError

FILE = ".lock"  # in the locked folder; says who has it
_HOLDER = "process "  # what it begins with

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # from file systems that have none


class Lock:
    """An exclusive lock, held until `release`, or until nothing refers to it any more.

    Within its process it is shared: who comes back to a folder after an error goes on with the lock of before. It is
    the kernel's, on an open file: a lock that is a mere file would outlive `kill -9`.
    """

    _held: ClassVar[weakref.WeakValueDictionary[tuple[int, int, int], Lock]] = weakref.WeakValueDictionary()

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)
        self._held[_identity(descriptor)] = self

    @classmethod
    def take(cls, folder: Path) -> Lock:
        """Lock a folder that is there; where the file system has no locks, nothing is locked.

        Raises OutputError when another process has it.
        """
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        own = cls._held.get(_identity(descriptor))
        if own is not None and own.release.alive:
            os.close(descriptor)
            return own
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(folder, _close(descriptor)) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(descriptor)
                raise
        if not os.fstat(descriptor).st_nlink:  # its holder deleted it after it was opened here
            raise _taken(folder, _close(descriptor))
        made = cls(descriptor)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{_HOLDER}{os.getpid()} on {platform.node()}".encode())
        return made


def left(folder: Path) -> bool:
    """Does a lock of kvfold's lie in a folder, held or left by a kill?"""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # none, a link, or one that may not be read
        return False
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        content = os.pread(descriptor, 200, 0) if regular else None
    finally:
        os.close(descriptor)
    return content is not None and (not content or content.startswith(_HOLDER.encode()))


def _identity(descriptor: int) -> tuple[int, int, int]:
    """Which file, opened by which process: a fork inherits the lock's number, and not the right to it."""
    status = os.fstat(descriptor)
    return os.getpid(), status.st_dev, status.st_ino


def _close(descriptor: int) -> str | None:
    """Close a lock that was not got, and return who has it, where that is written."""
    try:
        return os.pread(descriptor, 200, 0).decode(errors="replace") or None
    finally:
        os.close(descriptor)


def _taken(folder: Path, holder: str | None) -> OutputError:
    return OutputError(
        "another kvfold process is writing here",
        where=folder,
        got=holder,
        next="wait until it is done, stop it, or choose another path",
    )
