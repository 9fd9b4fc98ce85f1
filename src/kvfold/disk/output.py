"""Outputs that are whole or absent: work is done in `OUT.partial`, and renamed when it is complete.

An output names the hash of its inputs and settings (`inputs` in its `kvfold.json`). The same command on a complete
output says so and does nothing; on another's output it refuses; on its own unfinished work it goes on, unless another
process is at it.

Nothing is deleted that kvfold did not write. An output that is replaced waits inside the new one's folder, under a
name that belongs to kvfold there, and never beside it: a kill at any moment leaves the old output, the new one, or
both, and the next command that looks at the output tidies up. `files` in `kvfold.json` lists what an output holds; one
that holds anything else is not replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.disk import lock
from kvfold.errors import Interrupted, KvfoldError, OutputError
from kvfold.faults import disk_errors as disk_errors
from kvfold.inputs import LARGE, load_json, read_bytes

MANIFEST = "kvfold.json"
REPAIRED = "repaired"  # in unfinished work: layers that are repaired, a file each
CLAIM = ".inputs.json"  # in OUT.partial: whose unfinished work this is
REPLACED = ".replaced"  # in OUT.partial, and for a moment in OUT: the output that is replaced

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")  # what `replacing` calls a file that is being written
_STALE_NAME = re.compile(
    r"(.+\.([0-9a-f]{8}|\d{1,7})|[0-9a-f]{16,64}\.json)\.tmp"
)  # in the cache; of older versions too
_STALE = 24 * 3600  # seconds after which a temporary file in the cache belongs to no living process
_MARKS = (b"<!-- Written by kvfold;", b"<footer>Written by kvfold from")  # model cards, and pages of reports
_NO_PLACES = frozenset({"self", "stdlib", "stdlib:heldout", "kvfold:demo"})  # inputs that are never paths


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
    overwrite: bool = False  # may another output of kvfold at `path` be replaced?
    held: lock.Lock | None = None  # on `work`; none when the output is complete

    def written(self) -> bool:
        """Is the work whole, and was it only stopped before `commit`? Its manifest is what is written last."""
        manifest = read_json(self.work / MANIFEST)
        return isinstance(manifest, dict) and manifest.get("inputs") == self.inputs

    def commit(self) -> None:
        """Put the finished work in place, at once; what it replaces is deleted only then.

        Raises OutputError when something else appeared at the path meanwhile: the finished work then stays.
        """
        with disk_errors(self.path):
            _complete(self.path, self.inputs, self.overwrite)
            _delete_temporary(self.work)
            _list_files(self.work)
            flush(self.work)
            if (self.work / REPLACED).is_dir():  # an earlier commit was killed, and its output was made anew since
                shutil.rmtree(self.work / REPLACED)
            if self.path.is_dir() and any(self.path.iterdir()):
                self.path.rename(self.work / REPLACED)
            self.work.rename(self.path)
            _finish(self.path)
        if self.held is not None:
            self.held.release()

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
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    with replacing(path) as sibling:
        # a path of other bytes than UTF-8 holds lone surrogates, which JSON escapes in just this way
        sibling.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A sibling to write, which takes the place of `path` when all went well; no two processes get the same one."""
    sibling = path.with_name(f"{path.name[:60]}.{os.urandom(4).hex()}.tmp")
    try:
        yield sibling
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)


# --- claiming a place -----------------------------------------------------------------------------------------------


