"""Outputs that are whole or absent: work is done in `OUT.partial`, and renamed when it is complete.

An output names the hash of its inputs and settings (`inputs` in its `kvfold.json`). The same command on a complete
output says so and does nothing; on another's output it refuses; on its own unfinished work it goes on, unless another
process is at it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold import lock
from kvfold.errors import Interrupted, KvfoldError, OutputError
from kvfold.inputs import LARGE, load_json

MANIFEST = "kvfold.json"
REPAIRED = "repaired"  # in unfinished work: layers that are repaired, a file each
CLAIM = ".inputs.json"  # in OUT.partial: whose unfinished work this is

_OWN = (lock.FILE, CLAIM + ".tmp")  # what may lie there before the claim does


def fingerprint(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Output:
    """One output directory: `work` is where its files are written until `commit`."""

    path: Path
    work: Path
    inputs: str
    complete: bool  # the very output that was asked for is there already
    resumed: bool  # unfinished work of the same inputs lies in `work`
    held: lock.Lock | None = None  # on `work`; none when the output is complete

    def written(self) -> bool:
        """Is the work whole, and was it only stopped before `commit`? Its manifest is what is written last."""
        manifest = read_json(self.work / MANIFEST)
        return isinstance(manifest, dict) and manifest.get("inputs") == self.inputs

    def commit(self) -> None:
        """Put the finished work in place, at once; what it replaces is deleted only then."""
        flush(self.work)
        replaced = self.path.with_name(self.path.name + ".replaced")
        if replaced.exists():  # an earlier commit was killed while it deleted this
            shutil.rmtree(replaced)
        if self.path.exists():
            self.path.rename(replaced)
        self.work.rename(self.path)
        for name in (CLAIM, lock.FILE):
            (self.path / name).unlink(missing_ok=True)
        if self.held is not None:
            self.held.release()
        if replaced.exists():
            shutil.rmtree(replaced)

    def drop(self) -> None:
        """Delete the unfinished work, and let another command have the place."""
        if self.complete or self.held is None or not self.held.release.alive:
            return
        shutil.rmtree(self.work)
        self.held.release()


@contextmanager
def dropped_on_error(output: Output, worth: str, futile: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Drop an output when an error ends the work before the file `worth` is there, or an error of a `futile` kind.

    The mended command has other settings, and would find nothing but a claim in its way. What a signal or the disk
    stopped is kept: the same command goes on.
    """
    try:
        yield
    except (Interrupted, OutputError, OSError):
        raise
    except Exception as error:
        if isinstance(error, futile) or not (output.work / worth).exists():
            output.drop()
        raise


def flush(folder: Path) -> None:
    """Have every file of a folder on the disk, and not only in memory: a rename must not outrun its contents."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Any:
    """The JSON in a file, or None when there is none that can be read."""
    try:
        return load_json(path, limit=LARGE)
    except KvfoldError:
        return None


def write_json(path: Path, value: object) -> None:
    """Write JSON through a sibling, so that a reader sees the old or the new and nothing between."""
    sibling = path.with_name(path.name + ".tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    # a path of other bytes than UTF-8 holds lone surrogates, which JSON escapes in just this way
    sibling.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(sibling, path)


def open_output(path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Output:
    """Claim an output for these inputs and settings; until it is committed or dropped, no other process gets it.

    Raises OutputError when something else is there and `overwrite` is off, when what is there is not kvfold's to
    overwrite, when another process works on it, or when the place cannot be written.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise OutputError("is no name for an output", where=path, next="name a new directory")
    work, inputs = path.with_name(path.name + ".partial"), fingerprint(settings)
    complete = Output(path, work, inputs, complete=True, resumed=False)
    with disk_errors(path):
        if _complete(path, inputs, overwrite):
            return complete
        if work.exists() and _claim(work) is None and any(each.name not in _OWN for each in work.iterdir()):
            raise OutputError("is there and is not unfinished work of kvfold", where=work, next="move it away")
        work.mkdir(parents=True, exist_ok=True)
        held = lock.Lock.take(work)
        claim = _claim(work)
        if claim is None and _complete(path, inputs, overwrite):  # another process has finished it just now
            shutil.rmtree(work)
            return complete
        resumed = claim is not None and claim.get("inputs") == inputs
        if claim is not None and not resumed:
            if not overwrite:
                raise OutputError(
                    "unfinished work of other inputs or settings is there",
                    where=work,
                    next="repeat that command to finish it, delete it, or add --overwrite",
                )
            _clear(work)
        write_json(work / CLAIM, {"inputs": inputs, "settings": dict(settings)})
    return Output(path, work, inputs, complete=False, resumed=resumed, held=held)


def _claim(work: Path) -> dict[str, Any] | None:
    """Whose unfinished work this is; None when nobody has claimed it, or the claim cannot be read."""
    found = read_json(work / CLAIM)
    return found if isinstance(found, dict) else None


def _complete(path: Path, inputs: str, overwrite: bool) -> bool:
    """Is the very output there, and not to be replaced? Raises OutputError for anything else that may not be."""
    if not path.exists():
        return False
    found = read_json(path / MANIFEST) if path.is_dir() else None
    manifest = found if isinstance(found, dict) else None
    empty = path.is_dir() and not any(path.iterdir())
    if manifest is not None and manifest.get("inputs") == inputs and not overwrite:
        return True
    if manifest is None and not empty:
        raise OutputError(
            f"exists, and is no output of kvfold (it has no {MANIFEST}): it is not overwritten",
            where=path,
            next="choose another path, or move it away",
        )
    if not overwrite and not empty:
        raise OutputError(
            "the output exists, from other inputs or settings",
            where=path,
            next="choose another path, or add --overwrite",
        )
    return False


def _clear(work: Path) -> None:
    """Delete unfinished work, and keep the lock on it."""
    for each in work.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != lock.FILE:
            each.unlink()


_DISK = {
    errno.ENOSPC: ("the disk is full", "free some space; the same command goes on from here"),
    errno.EDQUOT: ("the disk quota is used up", "free some space; the same command goes on from here"),
    errno.EACCES: ("no permission to write", "choose another path"),
    errno.EPERM: ("no permission to write", "choose another path"),
    errno.EROFS: ("the file system is read-only", "choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose another path"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another path"),
}


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into one clear OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        what, remedy = _DISK[error.errno]
        raise OutputError(what, where=error.filename or where, next=remedy) from error


def damaged(path: Path) -> OutputError:
    """The error for a file of unfinished work that is not what was written."""
    return OutputError(
        "is damaged: the work cannot go on from it",
        where=path,
        next="delete the folder of the unfinished work, or add --overwrite, to start again",
    )


def cache_folder() -> Path:
    """Where what can be made again is kept: $KVFOLD_CACHE, or ~/.cache/kvfold."""
    return Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold")


def free_bytes(path: Path) -> int:
    """Free bytes of the file system on which `path` lies or will lie."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
