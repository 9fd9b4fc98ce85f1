"""Texts: the documents of a file, a folder, a hub data set or Python's own library, in an order that never changes.

A row of a `.jsonl`, `.json` or `.parquet` is a document by the first of these that it has:

    text, or content            a string
    messages, or conversations  a chat, through the tokenizer's chat template
    prompt and completion       one string after the other; a chat, where they are lists of messages

A row in which they are null has no text and is left out, and half of a surrogate pair, which no encoding can hold,
becomes U+FFFD; how many rows that were is told.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import DataError, SettingError
from kvfold.text.files import COMPRESSED, FOLDER, PLAIN, REFUSED, ROWS, check_kind, kind_of, rows, whole

Chat = Callable[[Sequence[Any], Any], str]
"""Messages and tools of a chat -> the text that a model reads."""

LEFT_OUT = "rows have no text and are left out"
MENDED = "rows hold half of a surrogate pair, which is read as U+FFFD"

_STRINGS, _CHATS, _PAIR = ("text", "content"), ("messages", "conversations"), ("prompt", "completion")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words
_TODAY = """{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}"""  # before a template that prints the date: a text must not change overnight

# Parts of the standard library that are tests, other programs, or written by the build of this very machine.
_NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__"}
_MACHINE = re.compile(r"_sysconfigdata|config-|_sysconfig_vars")

STDLIB_HELDOUT = (
    "argparse",
    "asyncio/streams",
    "calendar",
    "csv",
    "fractions",
    "heapq",
    "html/parser",
    "json",
    "logging/handlers",
    "queue",
    "random",
    "sched",
    "shlex",
    "statistics",
    "tarfile",
    "tempfile",
    "textwrap",
    "urllib/robotparser",
    "wave",
    "xml/dom/pulldom",
)
"""Modules and packages of the standard library that `stdlib` leaves out and `stdlib:heldout` holds."""


# --- sources --------------------------------------------------------------------------------------------------------


def read_texts(source: str | Path, *, chat: Chat | None = None, told: Counter[str] | None = None) -> Iterator[str]:
    """Documents of a source, in an order that never changes.

    A `.txt` or `.md` file is one document, each row of a `.jsonl`, `.json` or `.parquet` is one, and all but parquet
    may be compressed (`.txt.gz`); of a folder the `.txt`, `.jsonl` and `.parquet` files are read; `stdlib` is the
    source of Python's own library, `stdlib:heldout` the modules that it leaves out; anything else is a hub data set,
    `owner/name[:config[:split]]`. `chat` writes chats as text, and `told` counts what is worth a word. Raises
    DataError.
    """
    name, path = str(source), Path(source)
    told = Counter() if told is None else told
    if name in ("stdlib", "stdlib:heldout"):
        yield from _stdlib(heldout=name.endswith("heldout"))
    elif name and os.path.isdir(path):
        for file in _files(path):
            yield from _read_file(file, chat, told)
    elif name and os.path.lexists(path):
        yield from _read_file(path, chat, told)
    elif not _may_be_hub(name):
        raise DataError(
            "no such text", where=source, allowed="a file, a folder, a hub data set `owner/name`, stdlib or self"
        )
    else:
        yield from _hub(name, chat, told)


def _files(folder: Path) -> list[Path]:
    """The files of a folder that are read, by path; of one that is there compressed as well, the plain one."""
    every = sorted(path for path in folder.rglob("*") if not path.is_dir())
    files = [path for path in every if kind_of(path) in FOLDER]
    there = set(files)
    files = [path for path in files if path.suffix.lower() not in COMPRESSED or path.with_suffix("") not in there]
    if not files:
        kinds = sorted({path.suffix or path.name for path in every})
        raise DataError(
            "no text in this folder",
            where=folder,
            got=", ".join(kinds[:8]) or "no files",
            allowed=", ".join(FOLDER),
            next="a file of another kind is read, or refused with a remedy, when it is named itself" if kinds else None,
        )
    return files


def _may_be_hub(name: str) -> bool:
    """Is this spelled as a hub data set, and not as a file that is not there?"""
    file = kind_of(name) in (*PLAIN, *ROWS) or Path(name).suffix.lower() in (*REFUSED, *COMPRESSED)
    return not file and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", name) is not None


def _stdlib(heldout: bool) -> Iterator[str]:
    """Modules of Python's library, by path; the held-out ones or all others."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("")
        if _NOT_LIBRARY & set(module.parts) or any(_MACHINE.match(part) for part in module.parts):
            continue
        names = {"/".join(module.parts[: depth + 1]) for depth in range(len(module.parts))}
        if bool(names & set(STDLIB_HELDOUT)) == heldout:
            yield path.read_text(encoding="utf-8", errors="replace")


def _read_file(path: Path, chat: Chat | None, told: Counter[str]) -> Iterator[str]:
    """Documents of one file."""
    if check_kind(path) in PLAIN:
        yield whole(path)
        return
    for where, row in rows(path, _columns):
        yield _document(row, where, chat, told)


