"""Records: every result with what produced it. A number in a report, README or page comes from one.

`write` writes one JSON file per record. `write_run` writes all records of a run into one file of JSON lines: the facts
that differ each time (date, seconds, machine, versions) in the first line, then one record per line, sorted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pydantic

from kvfold.disk.output import disk_errors, fingerprint, read_json, replacing, write_json
from kvfold.disk.record_commit import commit, versions
from kvfold.errors import KvfoldError, OutputError, SettingError, plain
from kvfold.formats import json_text, measurable
from kvfold.inputs import LARGE, load_json, open_regular, parse_json, read_bytes
from kvfold.machine import describe
from kvfold.progress import SILENT, Progress

FORMAT = 2  # 1 has no `identity`
LONGEST_NAME = 220  # bytes of a record's name in that of its file
KINDS = ("plan-", "inspect-", "convert-", "uptrain-", "evaluate-", "bench-", "compare-")
"""Prefixes of the names of record files."""
RUN = "kvfold_records"  # the first key of a file of JSON lines
VOLATILE = ("device", "versions", "commit")  # in the first line of a run's file, once for all records that share them


@dataclass(frozen=True)
class Record:
    """One result: what ran (`kind`, `settings`, `hashes`, `seed`), what came out (`metrics`), and on what."""

    kind: str  # plan, evaluate, bench, engine, benchmark, ...
    name: str  # RUN, or RUN/ROW
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
    identity: str = ""
    kvfold_record: int = FORMAT

    def __post_init__(self) -> None:
        """A record without an identity is identified by all its settings."""
        if not self.identity:
            object.__setattr__(self, "identity", identity(self.kind, self.name, self.settings))

    @property
    def run(self) -> str:
        """The name of the run that it belongs to."""
        return self.name.partition("/")[0]


def identity(kind: str, name: str, settings: Mapping[str, Any]) -> str:
    """A hash of the settings that differ from their default: a new setting makes no record stale."""
    return fingerprint([kind, name, dict(settings)])[:16]


_commit = cache(commit)  # of the source that was loaded: git is asked once


def make(kind: str, name: str, settings: Mapping[str, Any], metrics: Mapping[str, Any], **known: Any) -> Record:
    """A record of now, on this machine, with the versions and the commit that ran."""
    known.setdefault("device", describe())
    return Record(
        kind,
        name,
        dict(settings),
        dict(metrics),
        versions=versions(),
        commit=_commit(),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **known,
    )


# --- one file per record ---------------------------------------------------------------------------------------------


def path_of(folder: str | Path, kind: str, name: str, identity: str) -> Path:
    """The path of a record: one file for each kind, name and identity."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    if len(safe.encode()) > LONGEST_NAME:  # the system's limit is 255 bytes, with kind and identity
        safe = f"{safe[: LONGEST_NAME // 8]}-{fingerprint(name)[:16]}"
    return Path(folder) / f"{kind}-{safe}-{identity[:8]}.json"


def write(record: Record, folder: str | Path) -> Path:
    """Write the record into a folder and return its path. Raises OutputError when the disk refuses."""
    path = path_of(folder, record.kind, record.name, record.identity)
    with disk_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(path)
        write_json(path, asdict(record))
    return path


def check_replaceable(path: Path, mark: str = "kvfold_record", what: str = "record") -> None:
    """Refuse to replace anything but a record, or another JSON object with the key `mark`. Raises OutputError."""
    if not os.path.lexists(path):
        return
    found = read_json(path)
    if path.is_file() and not path.is_symlink() and not path.stat().st_size:  # what a power cut leaves of a record
        return
    if path.is_symlink() or not (isinstance(found, dict) and mark in found):
        raise OutputError(f"is there and is no {what}: it is not replaced", where=path, next="move it away")


