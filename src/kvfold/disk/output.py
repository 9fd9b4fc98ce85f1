"""Outputs that are whole or absent: a stage writes into `OUT.partial`, which is renamed when the work is complete.

An output names the hash of its inputs and settings (`inputs` in its `kvfold.json`). On a complete output, the same
command reports that and does nothing; on the output of other settings it refuses; on its own unfinished work it
continues, unless another process is working there.

kvfold deletes nothing that it did not write. The output that is being replaced waits inside the new one's folder: a
kill at any moment leaves the old output, the new one, or both, and the next command that reads or writes the output
restores what is missing and deletes the rest (`tidy`). `files` in `kvfold.json` lists the files of an output; an output
that holds any other file is not replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.disk import lock
from kvfold.errors import Interrupted, KvfoldError, OutputError
from kvfold.faults import disk_errors as disk_errors
from kvfold.formats import json_text
from kvfold.inputs import LARGE, load_json, read_bytes

MANIFEST = "kvfold.json"
PARTIAL = ".partial"  # the ending of a folder of unfinished work
REPAIRED = "repaired"  # in unfinished work: the repaired layers, one file each
CLAIM = ".inputs.json"  # in OUT.partial: the inputs and settings of the unfinished work
REPLACED = ".replaced"  # in OUT.partial, and for a moment in OUT: the output that is being replaced

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")  # the name that `replacing` gives to a file while it is written
_STALE_NAME = re.compile(
    r"(.+\.([0-9a-f]{8}|\d{1,7})|[0-9a-f]{16,64}\.json)\.tmp"
)  # in the cache, written by this version or an older one
_STALE = 24 * 3600  # seconds after which a temporary file in the cache belongs to no living process
_MARKS = (b"<!-- Written by kvfold;", b"<footer>Written by kvfold from")  # in model cards and report pages
_NO_PLACES = frozenset({"self", "stdlib", "stdlib:heldout", "kvfold:demo"})  # inputs that are not paths


def fingerprint(value: object) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Output:
    """One output directory: files are written into `work` until `commit`."""

    path: Path
    work: Path
    inputs: str
    complete: bool  # `path` already holds this output
    resumed: bool  # `work` holds unfinished work of the same inputs
    overwrite: bool = False  # another kvfold output at `path` may be replaced
    held: lock.Lock | None = None  # on `work`; None when the output is complete

    def written(self) -> bool:
        """True if the work is whole and only `commit` is missing: the manifest is written last."""
        return read_object(self.work / MANIFEST).get("inputs") == self.inputs

    def commit(self) -> None:
        """Move the finished work to `path`, then delete the output that it replaces.

        Raises OutputError if something else has appeared at `path` since; the finished work then stays in `work`.
        """
        with disk_errors(self.path):
            _complete(self.path, self.inputs, self.overwrite)
            _delete_temporary(self.work)
            if manifest := read_object(self.work / MANIFEST):
                write_json(self.work / MANIFEST, {**manifest, "files": sorted(_files(self.work))})
            flush(self.work)
            if (self.work / REPLACED).is_dir():  # a commit was killed, and its output has been made again since
                shutil.rmtree(self.work / REPLACED)
            if self.path.is_dir() and any(self.path.iterdir()):
                self.path.rename(self.work / REPLACED)
            self.work.rename(self.path)
            _finish(self.path)
        if self.held is not None:
            self.held.release()

    def drop(self) -> None:
        """Delete the unfinished work and release its place."""
        if self.complete or self.held is None or not self.held.release.alive:
            return
        shutil.rmtree(self.work)
        self.held.release()


@contextmanager
def dropped_on_error(output: Output, worth: str, futile: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Drop an output if an error ends the work before the file `worth` exists, or if the error is of a `futile` type.

    The corrected command has other settings, and the claim of the failed one would only block it. Work that a signal
    or the disk stopped is kept: the same command continues it.
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
    """Write every file of a folder through to the disk: a rename must not become durable before the contents."""
    for path in (*folder.rglob("*"), folder):
        flush_file(path)


def flush_file(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The JSON value in a file, or None if there is none that can be read."""
    try:
        return load_json(path, limit=LARGE)
    except KvfoldError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is none that can be read."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: object) -> None:
    """Write JSON through a temporary file, so that a reader sees the old or the new content and nothing between."""
    text = json_text(value, indent=2) + "\n"
    with replacing(path) as sibling:
        # paths that are not UTF-8 hold lone surrogates, which JSON escapes in this way
        sibling.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path`, unique to this process, that replaces `path` if the block succeeds."""
    sibling = path.with_name(f"{path.name[:60]}.{os.urandom(4).hex()}.tmp")
    try:
        yield sibling
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)


# --- claiming a place -----------------------------------------------------------------------------------------------


def open_output(path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Output:
    """Claim an output for these inputs and settings. No other process gets it until it is committed or dropped.

    Raises OutputError if something else is there and `overwrite` is off, if what is there does not belong to kvfold, if
    another process is working on it, or if the place cannot be written.
    """
    path = Path(path)
    if path.name in ("", "..") or "\0" in str(path):
        raise OutputError("is not a name for an output", where=path, next="name a new directory")
    work, inputs = _work_of(path), fingerprint(settings)
    complete = Output(path, work, inputs, complete=True, resumed=False)
    with disk_errors(path):
        if _complete(path, inputs, overwrite):
            tidy(path)
            return complete
        _check_work(work)
        work.mkdir(parents=True, exist_ok=True)
        held = lock.Lock.take(work)
        restored = _restore(path)
        claim = _claim(work)
        # another process has just finished it, or the output that was being replaced has been restored
        if (restored or claim is None) and _complete(path, inputs, overwrite):
            if claim is None:
                shutil.rmtree(work)
            held.release()
            return complete
        resumed = claim == inputs
        if claim is not None and not resumed:
            if not overwrite:
                raise OutputError(
                    "unfinished work of other inputs or settings, or of another version of kvfold, is there",
                    where=work,
                    next="repeat that command to finish it, delete it, or add --overwrite",
                )
            _clear(work)
        write_json(work / CLAIM, {"inputs": inputs, "settings": dict(settings)})
    return Output(path, work, inputs, complete=False, resumed=resumed, overwrite=overwrite, held=held)


def check_apart(out: str | Path, reads: Mapping[str, object]) -> None:
    """Refuse an output that would replace, delete or lie inside one of a command's inputs.

    `reads` maps the role of each input ("teacher") to its path; None and inputs that are not on this disk are ignored.
    Raises OutputError.
    """
    out = Path(out)
    places = _forms(out) | (_forms(_work_of(out)) if out.name else set())
    for what, each in reads.items():
        if each is None or str(each) in _NO_PLACES or "\0" in str(each) or not os.path.lexists(str(each)):
            continue
        pairs = [(form, place) for form in _forms(each) for place in places]
        fault = None
        if any(form == place or form.is_relative_to(place) for form, place in pairs):
            fault = f"would overwrite the {what}"
        elif os.path.isdir(str(each)) and any(place.is_relative_to(form) for form, place in pairs):
            fault = f"lies in the {what}"
        if fault:
            raise OutputError(fault, where=out, next="choose another path: what is read is never changed")


def _forms(path: object) -> set[Path]:
    """A path as it is written and as the system resolves it."""
    return {Path(os.path.abspath(str(path))), Path(os.path.realpath(str(path)))}


def _work_of(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def standing(path: str | Path, *, overwrite: bool = False) -> list[str]:
    """The `inputs` of the output at a path, unless `overwrite` will replace it, and of the unfinished work there."""
    path = Path(path)
    files = ([] if overwrite else [path / MANIFEST]) + [_work_of(path) / CLAIM]
    return [str(found["inputs"]) for found in map(read_object, files) if "inputs" in found]


def _complete(path: Path, inputs: str, overwrite: bool) -> bool:
    """True if this output is there and is not to be replaced, False if the place is free.

    Raises OutputError if something is there that may not be replaced.
    """
    if not os.path.lexists(path):
        return False
    manifest = read_object(path / MANIFEST)
    if manifest.get("inputs") == inputs and not overwrite:
        return True
    if path.is_symlink():
        raise OutputError("is a symbolic link", where=path, next="name the directory that it leads to")
    if not manifest:
        if path.is_dir() and not any(path.iterdir()):
            return False
        what = f"exists and is not a kvfold output (it has no {MANIFEST}): it is not overwritten"
        raise OutputError(what, where=path, next="choose another path, or move it away")
    if not overwrite:
        what = "exists, made from other inputs or settings, or by another version of kvfold"
        raise OutputError(what, where=path, next="choose another path, or add --overwrite")
    if others := _of_others(path, manifest):
        what = "holds files that kvfold did not write"
        named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise OutputError(what, where=path, got=named, next="move them away")
    return False


def _claim(work: Path) -> str | None:
    """The inputs of the unfinished work, or None if it is not claimed."""
    inputs = read_object(work / CLAIM).get("inputs")
    return inputs if isinstance(inputs, str) else None


def _check_work(work: Path) -> None:
    """Refuse a folder for unfinished work that belongs to somebody else, or that holds or is a link."""
    if work.is_symlink():
        raise OutputError("is a symbolic link, which kvfold does not make", where=work, next="move it away")
    if not work.exists():
        return
    if _claim(work) is None and not all(map(_unclaimed, work.iterdir())):
        raise OutputError("exists and is not unfinished work of kvfold", where=work, next="move it away")
    if link := next((each for each in work.rglob("*") if each.is_symlink()), None):
        raise OutputError("is a symbolic link in unfinished work: kvfold makes none", where=link, next="move it away")


def _unclaimed(path: Path) -> bool:
    """True for a file that may be in unfinished work before its claim is."""
    if path.name == lock.FILE:
        return lock.left(path.parent)
    return path.is_file() and path.name.startswith(CLAIM) and path.name.endswith(".tmp")


def _clear(work: Path) -> None:
    """Delete unfinished work, but not the lock on it."""
    for each in work.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != lock.FILE:
            each.unlink()


# --- whose files ----------------------------------------------------------------------------------------------------


def written_by_kvfold(path: Path) -> bool:
    """True if a report page or a model card is kvfold's own, by its content."""
    try:
        content = read_bytes(path, limit=LARGE)
    except KvfoldError:
        return False
    return any(mark in content for mark in _MARKS)


def _files(folder: Path) -> Iterator[str]:
    """Everything in an output except directories and what only a kill leaves there."""
    for each in folder.rglob("*"):
        name = each.relative_to(folder).as_posix()
        if name in (CLAIM, lock.FILE) or name.startswith(f"{REPLACED}/") or _TEMPORARY.fullmatch(each.name):
            continue
        if each.is_symlink() or not each.is_dir():
            yield name


def _of_others(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files in an output that kvfold did not write. An older version kept no list: all its files count as kvfold's."""
    known = manifest.get("files")
    if not isinstance(known, list):
        return []
    listed = {MANIFEST, *map(str, known)}
    return sorted(name for name in _files(path) if name not in listed and not written_by_kvfold(path / name))


# --- what a kill leaves ---------------------------------------------------------------------------------------------


def tidy(path: Path) -> None:
    """Repair what a kill left at an output: restore the output that was being replaced, or delete the leftovers.

    Leftovers are the lock, the claim, the replaced output and temporary files. The lock is deleted last: without a lock
    there are no leftovers. An output that cannot be written, or that another process works on, stays as it is.
    """
    killed = not os.path.lexists(path) and (_work_of(path) / REPLACED).is_dir()
    finished = not path.is_symlink() and lock.left(path) and (path / MANIFEST).is_file()
    if not killed and (not finished or path.name.endswith(PARTIAL)):  # work that only lacks its commit is not finished
        return
    with suppress(OutputError, OSError):
        held = lock.Lock.take(_work_of(path) if killed else path)
        if killed:
            _restore(path)
        else:
            _finish(path)
        held.release()


def _restore(path: Path) -> bool:
    """Move back an output whose replacement was killed between two renames; False if there is none."""
    replaced = _work_of(path) / REPLACED
    if not replaced.is_dir() or os.path.lexists(path):
        return False
    replaced.rename(path)
    return True


def _finish(path: Path) -> None:
    """Delete everything in a finished output that is not one of its files."""
    if (path / REPLACED).is_dir():
        shutil.rmtree(path / REPLACED)
    _delete_temporary(path)
    (path / CLAIM).unlink(missing_ok=True)
    (path / lock.FILE).unlink(missing_ok=True)


def _delete_temporary(folder: Path) -> None:
    for each in folder.rglob("*.tmp"):
        if _TEMPORARY.fullmatch(each.name) and each.is_file():
            each.unlink(missing_ok=True)


def prepare_cache(folder: Path) -> None:
    """Create a folder of the cache, and delete temporary files that killed processes left in it over a day ago."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in folder.iterdir():
        if not _STALE_NAME.fullmatch(each.name) or each.is_symlink():
            continue
        with suppress(FileNotFoundError):  # another process deletes it at the same time
            if time.time() - each.stat().st_mtime >= _STALE:
                shutil.rmtree(each) if each.is_dir() else each.unlink()


def damaged(path: Path) -> OutputError:
    """The error for a damaged file of unfinished work."""
    return OutputError(
        "is damaged, so the work cannot continue",
        where=path,
        next="delete the folder of the unfinished work, or add --overwrite",
    )


def cache_folder() -> Path:
    """The folder for data that can be made again: $KVFOLD_CACHE, or ~/.cache/kvfold."""
    return Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold")


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path`, which need not exist yet."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