def _hub(name: str, chat: Chat | None, told: Counter[str]) -> Iterator[str]:
    """Rows of a hub data set, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise SettingError("hub data sets need `datasets`", next="pip install 'kvfold[data]'") from error
    repository, config, split = [*name.split(":"), "", ""][:3]
    try:
        for row in datasets.load_dataset(repository, config or None, split=split or "train", streaming=True):
            yield _document(row, name, chat, told)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"cannot be loaded: {lines[0]}", where=name) from error


# --- rows -----------------------------------------------------------------------------------------------------------


def _columns(names: Sequence[str]) -> list[str]:
    """The columns that make a document; none where no such are there."""
    if not any(name in names for name in (*_STRINGS, *_CHATS)) and not set(_PAIR) <= set(names):
        return []
    return [name for name in names if name in (*_STRINGS, *_CHATS, *_PAIR, "tools", "role")]


def _document(row: Any, where: str, chat: Chat | None, told: Counter[str]) -> str:
    """The text of a row, empty where it has none. Raises DataError for a row that is none of those above."""
    text = None if row is None else _text(row, where, chat)
    if not text:
        told[LEFT_OUT] += 1
        return ""
    mended = mend(text)
    told[MENDED] += mended != text
    return mended


def mend(text: str) -> str:
    """The same text with each half of a surrogate pair as U+FFFD: no encoding and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _text(row: Any, where: str, chat: Chat | None) -> str | None:
    if not isinstance(row, Mapping):
        raise DataError('is not one JSON object with a "text"', where=where, got=type(row).__name__)
    given = {key: value for key, value in row.items() if value is not None}
    for key in _STRINGS:
        if key in given and not (key == "content" and "role" in row):
            if not isinstance(given[key], str):
                raise DataError(f'"{key}" is not a string', where=where, got=type(given[key]).__name__)
            return str(given[key])
    for key in _CHATS:
        if key in given:
            return _chatted(given[key], given.get("tools"), f"{where}: {key}", chat)
    if set(_PAIR) <= set(given):
        before, after = given["prompt"], given["completion"]
        if isinstance(before, str) and isinstance(after, str):
            return before + after
        if isinstance(before, list) and isinstance(after, list):
            return _chatted([*before, *after], given.get("tools"), f"{where}: prompt", chat)
        raise DataError("prompt and completion are neither two strings nor two lists of messages", where=where)
    if any(key in row and row[key] is None for key in (*_STRINGS, *_CHATS, *_PAIR)):
        return None
    raise DataError(
        'has no "text"',
        where=where,
        got=f"keys {', '.join(map(str, row)) or 'none'}",
        allowed="text, content, messages, conversations, or prompt and completion",
    )


def _chatted(messages: Any, tools: Any, where: str, chat: Chat | None) -> str:
    """A chat as the text that a model reads."""
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise DataError("is not a list of messages", where=where, allowed='[{"role": "user", "content": "..."}, ...]')
    if not messages:
        return ""
    made = [_message(each, where) for each in messages]
    if chat is None:
        raise DataError(
            "is a chat, and here is no tokenizer that could write it as text",
            where=where,
            next='write the chats as text first: rows with "text"',
        )
    try:
        return chat(made, tools)
    except DataError as error:
        raise DataError(error.what, where=where, got=error.got, next=error.next) from error


def _message(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message in transformers' words, from those or from ShareGPT's."""
    message = {key: value for key, value in given.items() if value is not None or key == "content"}
    if "from" in message and "value" in message:
        role = message.pop("from")
        message = {"role": _ROLES.get(role, role), "content": message.pop("value"), **message}
    if not isinstance(message.get("role"), str):
        raise DataError(
            "a message has no role",
            where=where,
            got=f"keys {', '.join(map(str, given)) or 'none'}",
            allowed="role and content, or from and value",
        )
    return message


def chat_of(tokenizer: Any) -> Chat:
    """How a tokenizer writes a chat: by its template, without the tokens that kvfold puts around every document.

    Raises DataError when it has no template, or the template refuses the chat.
    """

    def write(messages: Sequence[Any], tools: Any) -> str:
        if not tokenizer.chat_template:
            raise DataError(
                "is a chat, and the tokenizer has no chat template",
                next='take the tokenizer of a chat model, or write the chats as text: rows with "text"',
            )
        tools = tools or None
        try:
            template = tokenizer.get_chat_template(tools=tools)
            if "strftime_now" in template:
                template = _TODAY + template
            text = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
        except Exception as error:  # a template is a program: it may fail in any way
            lines = str(error).splitlines() or [type(error).__name__]
            raise DataError(f"the tokenizer's chat template refuses it: {lines[0]}") from error
        around = tokenizer.decode([each for each in tokenizer("")["input_ids"] if each != tokenizer.eos_token_id])
        return str(text).removeprefix(around).removesuffix(tokenizer.eos_token or "")

    return write


# --- what identifies a text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFacts:
    """What identifies a text: SHA-256 of its documents, how many they are, and their characters."""

    hash: str
    documents: int
    characters: int
    told: tuple[str, ...] = ()  # what is worth a word about it


def text_facts(source: str | Path, limit: int | None = None, *, chat: Chat | None = None) -> TextFacts:
    """Hash the documents of a source, reading at most `limit` characters. Raises DataError when there is no text."""
    digest, documents, characters, told = hashlib.sha256(), 0, 0, Counter[str]()
    for text in limited(read_texts(source, chat=chat, told=told), limit):
        digest.update(f"{len(text)}\n".encode() + text.encode("utf-8", "replace"))
        documents, characters = documents + 1, characters + len(text)
    said = tuple(f"{source}: {count:,} {what}" for what, count in told.items() if count)
    if not characters:
        raise DataError(
            "the text is empty", where=source, got=f"{told[LEFT_OUT]:,} rows without text" if said else None
        )
    return TextFacts(digest.hexdigest(), documents, characters, said)


def limited(texts: Iterable[str], limit: int | None) -> Iterator[str]:
    """Whole documents until `limit` characters are passed; empty ones are left out."""
    seen = 0
    for text in texts:
        if limit is not None and seen >= limit:
            return
        if text:
            yield text
        seen += len(text)
