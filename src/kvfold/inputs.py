"""Bounded reading of files from outside: regular files of bounded size, JSON and YAML of bounded depth.

A FIFO would block, `/dev/zero` would fill the memory, and deep nesting would exhaust Python's stack.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from kvfold.errors import CheckpointError, KvfoldError, SettingError

SMALL = 64 << 20  # bytes: the largest config, index, manifest or record that is read
LARGE = 1 << 30  # bytes: the largest tokenizer file that is read
DEPTH = 64  # levels of nesting of JSON or YAML; real configs have about six
LARGEST = 2**63 - 1  # the largest integer of tensors, files and generators


def open_regular(path: Path, *, limit: int | None = None, error: type[KvfoldError] = CheckpointError) -> int:
    """Open a regular file of at most `limit` bytes for reading, and return its descriptor.

    Raises `error` for a file that cannot be opened, a FIFO, device, socket or directory, and a longer file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO does not block
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        raise error(f"cannot be read: {getattr(failure, 'strerror', None) or failure}", where=path) from failure
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise error("is not a regular file", where=path, got=kind)
    if limit is not None and status.st_size > limit:
        os.close(descriptor)
        raise error(
            "is too large to be read", where=path, got=f"{status.st_size:,} bytes", allowed=f"at most {limit:,}"
        )
    return descriptor


def check_regular(path: Path, *, limit: int | None = None, error: type[KvfoldError] = CheckpointError) -> None:
    """Check a file before another library opens it. Raises `error` as `open_regular` does."""
    os.close(open_regular(path, limit=limit, error=error))


def lies_inside(folder: Path, file: str | Path) -> bool:
    """True if a file, with its links resolved, is in the checkpoint's folder or in the hub cache that contains it."""
    folder, path = folder.resolve(), (folder / file).resolve()
    if folder.parent.name == "snapshots":  # the hub's cache: snapshots/<revision>/file -> ../../blobs/<hash>
        return path.is_relative_to(folder) or path.is_relative_to(folder.parent.parent / "blobs")
    return path.is_relative_to(folder)


def read_bytes(path: Path, *, limit: int = SMALL, error: type[KvfoldError] = CheckpointError) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `error`."""
    with os.fdopen(open_regular(path, limit=limit, error=error), "rb") as file:
        return file.read(limit)


def read_text(path: Path, *, limit: int = SMALL, error: type[KvfoldError] = CheckpointError) -> str:
    """The UTF-8 text of a regular file, without a byte-order mark. Raises `error`."""
    try:
        return read_bytes(path, limit=limit, error=error).decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error("is not UTF-8 text", where=path, got=f"byte {failure.start}") from failure


def load_json(
    path: Path, *, limit: int = SMALL, error: type[KvfoldError] = CheckpointError, unique: bool = False
) -> Any:
    """The JSON value in a file; see `parse_json`. Raises `error`."""
    return parse_json(read_text(path, limit=limit, error=error), where=path, error=error, unique=unique)


def parse_json(
    text: str | bytes, *, where: object, error: type[KvfoldError] = CheckpointError, unique: bool = False
) -> Any:
    """A JSON value from text. Raises `error` for invalid JSON and for nesting deeper than `DEPTH`.

    With `unique`, also for a mapping that has a key twice, of which Python would keep the last.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once if unique else None)
    except RecursionError:
        raise _deep(where, error) from None
    except ValueError as failure:
        raise error(f"is not JSON: {failure}", where=where, next="is the file truncated?") from failure
    check_depth(value, where=where, error=error)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} appears twice")
    return found


def check_depth(value: Any, *, where: object, error: type[KvfoldError] = CheckpointError) -> None:
    """Raise `error` for a value nested deeper than `DEPTH`, over which later code could not recurse."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _deep(where, error)


def _deep(where: object, error: type[KvfoldError]) -> KvfoldError:
    return error("is nested too deeply", where=where, allowed=f"at most {DEPTH} levels")


# --- YAML ------------------------------------------------------------------------------------------------------------

RECIPE = 1 << 20  # bytes: the largest YAML file that is read; PyYAML needs seconds for it
NODES = 100_000  # values of a YAML file after its aliases are expanded


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2 (PyYAML reads `1e-6` as text), and dates as text, as in JSON."""


_Loader.yaml_implicit_resolvers = {
    first: [each for each in known if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(path: Path, *, error: type[KvfoldError] = SettingError) -> Any:
    """The YAML value in a file. Raises `error` as `parse_yaml` does."""
    return parse_yaml(read_text(path, limit=RECIPE, error=error), where=path, error=error)


def parse_yaml(text: str, *, where: object, error: type[KvfoldError] = SettingError) -> Any:
    """A YAML value that JSON can express: text keys, no key twice, finite numbers of 64 bits.

    Raises `error` for anything else, and for aliases that expand to more than `NODES` values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, where, error, [], {})
        value = loader.construct_document(node)
    except RecursionError:
        raise _deep(where, error) from None
    except yaml.YAMLError as failure:
        mark = getattr(failure, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        said = getattr(failure, "problem", None) or getattr(failure, "reason", None)
        raise error(f"is not YAML{line}", where=where, next=said) from failure
    except (ValueError, KeyError, AttributeError, TypeError) as failure:  # !!int before text
        raise error(f"holds a value that its tag does not allow: {failure}", where=where) from failure
    check_depth(value, where=where, error=error)
    _check_value(value, where, error)
    return value


def _weigh(
    node: yaml.Node, where: object, error: type[KvfoldError], above: list[yaml.Node], known: dict[int, int]
) -> int:
    """The number of values below a node if its aliases were expanded."""
    if id(node) in known:
        return known[id(node)]
    if any(node is each for each in above):
        raise error(f"a value contains itself, line {node.start_mark.line + 1}", where=where)
    if len(above) >= DEPTH:
        raise _deep(where, error)
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key, count in Counter(keys).items() if count > 1), None)
        if twice is not None:
            raise error(f"key {twice[1]!r} appears twice", where=where, got=f"in the section of line {_line(node)}")
        inner = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    above.append(node)
    known[id(node)] = total = 1 + sum(_weigh(each, where, error, above, known) for each in inner)
    above.pop()
    if total > NODES:
        raise error("is too large when its aliases are expanded", where=where, allowed=f"at most {NODES:,} values")
    return total


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _check_value(value: Any, where: object, error: type[KvfoldError]) -> None:
    """Raise `error` for what JSON cannot express, at any level."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise error(f"key {key!r} is not text", where=where, next="put it in quotes")
            _check_value(key, where, error)
            _check_value(inner, where, error)
    elif isinstance(value, list):
        for inner in value:
            _check_value(inner, where, error)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise error("holds text with a character that no file name and no UTF-8 has", where=where, got=repr(value))
    elif isinstance(value, float) and not math.isfinite(value):
        raise error(f"{value} is not a finite number", where=where)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise error(f"a number of {len(str(abs(value)))} digits is too large", where=where, allowed=f"to {LARGEST:,}")
    elif value is not None and not isinstance(value, bool | int | float):
        raise error(f"holds a {type(value).__name__}", where=where, allowed="text, numbers, lists and sections of keys")
