"""Files from outside, read once and with bounds: regular files of bounded size, JSON of bounded depth.

A FIFO would block, `/dev/zero` would fill the memory, and nesting without end would exhaust Python's stack. Each of
these is one clear error here, so that no reader has to think of them again.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from kvfold.errors import CheckpointError, KvfoldError

SMALL = 64 << 20  # bytes: the largest config, index, manifest, record or recipe that is read
LARGE = 1 << 30  # bytes: the largest tokenizer file that is read
DEPTH = 64  # levels of nesting of JSON or YAML; real configs have about six


def open_regular(path: Path, *, limit: int | None = None, error: type[KvfoldError] = CheckpointError) -> int:
    """Open a regular file of at most `limit` bytes for reading, and return its descriptor.

    Raises `error` for a file that cannot be opened, for a FIFO, device, socket or directory, and for a longer file.
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
    """Refuse a file that `open_regular` refuses, before another library opens it."""
    os.close(open_regular(path, limit=limit, error=error))


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


def load_json(path: Path, *, limit: int = SMALL, error: type[KvfoldError] = CheckpointError) -> Any:
    """The JSON value in a file. Raises `error` for what is no JSON, or nested deeper than `DEPTH`."""
    return parse_json(read_text(path, limit=limit, error=error), where=path, error=error)


def parse_json(text: str | bytes, *, where: object, error: type[KvfoldError] = CheckpointError) -> Any:
    """A JSON value from text. Raises `error` for what is no JSON, or nested deeper than `DEPTH`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _deep(where, error) from None
    except ValueError as failure:
        raise error(f"is not JSON: {failure}", where=where, next="is the file truncated?") from failure
    check_depth(value, where=where, error=error)
    return value


def check_depth(value: Any, *, where: object, error: type[KvfoldError] = CheckpointError) -> None:
    """Refuse a value nested deeper than `DEPTH`: what recurses over it later stays within Python's stack."""
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
