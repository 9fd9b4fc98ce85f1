"""Texts: the documents of a file, a folder, a hub data set or Python's own library, in a fixed order.

A row of a `.jsonl`, `.json` or `.parquet` is a document by the first of these keys that it has:

    text, or content            a string
    messages, or conversations  a chat, through the tokenizer's chat template
    prompt and completion       two strings, concatenated, or two lists of messages of one chat
    question and ctxs           a question with passages and answers (`kvfold.text.questions`)

A row in which they are null has no text and is left out. Half of a surrogate pair, which no encoding can hold, becomes
U+FFFD. Both kinds of rows are counted, and the user sees the counts.
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
from kvfold.text.questions import COLUMNS, KEYS, is_question, read_question

Chat = Callable[[Sequence[Any], Any], str]
"""Messages and tools of a chat -> its text."""

LEFT_OUT = "rows have no text and are left out"
MENDED = "rows hold half of a surrogate pair, which is read as U+FFFD"

_STRINGS, _CHATS, _PAIR = ("text", "content"), ("messages", "conversations"), ("prompt", "completion")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_TODAY = """{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}"""  # goes before a template that prints the date, so that a text is the same every day

# Parts of the standard library that are tests, other programs, or generated when Python is built.
_NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__"}
_MACHINE = re.compile(r"_sysconfigdata|config-|_sysconfig_vars")

STDLIB_HELDOUT = (
    *("argparse", "asyncio/streams", "calendar", "csv", "fractions", "heapq", "html/parser", "json"),
    *("logging/handlers", "queue", "random", "sched", "shlex", "statistics", "tarfile", "tempfile", "textwrap"),
    *("urllib/robotparser", "wave", "xml/dom/pulldom"),
)
"""Modules and packages of the standard library that are in `stdlib:heldout` and not in `stdlib`."""


# --- sources --------------------------------------------------------------------------------------------------------


def read_texts(source: str | Path, *, chat: Chat | None = None, notes: Counter[str] | None = None) -> Iterator[str]:
    """Documents of a source, in a fixed order.

    A `.txt` or `.md` file is one document, and so is each row of a `.jsonl`, `.json` or `.parquet` file. All but
    parquet may be compressed (`.txt.gz`). In a folder, the `.txt`, `.jsonl` and `.parquet` files are read. `stdlib` is
    the source of Python's own library, `stdlib:heldout` the modules that it leaves out. Anything else is a hub data
    set, `owner/name[:config[:split]]`. `chat` writes chats as text; `notes` counts rows with peculiarities. Raises
    DataError.
    """
    name = str(source)
    notes = Counter() if notes is None else notes
    if name in ("stdlib", "stdlib:heldout"):
        yield from _stdlib(heldout=name.endswith("heldout"))
    elif files := local_files(name):
        for file in files:
            if check_kind(file) in PLAIN:
                yield whole(file)
            else:
                yield from (_document(row, where, chat, notes) for where, row in rows(file, _columns))
    else:
        yield from _hub(name, chat, notes)


def local_files(source: str) -> list[Path]:
    """The files of a text on this disk, in the order in which they are read; none for a hub data set.

    Raises DataError for a missing file, a file of unknown kind and a folder without text. Nothing is read.
    """
    path = Path(source)
    if source and os.path.isdir(path):
        return _files(path)
    if source and os.path.lexists(path):
        check_kind(path)
        return [path]
    if not _may_be_hub(source):
        allowed = "a file, a folder, a hub data set `owner/name`, stdlib or self"
        raise DataError("no such text", where=source, allowed=allowed)
    return []


def _files(folder: Path) -> list[Path]:
    """The text files of a folder, by path; a file that is there both plain and compressed is read once."""
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
            next="name a file of another kind by itself, to read it" if kinds else None,
        )
    return files


def _may_be_hub(name: str) -> bool:
    """True for the name of a hub data set, False for that of a missing file."""
    file = kind_of(name) in (*PLAIN, *ROWS) or Path(name).suffix.lower() in (*REFUSED, *COMPRESSED)
    return not file and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", name) is not None


def _stdlib(heldout: bool) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("")
        if _NOT_LIBRARY & set(module.parts) or any(_MACHINE.match(part) for part in module.parts):
            continue
        names = {"/".join(module.parts[: depth + 1]) for depth in range(len(module.parts))}
        if bool(names & set(STDLIB_HELDOUT)) == heldout:
            yield path.read_text(encoding="utf-8", errors="replace")


def _hub(name: str, chat: Chat | None, notes: Counter[str]) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise SettingError("hub data sets need `datasets`", next="pip install 'kvfold[data]'") from error
    repository, config, split = [*name.split(":"), "", ""][:3]
    try:
        for row in datasets.load_dataset(repository, config or None, split=split or "train", streaming=True):
            yield _document(row, name, chat, notes)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"cannot be loaded: {lines[0]}", where=name) from error


# --- rows -----------------------------------------------------------------------------------------------------------


def _columns(names: Sequence[str]) -> list[str]:
    """The columns that documents are made of."""
    if set(KEYS) <= set(names):
        return [name for name in COLUMNS if name in names]
    if not any(name in names for name in (*_STRINGS, *_CHATS)) and not set(_PAIR) <= set(names):
        return []
    return [name for name in names if name in (*_STRINGS, *_CHATS, *_PAIR, "tools", "role")]


def _document(row: Any, where: str, chat: Chat | None, notes: Counter[str]) -> str:
    """The text of a row, empty if it has none. Raises DataError for a row without any of the known keys."""
    text = None if row is None else _text(row, where, chat)
    if not text:
        notes[LEFT_OUT] += 1
        return ""
    mended = mend(text)
    notes[MENDED] += mended != text
    return mended


def mend(text: str) -> str:
    """A text with each half of a surrogate pair replaced by U+FFFD: no encoding and no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _text(row: Any, where: str, chat: Chat | None) -> str | None:
    if not isinstance(row, Mapping):
        raise DataError('is not one JSON object with a "text"', where=where, got=type(row).__name__)
    given = {key: value for key, value in row.items() if value is not None}
    if is_question(given):
        return read_question(given, where).document()
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
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise DataError("is not a list of messages", where=where, allowed='[{"role": "user", "content": "..."}, ...]')
    if not messages:
        return ""
    made = [_message(each, where) for each in messages]
    if chat is None:
        remedy = 'write the chats as text first: rows with "text"'
        raise DataError("is a chat, and there is no tokenizer to write it as text", where=where, next=remedy)
    try:
        return chat(made, tools)
    except DataError as error:
        raise DataError(error.what, where=where, got=error.got, next=error.next) from error