def check_folder(folder: Path) -> None:
    """Refuse a folder that records cannot be written to, before anything is measured. Raises OutputError."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise OutputError("a part of the path is a file", where=folder, next="choose another folder with --records")
    if not os.access(there, os.W_OK):
        raise OutputError("no permission to write", where=there, next="choose another folder with --records")


def existing(path: Path, hashes: Mapping[str, Any], settings: Mapping[str, Any]) -> Record | None:
    """The record at `path`; None if there is none, or one of a failure or of another format.

    Raises OutputError if it has other hashes, or another value of a setting, whose default must have changed since.
    """
    found = _read(path)[0] if path.is_file() else None
    if found is None or found.kvfold_record != FORMAT or found.status == "failed":
        return None
    known = found.settings
    changed = [key for key in settings if key in known and fingerprint(known[key]) != fingerprint(settings[key])]
    if changed or found.hashes != hashes:
        raise OutputError(
            f"the record there is of {f'another {changed[0]}' if changed else 'another checkpoint or text'}",
            where=path,
            next="choose another name, or add --overwrite",
        )
    return found


# --- one file per run ------------------------------------------------------------------------------------------------


def write_run(path: Path, records: Sequence[Record]) -> None:
    """Add the records of one run to its file of JSON lines; one of the same identity is replaced.

    The first line has what differs each time: device, versions and commit once for all records that share them, and
    for each of these, by identity, its date and seconds. Raises OutputError when the file there is damaged.
    """
    kept = list(_read_run(path)) if os.path.lexists(path) else []
    if fault := next((fault for _, faults in kept for fault in faults), None):
        raise OutputError(f"{fault}: it is not replaced", where=path, next="restore it, or move it away")
    merged = {each.identity: each for each in (*(made for made, _ in kept if made), *records)}
    found = sorted(merged.values(), key=lambda each: path_of("", each.kind, each.name, each.identity).name)
    made: dict[str, dict[str, Any]] = {}
    for each in sorted(found, key=lambda each: each.date):
        shared = {key: getattr(each, key) for key in VOLATILE}
        group = made.setdefault(fingerprint(shared), {**shared, "records": {}})
        group["records"][each.identity] = [each.date, each.wall_seconds]
    volatile = {*VOLATILE, "date", "wall_seconds", "kvfold_record"}
    lines = [{RUN: FORMAT, "made": list(made.values())}]
    lines += [{key: value for key, value in vars(each).items() if key not in volatile} for each in found]
    with disk_errors(path), replacing(path) as sibling:
        sibling.write_text("".join(json_text(line) + "\n" for line in lines), "utf-8", "backslashreplace")


def _read_run(path: Path) -> Iterator[tuple[Record | None, list[str]]]:
    """The records of a run's file, as `_read` returns them; nothing of any other file of JSON lines."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            if not file.read(len(RUN) + 4).startswith(f'{{"{RUN}"'.encode()):
                return
        first, *lines = read_bytes(path, limit=LARGE).splitlines()
        made = pydantic.TypeAdapter(list[_Made]).validate_python(parse_json(first, where=path)["made"])
    except (KvfoldError, pydantic.ValidationError, KeyError, TypeError) as error:
        yield None, [f"its first line cannot be read: {plain(str(error), 200)}"]
        return
    volatile = {
        identity: {**{key: getattr(group, key) for key in VOLATILE}, "date": date, "wall_seconds": seconds}
        for group in made
        for identity, (date, seconds) in group.records.items()
    }
    for number, line in enumerate(lines, 2):
        try:
            content = parse_json(line, where=f"line {number}")
            known = volatile.get(content["identity"], {})
            yield _noted({"kvfold_record": FORMAT, **known, **content})
        except (KvfoldError, KeyError, TypeError) as error:
            yield None, [f"line {number} is not shown: {plain(str(error), 200)}"]


class _Made(pydantic.BaseModel):
    """What the records of one sitting share, and when each of them was made."""

    device: str
    versions: dict[str, str]
    commit: str | None
    records: dict[str, tuple[str, float | None]]


# --- reading ---------------------------------------------------------------------------------------------------------


def parse(content: object, where: object = None) -> tuple[Record | None, list[str]]:
    """A record from JSON, and the keys that only a newer version knows; None for what is no record.

    Numbers that are not finite or do not fit into 64 bits become None. Raises SettingError for a key of another type.
    """
    if not isinstance(content, dict) or type(content.get("kvfold_record")) is not int:
        return None, []
    known = {key: measurable(value) for key, value in content.items() if key in _TYPES}
    for key, check in _TYPES.items():
        try:
            check.validate_python(known[key], strict=True)
        except KeyError:
            if key in _REQUIRED:
                raise SettingError(f"{key}: is missing", where=where) from None
        except pydantic.ValidationError as error:
            raise SettingError(f"{key}: {error.errors()[0]['msg']}", where=where) from error
    return Record(**known), sorted(content.keys() - _TYPES.keys())


_TYPES = {name: pydantic.TypeAdapter[Any](hint) for name, hint in get_type_hints(Record).items()}
_REQUIRED = [each.name for each in fields(Record) if each.default is MISSING and each.default_factory is MISSING]


def _noted(content: object) -> tuple[Record | None, list[str]]:
    """A record from JSON, and in words what is not read."""
    made, newer = parse(content)
    if made is not None and (newer or made.kvfold_record > FORMAT):
        unread = f", without {plain(', '.join(newer), 200)}" if newer else ""
        return made, [f"is a record of another version of kvfold; it is read as one of this version{unread}"]
    return made, []


def _read(path: Path) -> tuple[Record | None, list[str]]:
    """The record in a file, or None for what is no record or cannot be read, and in words what is not read."""
    try:
        return _noted(load_json(path))
    except KvfoldError as error:
        return None, [plain(str(error).removeprefix(f"{path}: "), 300)] if path.name.startswith(KINDS) else []


def read_all(folder: str | Path, progress: Progress = SILENT) -> list[Record]:
    """All records in a folder and its subfolders, in the order of their paths.

    A file holds one record (`.json`) or those of a run (`.jsonl`). One line of progress names what cannot be read.
    """
    found, odd = [], []
    paths = sorted(Path(folder).rglob("*.json*"), key=lambda path: path.with_suffix(""))
    for path in (path for path in paths if path.suffix in (".json", ".jsonl")):
        for made, faults in [_read(path)] if path.suffix == ".json" else _read_run(path):
            found += [] if made is None else [made]
            odd += [f"{path}: {fault}" for fault in faults]
    warn(odd, progress)
    return found


def warn(odd: Sequence[str], progress: Progress) -> None:
    """Say in one line what was not read."""
    if odd:
        progress.say(f"warning: {odd[0]}{f' (and {len(odd) - 1} more like it)' if len(odd) > 1 else ''}")
