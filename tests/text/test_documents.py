"""Texts as people have them: encodings, compression, rows of every spelling, chats, and files that are none."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvfold.errors import DataError
from kvfold.progress import Progress
from kvfold.text.documents import LEFT_OUT, MENDED, chat_of, read_texts, text_facts
from kvfold.text.tokens import token_file

MARK = b"\xef\xbb\xbf"


def _file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


class _Told(Progress):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", "caf\u00e9\nau lait".encode()),
        ("mark.txt", MARK + "caf\u00e9\nau lait".encode()),
        ("utf16.txt", "caf\u00e9\nau lait".encode("utf-16")),
        ("big.txt", b"\xfe\xff" + "caf\u00e9\nau lait".encode("utf-16-be")),
        ("utf32.txt", "caf\u00e9\nau lait".encode("utf-32")),
        ("windows.txt", "caf\u00e9\r\nau lait".encode()),
        ("UPPER.TXT", "caf\u00e9\nau lait".encode()),
        ("page.md", "caf\u00e9\nau lait".encode()),
        ("packed.txt.gz", gzip.compress("caf\u00e9\nau lait".encode(), mtime=0)),
        ("PACKED.TXT.GZ", gzip.compress(MARK + "caf\u00e9\nau lait".encode(), mtime=0)),
        ("packed.txt.bz2", bz2.compress("caf\u00e9\nau lait".encode())),
        ("packed.txt.xz", lzma.compress("caf\u00e9\nau lait".encode())),
        ("mark.jsonl", MARK + b'{"text": "caf\\u00e9\\nau lait"}\n'),
        ("utf16.jsonl", '{"text": "caf\u00e9\\nau lait"}\r\n'.encode("utf-16")),
        ("windows.jsonl", b'{"text": "caf\\u00e9\\nau lait"}\r\n\r\n'),
        ("packed.jsonl.gz", gzip.compress(b'{"text": "caf\\u00e9\\nau lait"}', mtime=0)),
        ("content.jsonl", b'{"content": "caf\\u00e9\\nau lait", "id": 1}\n'),
        ("pair.jsonl", b'{"prompt": "caf\\u00e9\\n", "completion": "au lait"}\n'),
        ("list.json", b'[{"text": "caf\\u00e9\\nau lait"}]'),
        ("lines.json", b'{"text": "caf\\u00e9\\nau lait"}\n'),
    ],
)
def test_one_document_however_it_is_stored(tmp_path: Path, name: str, content: bytes) -> None:
    assert list(read_texts(_file(tmp_path, name, content))) == ["caf\u00e9\nau lait"]


def test_the_hash_of_a_plain_file_is_that_of_its_documents(tmp_path: Path) -> None:
    """What token caches and records of earlier versions are named by."""
    path = _file(tmp_path, "t.jsonl", '{"text": "ab\u00e9"}\n{"text": ""}\n{"text": "c"}\n'.encode())
    expected = hashlib.sha256("3\nab\u00e91\nc".encode()).hexdigest()
    facts = text_facts(path)
    assert (facts.hash, facts.documents, facts.characters) == (expected, 2, 4)


def test_nul_characters_are_text_like_others(tmp_path: Path, byte_tokenizer: Path) -> None:
    path = _file(tmp_path, "nul.txt", b"one\0two, and more than that")
    assert list(read_texts(path)) == ["one\0two, and more than that"]
    assert len(token_file(path, byte_tokenizer, cache_dir=tmp_path)) == 27 + 1


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("latin.txt", b"x" * 70_000 + b"\xe9", r"latin.txt: is not UTF-8 text \(got byte 70000\); .*iconv"),
        ("cut.txt", b"caf\xc3", r"is not UTF-8 text \(got byte 3\)"),
        (
            "late.jsonl",
            b'{"text": "' + b"y" * 9_000 + b'"}\n{"text": "\xe9"}\n',
            r"is not UTF-8 text \(got byte 9023\)",
        ),
        ("latin.txt.gz", gzip.compress(b"caf\xe9 au lait", mtime=0), r"is not UTF-8 text \(got byte 3\)"),
        ("half.txt", "caf\u00e9".encode("utf-16") + b"\xd8", "is not UTF-16 text, though its byte-order mark"),
        ("markless.txt", "cafes".encode("utf-16-le"), "many of its bytes are zero; .*iconv -f utf-16le"),
        ("t.csv", b"text\nx\n", "unknown kind of text file .*csv.*; write it as rows: python -c .*to_json"),
        ("t.TSV", b"text\nx\n", "unknown kind of text file .*write it as rows"),
        ("t.txt.zst", b"(\xb5/\xfd", "unknown kind of text file .*decompress it first"),
        ("t.zip", b"PK", "unknown kind of text file .*unpack it"),
        ("t.pdf", b"%PDF", "unknown kind of text file .*save its text"),
        ("t.parquet.gz", b"", "unknown kind of text file .*decompress it first"),
        ("t", b"text", "unknown kind of text file .*no suffix.*name it .txt"),
        ("cut.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "cannot be read: .*damaged, or cut off"),
        ("no.jsonl.gz", b"text", "cannot be read: Not a gzipped file"),
        ("no.txt.xz", b"text", "cannot be read: .*damaged, or cut off"),
        ("no.txt.bz2", b"text", "cannot be read: .*damaged, or cut off"),
        (
            "keys.jsonl",
            b'{"instruction": "x", "output": "y"}',
            r"keys.jsonl:1: has no .text. \(got keys instruction, out",
        ),
        ("half.jsonl", b'{"prompt": "x"}', r"has no .text. \(got keys prompt\); allowed: text, content, messages"),
        ("turn.jsonl", b'{"role": "user", "content": "x"}', r"has no .text. \(got keys role, content\)"),
        ("str.jsonl", b'"text"', r"str.jsonl:1: is not one JSON object with a .text. \(got str\)"),
        ("list.json", b'[{"text": "a"}, {"body": "b"}]', r"list.json: item 2: has no .text. \(got keys body\)"),
        ("cut.json", b'[{"text": "a"}', "is not a JSON array"),
        ("deep.jsonl", b"[" * 100_000, "is nested too deeply|is not one JSON object"),
        ("mixed.jsonl", b'{"prompt": "x", "completion": ["y"]}', "neither two strings nor two lists"),
        ("none.jsonl", b'{"text": null}\nnull\n', r"the text is empty \(got 2 rows without text\)"),
    ],
)
def test_what_is_no_text_is_one_line_with_the_remedy(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        text_facts(_file(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for name, what in (("pipe.txt", "not a regular"), ("zero.txt", "not a regular"), ("gone.txt", "No such file")):
        with pytest.raises(DataError, match=f"{name}: .*{what}"):
            text_facts(tmp_path / name)
    for broken in ("pipe.txt", "zero.txt"):
        (tmp_path / broken).unlink()
    with pytest.raises(DataError, match=r"gone\.txt: .*No such file"):
        text_facts(tmp_path)  # a link of a folder that leads nowhere is text that is lost


def test_a_folder_named_as_a_file_and_what_a_folder_holds(tmp_path: Path) -> None:
    folder = tmp_path / "all.txt"
    (folder / "b.txt").mkdir(parents=True)
    _file(folder / "b.txt", "c.txt", b"third")
    _file(folder, "A.TXT", b"first")
    _file(folder, "a.jsonl.gz", gzip.compress(b'{"text": "second"}', mtime=0))
    _file(folder, "z.txt", b"last")
    _file(folder, "z.txt.gz", gzip.compress(b"the same again", mtime=0))
    _file(folder, "README.md", b"not of the text")
    _file(folder, "state.json", b"{}")
    assert list(read_texts(folder)) == ["first", "second", "third", "last"]


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text in this folder \(got no files\)"):
        text_facts(tmp_path)
    _file(tmp_path, "a.md", b"x")
    _file(tmp_path, "b.csv", b"x")
    with pytest.raises(DataError, match=r"no text in this folder \(got .csv, .md\); allowed: .txt, .jsonl, .parquet"):
        text_facts(tmp_path)


@pytest.mark.parametrize("name", ["", "a" * 5000, "no\0name", "owner/name.csv", "owner/name.txt.gz", "owner/name.MD"])
def test_names_that_are_no_text(name: str) -> None:
    with pytest.raises(DataError, match="no such text"):
        text_facts(name)


# --- rows without text ----------------------------------------------------------------------------------------------


def test_null_rows_and_half_surrogates_are_counted_and_told(tmp_path: Path, byte_tokenizer: Path) -> None:
    rows = b'{"text": "ab"}\nnull\n{"text": null}\n{"text": "c\\ud800d"}\n{"text": ""}\n{"text": "\\ud83d\\ude00"}\n'
    path, told = _file(tmp_path, "t.jsonl", rows), Counter[str]()
    assert list(read_texts(path, notes=told)) == ["ab", "", "", "c\ufffdd", "", "\U0001f600"]
    assert told == {LEFT_OUT: 3, MENDED: 1}
    progress = _Told()
    made = token_file(path, byte_tokenizer, cache_dir=tmp_path / "cache", progress=progress)
    assert len(made) == 2 + 1 + 5 + 1 + 4 + 1  # bytes of each document, and its end
    assert sorted(progress.lines) == [f"{path}: 1 {MENDED}", f"{path}: 3 {LEFT_OUT}"]


def test_parquet_as_people_have_it(tmp_path: Path, byte_tokenizer: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def table(name: str, columns: dict[str, Any]) -> Path:
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    told = Counter[str]()
    assert list(read_texts(table("n.parquet", {"text": ["a", None, "b"], "n": [1, 2, 3]}), notes=told)) == [
        "a",
        "",
        "b",
    ]
    assert told[LEFT_OUT] == 1
    large = pyarrow.array(["a", "b"], pyarrow.large_string())
    assert list(read_texts(table("l.PARQUET", {"text": large}))) == ["a", "b"]
    assert list(read_texts(table("d.parquet", {"text": pyarrow.array(["a", "b"]).dictionary_encode()}))) == ["a", "b"]
    chat = table("c.parquet", {"messages": [[{"role": "user", "content": "hi"}], None]})
    assert text_facts(chat, chat=lambda messages, tools: json.dumps(messages)).documents == 1
    for name, columns, what in (
        ("k.parquet", {"body": ["x"], "id": [1]}, r'no column "text" \(got body, id\)'),
        ("i.parquet", {"text": [1]}, r"i.parquet: row 1: .text. is not a string \(got int\)"),
        ("e.parquet", {"text": pyarrow.array([], pyarrow.string())}, "the text is empty"),
        ("z.parquet", {"text": pyarrow.array([None, None], pyarrow.string())}, "is empty .got 2 rows without text"),
    ):
        with pytest.raises(DataError, match=what):
            text_facts(table(name, columns))


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "middle"])
def test_parquet_that_is_damaged(tmp_path: Path, damage: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": [f"document {n}" for n in range(500)]}), path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"no parquet", "cut": whole[:-40], "middle": whole[:10] + b"\xff" * 900 + whole[910:]}[
            damage
        ]
    )
    with pytest.raises(DataError, match="cannot be read as parquet: .*damaged, or cut off"):
        text_facts(path)


# --- chats ----------------------------------------------------------------------------------------------------------

CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
]


@pytest.mark.parametrize("row", CHATS, ids=lambda row: next(iter(row)))
def test_a_chat_is_what_the_tokenizers_template_makes_of_it(
    row: dict[str, Any], tmp_path: Path, byte_tokenizer: Path
) -> None:
    from transformers import AutoTokenizer

    path = _file(tmp_path, "chat.jsonl", json.dumps(row).encode())
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    expected = tokenizer.apply_chat_template(CHATS[0]["messages"], tokenize=False)
    made = token_file(path, byte_tokenizer, cache_dir=tmp_path / "cache")
    assert made.tokens.tolist() == [*tokenizer(expected)["input_ids"], tokenizer.eos_token_id]
    with pytest.raises(DataError, match=r"chat.jsonl:1: \w+: is a chat, and there is no tokenizer"):
        text_facts(path)


def _chat_tokenizer(byte_tokenizer: Path, template: str | None, *, before: bool = False) -> Any:
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    tokenizer.chat_template = template
    if before:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_tokens_around_a_document_are_not_written_twice(byte_tokenizer: Path) -> None:
    template = "<s>{{ messages[0]['content'] }}</s>"
    messages = [{"role": "user", "content": "hi"}]
    assert chat_of(_chat_tokenizer(byte_tokenizer, template, before=True))(messages, None) == "hi"
    assert chat_of(_chat_tokenizer(byte_tokenizer, template))(messages, None) == "<s>hi", "this one puts none itself"


def test_a_template_that_prints_the_date_makes_the_same_text_tomorrow(byte_tokenizer: Path) -> None:
    write = chat_of(_chat_tokenizer(byte_tokenizer, "{{ strftime_now('%d %b %Y') }}|{{ tools[0]['name'] }}"))
    assert write([{"role": "user", "content": "hi"}], [{"name": "clock"}]) == "26 Jul 2024|clock"


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        (None, CHATS[0], "messages: is a chat, but the tokenizer has no chat template; take the tokenizer of a chat"),
        (
            "{{ raise_exception('roles alternate') }}",
            CHATS[0],
            "messages: the tokenizer's chat template refuses it: ro",
        ),
        ("{{ messages[0]['content'] + 1 }}", CHATS[1], "conversations: the tokenizer's chat template refuses it"),
        ("x", {"messages": "hi"}, "messages: is not a list of messages"),
        ("x", {"messages": ["hi"]}, "messages: is not a list of messages"),
        ("x", {"messages": [{"content": "hi"}]}, r"a message has no role \(got keys content\)"),
        ("x", {"messages": []}, "the text is empty"),
    ],
)
def test_a_chat_that_cannot_be_written(
    template: str | None, row: dict[str, Any], what: str, tmp_path: Path, byte_tokenizer: Path
) -> None:
    path = _file(tmp_path, "chat.jsonl", json.dumps(row).encode())
    with pytest.raises(DataError, match=what):
        text_facts(path, chat=chat_of(_chat_tokenizer(byte_tokenizer, template)))