def _message(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message with transformers' keys, from those or from ShareGPT's."""
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
    """A function that writes chats with a tokenizer's template, without the tokens that kvfold puts around documents.

    It raises DataError if there is no template or the template refuses the chat.
    """

    def write(messages: Sequence[Any], tools: Any) -> str:
        if not tokenizer.chat_template:
            remedy = 'take the tokenizer of a chat model, or write the chats as text: rows with "text"'
            raise DataError("is a chat, but the tokenizer has no chat template", next=remedy)
        tools = tools or None
        try:
            template = tokenizer.get_chat_template(tools=tools)
            if "strftime_now" in template:
                template = _TODAY + template
            text = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
        except Exception as error:  # a template is a program, which can raise anything
            lines = str(error).splitlines() or [type(error).__name__]
            raise DataError(f"the tokenizer's chat template refuses it: {lines[0]}") from error
        around = tokenizer.decode([each for each in tokenizer("")["input_ids"] if each != tokenizer.eos_token_id])
        return str(text).removeprefix(around).removesuffix(tokenizer.eos_token or "")

    return write


# --- identity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFacts:
    """The identity of a text: SHA-256 of its documents, their number, and their characters."""

    hash: str
    documents: int
    characters: int
    notes: tuple[str, ...] = ()  # lines about peculiarities of its rows


def text_facts(source: str | Path, limit: int | None = None, *, chat: Chat | None = None) -> TextFacts:
    """Hash the documents of a source, reading about `limit` characters. Raises DataError if there is no text."""
    digest, documents, characters, notes = hashlib.sha256(), 0, 0, Counter[str]()
    for text in limited(read_texts(source, chat=chat, notes=notes), limit):
        digest.update(f"{len(text)}\n".encode() + text.encode("utf-8", "replace"))
        documents, characters = documents + 1, characters + len(text)
    if not characters:
        got = f"{notes[LEFT_OUT]:,} rows without text" if notes[LEFT_OUT] else None
        raise DataError("the text is empty", where=source, got=got)
    return TextFacts(digest.hexdigest(), documents, characters, noted(source, notes))


def noted(source: str | Path, notes: Mapping[str, int]) -> tuple[str, ...]:
    """The counts of peculiar rows, one line each."""
    return tuple(f"{source}: {count:,} {what}" for what, count in notes.items() if count)


def limited(texts: Iterable[str], limit: int | None) -> Iterator[str]:
    """Whole documents until their characters reach `limit`; empty ones are left out."""
    seen = 0
    for text in texts:
        if limit is not None and seen >= limit:
            return
        if text:
            yield text
        seen += len(text)
