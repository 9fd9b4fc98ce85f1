"""A lock on the folder that a process works in. It ends with the process, however that ends."""

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

FILE = ".lock"  # in the locked folder; names the process that holds the lock
_HOLDER = "process "  # the first bytes of its content

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # from file systems without locks


class Lock:
    """An exclusive lock, held until `release` or until its last reference is gone.

    Within a process it is shared: code that returns to a folder after an error continues with the same lock. It is a
    kernel lock on an open file, because a lock that is a mere file would outlive `kill -9`.
    """

    _held: ClassVar[weakref.WeakValueDictionary[tuple[int, int, int], Lock]] = weakref.WeakValueDictionary()

    def __init__(self, descriptor: int) -> None:
        self.release = weakref.finalize(self, os.close, descriptor)
        self._held[_identity(descriptor)] = self

    @classmethod
    def take(cls, folder: Path) -> Lock:
        """Lock an existing folder. On a file system without locks, nothing is locked.

        Raises OutputError if another process holds the lock.
        """
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        own = cls._held.get(_identity(descriptor))
        if own is not None and own.release.alive:
            os.close(descriptor)
            return own
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(folder, descriptor) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(descriptor)
                raise
        if not os.fstat(descriptor).st_nlink:  # its holder deleted it after it was opened here
            raise _taken(folder, descriptor)
        made = cls(descriptor)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{_HOLDER}{os.getpid()} on {platform.node()}".encode())
        return made


def left(folder: Path) -> bool:
    """True if a folder holds a lock of kvfold's, held or left behind by a kill."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):  # none, a link, one that may not be read, or a path that cannot exist
        return False
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        content = os.pread(descriptor, 200, 0) if regular else None
    finally:
        os.close(descriptor)
    return content is not None and (not content or content.startswith(_HOLDER.encode()))


def _identity(descriptor: int) -> tuple[int, int, int]:
    """The process and the file: a forked process inherits the descriptor but does not own the lock."""
    status = os.fstat(descriptor)
    return os.getpid(), status.st_dev, status.st_ino


def _taken(folder: Path, descriptor: int) -> OutputError:
    """The error for a lock that another process holds, with that process if it is known; closes the descriptor."""
    try:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or None
    finally:
        os.close(descriptor)
    remedy = "wait until it is done, stop it, or choose another path"
    return OutputError("another kvfold process is writing here", where=folder, got=holder, next=remedy)
