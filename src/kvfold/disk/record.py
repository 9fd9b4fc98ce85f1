"""Records: every result as one JSON file with what made it. A number in a report, README or page comes from one."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pydantic

from kvfold import __version__
from kvfold.disk.output import disk_errors, fingerprint, read_json, write_json
from kvfold.errors import KvfoldError, OutputError, SettingError, plain
from kvfold.inputs import LARGEST, load_json, read_text
from kvfold.machine import describe
from kvfold.progress import SILENT, Progress

FORMAT = 1
LONGEST_NAME = 220  # bytes of a record's name in that of its file
KINDS = ("plan-", "convert-", "uptrain-", "evaluate-", "bench-")  # how the files of records begin


@dataclass(frozen=True)
class Record:
    """One result: what was run (`kind`, `settings`, `hashes`, `seed`), what came out (`metrics`), and on what."""

    kind: str  # plan, convert, uptrain, evaluate, bench, engine, experiment, ...
    name: str  # for people: a run or a row of a table
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    seed: int | None = None
    status: Literal["done", "failed", "gate_missed"] = "done"
    error: str | None = None
    wall_seconds: float | None = None
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""
    kvfold_record: int = FORMAT


def make(kind: str, name: str, settings: Mapping[str, Any], metrics: Mapping[str, Any], **known: Any) -> Record:
    """A record of now, on this machine, with the versions and the commit that ran."""
    known.setdefault("device", describe())
    return Record(
        kind,
        name,
        dict(settings),
        dict(metrics),
        versions=versions(),
        commit=commit(),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **known,
    )


def path_of(folder: str | Path, kind: str, name: str, settings: Mapping[str, Any]) -> Path:
    """Where the record of this run lies: one file for one kind, name and settings."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    if len(safe.encode()) > LONGEST_NAME:  # the system's limit is 255 bytes, with kind and hash
        safe = f"{safe[: LONGEST_NAME // 8]}-{fingerprint(name)[:16]}"
    return Path(folder) / f"{kind}-{safe}-{fingerprint(dict(settings))[:8]}.json"


def write(record: Record, folder: str | Path) -> Path:
    """Write the record into a folder and return its path. Raises OutputError when the disk refuses."""
    path = path_of(folder, record.kind, record.name, record.settings)
    with disk_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path)
        write_json(path, asdict(record))
    return path


def check_replaceable(path: Path) -> None:
    """Refuse to replace anything but a record. Raises OutputError."""
    if not os.path.lexists(path):
        return
    found = read_json(path)
    if path.is_file() and not path.is_symlink() and not path.stat().st_size:  # what a power cut leaves of a record
        return
    if path.is_symlink() or not (isinstance(found, dict) and "kvfold_record" in found):
        raise OutputError("is there and is no record: it is not replaced", where=path, next="move it away")


def check_folder(folder: Path) -> None:
    """Refuse a folder for records that cannot be written, while nothing is lost by it. Raises OutputError."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise OutputError("a part of the path is a file", where=folder, next="choose another folder with --records")
    if not os.access(there, os.W_OK):
        raise OutputError("no permission to write", where=there, next="choose another folder with --records")


def parse(content: object, where: object = None) -> tuple[Record | None, list[str]]:
    """A record out of JSON, and the keys that only a newer version knows; None for what is no record at all.

    Numbers that are not finite or fit into no 64 bits become None: they were not measured. Raises SettingError when a
    key holds what it cannot hold.
    """
    if not isinstance(content, dict) or type(content.get("kvfold_record")) is not int:
        return None, []
    known = {key: _measured(value) for key, value in content.items() if key in _KEYS}
    try:
        _Fields.model_validate(known)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise SettingError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from error
    return Record(**known), sorted(content.keys() - _KEYS)


_KEYS = frozenset(each.name for each in fields(Record))


class _Fields(pydantic.BaseModel):
    """The types of a record's keys."""

    model_config = pydantic.ConfigDict(strict=True)
    kind: str
    name: str
    settings: dict[str, Any]
    metrics: dict[str, Any]
    hashes: dict[str, str | None] = {}
    seed: int | None = None
    status: Literal["done", "failed", "gate_missed"] = "done"
    error: str | None = None
    wall_seconds: float | None = None
    device: str = ""
    versions: dict[str, str] = {}
    commit: str | None = None
    date: str = ""


def _measured(value: Any) -> Any:
    """A value of JSON without the numbers that are none."""
    if isinstance(value, dict):
        return {key: _measured(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_measured(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if isinstance(value, int) and abs(value) > LARGEST else value


def existing(path: Path, hashes: Mapping[str, Any]) -> Record | None:
    """The record at `path`, if it is there and was not a failure. Raises OutputError when its hashes are others."""
    found = _read(path)[0] if path.is_file() else None
    if found is None or found.kvfold_record != FORMAT or found.status == "failed":
        return None
    if found.hashes != hashes:
        raise OutputError(
            "the record there is of another checkpoint or text",
            where=path,
            next="choose another name, or add --overwrite",
        )
    return found


def _read(path: Path) -> tuple[Record | None, list[str]]:
    """The record in a file, or None for what is none or cannot be read, and why that is or what of it is not read."""
    try:
        made, newer = parse(load_json(path))
    except KvfoldError as error:
        return None, [plain(str(error).removeprefix(f"{path}: "), 300)] if path.name.startswith(KINDS) else []
    if made is not None and (newer or made.kvfold_record > FORMAT):
        unread = f", without {plain(', '.join(newer), 200)}" if newer else ""
        return made, [f"is a record of another version of kvfold; it is read as one of this version{unread}"]
    return made, []


def read_all(folder: str | Path, progress: Progress = SILENT) -> list[Record]:
    """Every record at or below a folder, by path; of one that cannot be read, or not wholly, one line is said."""
    found, odd = [], []
    for path in sorted(Path(folder).rglob("*.json")):
        made, faults = _read(path)
        found += [] if made is None else [made]
        odd += [f"{path}: {fault}" for fault in faults]
    warn(odd, progress)
    return found


def warn(odd: Sequence[str], progress: Progress) -> None:
    """Say in one line what was not read."""
    if odd:
        progress.say(f"warning: {odd[0]}{f' (and {len(odd) - 1} more like it)' if len(odd) > 1 else ''}")


def versions() -> dict[str, str]:
    """Versions of kvfold and of what computes."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    return {"kvfold": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def commit() -> str | None:
    """The commit of the source that runs, with `+` when files differ from it; None outside a checkout of kvfold.

    A kvfold that is installed inside another repository has no commit: that repository's is not its own.
    """
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if package.parent.name != "src" or not (root / ".git").exists() or not _is_kvfolds(root / "pyproject.toml"):
        return None
    if _git(root, "ls-files", "--error-unmatch", "--", str(Path(__file__).resolve())) is None:
        return None
    return _git(root, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*") or None


def _is_kvfolds(project: Path) -> bool:
    try:
        return bool(re.search(r'^name = "kvfold"$', read_text(project), re.M))
    except KvfoldError:
        return False


def _git(folder: Path, *words: str) -> str | None:
    """What git answers about a folder, whatever repository the environment names; None when it has no answer."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