def open_output(path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Output:
    """Claim an output for these inputs and settings; until it is committed or dropped, no other process gets it.

    Raises OutputError when something else is there and `overwrite` is off, when what is there is not kvfold's to
    overwrite, when another process works on it, or when the place cannot be written.
    """
    path = Path(path)
    if path.name in ("", "..") or "\0" in str(path):
        raise OutputError("is no name for an output", where=path, next="name a new directory")
    work, inputs = path.with_name(path.name + ".partial"), fingerprint(settings)
    complete = Output(path, work, inputs, complete=True, resumed=False)
    with disk_errors(path):
        if _complete(path, inputs, overwrite):
            tidy(path)
            return complete
        _check_work(work)
        work.mkdir(parents=True, exist_ok=True)
        held = lock.Lock.take(work)
        restored = _restore(path, work)
        claim = _claim(work)
        # another process has finished it just now, or the output that was there before is there again
        if (restored or claim is None) and _complete(path, inputs, overwrite):
            if claim is None:
                shutil.rmtree(work)
            held.release()
            return complete
        resumed = claim == inputs
        if claim is not None and not resumed:
            if not overwrite:
                raise OutputError(
                    "unfinished work of other inputs or settings is there",
                    where=work,
                    next="repeat that command to finish it, delete it, or add --overwrite",
                )
            _clear(work)
        write_json(work / CLAIM, {"inputs": inputs, "settings": dict(settings)})
    return Output(path, work, inputs, complete=False, resumed=resumed, overwrite=overwrite, held=held)


def check_apart(out: str | Path, reads: Mapping[str, object]) -> None:
    """Refuse an output that would replace or delete what a command reads, or would lie in it.

    `reads` are paths by what they are for ("teacher"); None and what names no place on this disk are passed over.
    Raises OutputError.
    """
    out = Path(out)
    places = _forms(out) | _forms(out.with_name(out.name + ".partial")) if out.name else _forms(out)
    for what, each in reads.items():
        if each is None or str(each) in _NO_PLACES or "\0" in str(each) or not os.path.lexists(str(each)):
            continue
        forms = _forms(each)
        if any(form == place or form.is_relative_to(place) for form in forms for place in places):
            raise OutputError(
                f"the {what} lies there", where=out, next="choose another path: what is read is never changed"
            )
        if os.path.isdir(str(each)) and any(place.is_relative_to(form) for form in forms for place in places):
            raise OutputError(
                f"lies in the {what}", where=out, next="choose another path: what is read is never changed"
            )


def _forms(path: object) -> set[Path]:
    """A path as it is written and as the system resolves it."""
    return {Path(os.path.abspath(str(path))), Path(os.path.realpath(str(path)))}


def standing(path: str | Path, *, overwrite: bool = False) -> list[str]:
    """The `inputs` of what stands at an output's path: of the output, unless that will be replaced, and of its work."""
    path = Path(path)
    work = path.with_name(path.name + ".partial")
    found = [read_json(work / CLAIM)] if overwrite else [read_json(path / MANIFEST), read_json(work / CLAIM)]
    return [str(each["inputs"]) for each in found if isinstance(each, dict) and "inputs" in each]


def _complete(path: Path, inputs: str, overwrite: bool) -> bool:
    """Is the very output there, and not to be replaced? Raises OutputError for anything else that may not be."""
    if not os.path.lexists(path):
        return False
    found = read_json(path / MANIFEST) if path.is_dir() else None
    manifest = found if isinstance(found, dict) else None
    if manifest is not None and manifest.get("inputs") == inputs and not overwrite:
        return True
    if path.is_symlink():
        raise OutputError(
            "is a symbolic link: it is not overwritten", where=path, next="name the directory that it leads to"
        )
    if manifest is None and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(
            f"exists, and is no output of kvfold (it has no {MANIFEST}): it is not overwritten",
            where=path,
            next="choose another path, or move it away",
        )
    if manifest is not None and not overwrite:
        raise OutputError(
            "the output exists, from other inputs or settings",
            where=path,
            next="choose another path, or add --overwrite",
        )
    if manifest is not None and (others := _of_others(path, manifest)):
        raise OutputError(
            "holds files that kvfold did not write: it is not overwritten",
            where=path,
            got=", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else ""),
            next="move them away",
        )
    return False


def _claim(work: Path) -> str | None:
    """The inputs of the unfinished work; None when nobody has claimed it."""
    claim = read_json(work / CLAIM)
    return claim["inputs"] if isinstance(claim, dict) and isinstance(claim.get("inputs"), str) else None


def _check_work(work: Path) -> None:
    """Refuse a folder for unfinished work that is somebody else's, or leads elsewhere."""
    if work.is_symlink():
        raise OutputError("is a symbolic link: kvfold makes none", where=work, next="move it away")
    if not work.exists():
        return
    if _claim(work) is None and not all(map(_unclaimed, work.iterdir())):
        raise OutputError("is there and is not unfinished work of kvfold", where=work, next="move it away")
    if link := next((each for each in work.rglob("*") if each.is_symlink()), None):
        raise OutputError("is a symbolic link in unfinished work: kvfold makes none", where=link, next="move it away")


def _unclaimed(path: Path) -> bool:
    """May this file lie in unfinished work before its claim does?"""
    if path.name == lock.FILE:
        return lock.left(path.parent)
    return path.is_file() and path.name.startswith(CLAIM) and path.name.endswith(".tmp")


def _restore(path: Path, work: Path) -> bool:
    """Put an output back that was to be replaced when its command was killed; was there one?"""
    if not (work / REPLACED).is_dir() or os.path.lexists(path):
        return False
    (work / REPLACED).rename(path)
    return True


def _clear(work: Path) -> None:
    """Delete unfinished work, and keep the lock on it."""
    for each in work.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        elif each.name != lock.FILE:
            each.unlink()


# --- whose files ----------------------------------------------------------------------------------------------------


def written_by_kvfold(path: Path) -> bool:
    """Is a page or a model card kvfold's own, by its content?"""
    try:
        content = read_bytes(path, limit=LARGE)
    except KvfoldError:
        return False
    return any(mark in content for mark in _MARKS)


def _list_files(work: Path) -> None:
    """Let the manifest say which files an output is made of."""
    manifest = read_json(work / MANIFEST)
    if isinstance(manifest, dict):
        files = sorted(_files(work))
        write_json(work / MANIFEST, {**manifest, "files": files})


def _files(folder: Path) -> Iterator[str]:
    """Everything in an output but directories and what only a kill leaves there."""
    for each in folder.rglob("*"):
        name = each.relative_to(folder).as_posix()
        if name in (CLAIM, lock.FILE) or name.startswith(f"{REPLACED}/") or _TEMPORARY.fullmatch(each.name):
            continue
        if each.is_symlink() or not each.is_dir():
            yield name


def _of_others(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files in an output that kvfold did not put there; none in one of an older version, which kept no list."""
    known = manifest.get("files")
    if not isinstance(known, list):
        return []
    listed = {MANIFEST, *map(str, known)}
    return sorted(name for name in _files(path) if name not in listed and not written_by_kvfold(path / name))


# --- what a kill leaves ---------------------------------------------------------------------------------------------


def tidy(path: Path) -> None:
    """Delete what a kill left in a finished output: its lock, its claim, what it replaced, temporary files.

    The lock goes last, so where there is none there is nothing. What another process still works on stays.
    """
    if path.is_symlink() or not lock.left(path) or not (path / MANIFEST).is_file():
        return
    try:
        held = lock.Lock.take(path)
        _finish(path)
    except (OutputError, OSError):  # its command is still at it, or the place cannot be written: it stays as it is
        return
    held.release()


def _finish(path: Path) -> None:
    """Delete what stands in a finished output beside its files."""
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
    """Make a folder of the cache, and delete temporary files that killed processes left in it a day ago or earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in folder.iterdir():
        if not _STALE_NAME.fullmatch(each.name) or each.is_symlink():
            continue
        try:
            if time.time() - each.stat().st_mtime < _STALE:
                continue
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink()
        except FileNotFoundError:  # another process swept it at the same time
            continue


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
