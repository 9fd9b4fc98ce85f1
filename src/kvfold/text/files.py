"""Files of text or of rows, in any supported compression, encoding and container.

Only regular files are opened. The encoding is that of the byte-order mark, which is not part of the text, or UTF-8. A
file that cannot be read raises one `DataError` with the remedy.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from kvfold.errors import DataError, SettingError
from kvfold.inputs import LARGE, open_regular

PLAIN = (".txt", ".md")  # a file is one document
ROWS = (".jsonl", ".json", ".parquet")  # a row is one document
FOLDER = (".txt", ".jsonl", ".parquet")  # files of a folder that are read: others have other purposes
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
REFUSED = {
    **dict.fromkeys(
        (".csv", ".tsv"),
        "write it as rows: python -c \"import pandas; pandas.read_csv('OLD.csv').to_json('NEW.jsonl', "
        "orient='records', lines=True)\" (a .tsv: with sep='\\t')",
    ),
    **dict.fromkeys((".zst", ".lz4", ".br", ".z"), "decompress it first (zstd -d, lz4 -d, ...), or compress with gzip"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it, and give the folder"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".html", ".htm", ".epub", ".rtf"), "save its text as a .txt"),
    **dict.fromkeys((".arrow", ".feather", ".xlsx", ".pkl", ".npy"), "write it as .parquet or .jsonl"),
}
"""Kinds of file that kvfold does not read, each with the remedy."""

_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DAMAGED = "is it damaged, or cut off? Make or download it again"
_HEAD = 4096  # bytes by which UTF-16 without a mark, and other binary files, are recognised
_ZEROS = 0.25  # the largest share of NUL bytes in a text
_BATCH = 1024  # rows of a parquet file in memory at a time


def kind_of(path: str | Path) -> str:
    """The kind of a file by its name: `.txt` for `A.TXT.gz`; compressed parquet has none."""
    *_, inner, outer = ["", "", *(each.lower() for each in Path(path).suffixes)]
    return inner if outer in COMPRESSED and inner not in ("", ".parquet") else outer


def check_kind(path: Path, kinds: Sequence[str] = (*PLAIN, *ROWS)) -> str:
    """The kind of a file. Raises DataError, with the remedy, if it is not one of `kinds`."""
    kind = kind_of(path)
    if kind in kinds:
        return kind
    remedy = "decompress it first" if kind in COMPRESSED else REFUSED.get(kind)
    raise DataError(
        "unknown kind of text file",
        where=path,
        got=kind or "no suffix",
        allowed=f"{', '.join(kinds)}, also .txt.gz and .jsonl.gz",
        next=remedy or "if it is plain text, name it .txt",
    )


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """Open a text file, decompressed and decoded. Raises DataError if it is damaged or not text."""
    unpack = COMPRESSED.get(path.suffix.lower())
    with os.fdopen(open_regular(path, error=DataError), "rb") as raw:
        try:
            data = unpack(raw) if unpack else raw
            head = data.read(_HEAD)
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")
            if encoding == "utf-8-sig" and head.count(0) > _ZEROS * len(head):
                remedy = "if it is UTF-16 without a byte-order mark: iconv -f utf-16le -t utf-8 OLD > NEW"
                raise DataError("is not UTF-8 text: many of its bytes are zero", where=path, next=remedy)
            data.seek(0)
            with TextIOWrapper(data, encoding=encoding) as text:
                try:
                    yield text
                except UnicodeDecodeError as error:
                    raise _undecodable(path, data, encoding) from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            raise DataError(what, where=path, next=_DAMAGED if unpack else None) from error


def _undecodable(path: Path, data: Any, encoding: str) -> DataError:
    """The error for a file, with the first byte of the decompressed content that is not text."""
    if encoding != "utf-8-sig":
        return DataError(f"is not {encoding.upper()} text, though its byte-order mark says so", where=path)
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    data.seek(0)
    while chunk := data.read(1 << 20):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            before += error.start - pending
            break
        before += len(chunk)
    else:
        before -= len(decoder.getstate()[0])
    remedy = "if it is Latin-1 or Windows-1252: iconv -f windows-1252 -t utf-8 OLD > NEW"
    return DataError("is not UTF-8 text", where=path, got=f"byte {before}", next=remedy)


def whole(path: Path) -> str:
    """The content of a text file. Raises DataError, also for a compressed file of more than a GiB of text."""
    with opened(path) as text:
        found = text.read(LARGE if path.suffix.lower() in COMPRESSED else -1)
        if text.read(1):
            what = "is too large for one compressed document"
            raise DataError(what, where=path, allowed=f"{LARGE:,}", next="decompress it first")
        return found


# --- rows -----------------------------------------------------------------------------------------------------------


def rows(path: Path, columns: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[str, Any]]:
    """Rows of a `.jsonl`, a `.json` array or a `.parquet`, each with its place in the file.

    `columns` selects the columns of a parquet file; if it selects none, DataError lists them all.
    """
    if kind_of(path) == ".parquet":
        yield from _parquet(path, columns)
        return
    if kind_of(path) == ".json" and _is_array(path):
        for number, row in enumerate(_json(whole(path), str(path), "is not a JSON array"), 1):
            yield f"{path}: item {number}", row
        return
    with opened(path) as text:
        for number, line in enumerate(iter(lambda: text.readline(LARGE), ""), 1):
            if line.strip():
                yield f"{path}:{number}", _json(line, f"{path}:{number}", "is not one JSON object a line")


def _is_array(path: Path) -> bool:
    with opened(path) as text:
        return text.read(1 << 16).lstrip().startswith("[")


def _json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError("is nested too deeply", where=where) from None
    except ValueError as error:
        raise DataError(f"{what}: {error}", where=where) from error


def _parquet(path: Path, columns: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SettingError("parquet files need `pyarrow`", where=path, next="pip install 'kvfold[data]'") from error
    with os.fdopen(open_regular(path, error=DataError), "rb") as raw:
        try:
            file = parquet.ParquetFile(raw)
            names = list(file.schema_arrow.names)
            chosen = list(columns(names))
            if not chosen:
                raise DataError('no column "text"', where=path, got=", ".join(names) or "no columns")
            batches = file.iter_batches(batch_size=_BATCH, columns=chosen)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path}: row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise DataError(f"cannot be read as parquet: {lines[0]}", where=path, next=_DAMAGED) from error
