"""Text sources, token files and the order of batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies

from kvfold.errors import DataError, SettingError
from kvfold.text import tokens as token_files
from kvfold.text.documents import read_texts, text_facts
from kvfold.text.tokens import TokenFile, token_file


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


def test_every_kind_of_file_and_a_folder_of_them_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("first\nfile", encoding="utf-8")
    (folder / "b" / "c.jsonl").write_text('{"text": "second"}\n\n{"text": "th\\u00efrd", "id": 3}\n', encoding="utf-8")
    (folder / "ignored.md").write_text("no")
    assert list(read_texts(folder)) == ["first\nfile", "second", "thïrd"]
    assert list(read_texts(folder / "a.txt")) == ["first\nfile"]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "t.parquet")
    assert list(read_texts(tmp_path / "t.parquet")) == ["one", "two"]
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r'no column "text" .*body'):
        list(read_texts(tmp_path / "u.parquet"))


@pytest.mark.slow
def test_the_standard_library_and_what_it_leaves_out_share_nothing() -> None:
    ours, held = list(read_texts("stdlib")), list(read_texts("stdlib:heldout"))
    whole = sum(map(len, ours))
    assert whole > 5_000_000
    assert 0.03 < sum(map(len, held)) / whole < 0.1
    assert not set(ours) & set(held) - {""}
    assert any("class ArgumentParser" in text for text in held)
    assert not any("class ArgumentParser" in text for text in ours)
    assert not any("build_time_vars" in text[:200] for text in ours), "written by this machine's build"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.txt", b"", "the text is empty"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text .*byte 3"),
        ("table.csv", b"a,b", "unknown kind of text file"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', r"broken.jsonl:2: is not one JSON object"),
        ("other.jsonl", b'{"body": "a"}\n', r'other.jsonl:1: has no "text" \(got keys body\)'),
        ("number.jsonl", b'{"text": 3}\n', '"text" is not a string .*int'),
    ],
)
def test_a_text_that_cannot_be_used_is_one_clear_line(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        text_facts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "no.txt", "no-such-thing", "nowhere.jsonl"):
        with pytest.raises(DataError, match="no such text"):
            text_facts(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text in this folder"):
        text_facts(tmp_path / "empty")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("x")

    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(DataError, match=r"t\.txt: cannot be read: Permission denied"):
        text_facts(tmp_path / "t.txt")


def test_tokens_are_documents_with_their_end_and_the_file_is_made_once(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    made = token_file(text, byte_tokenizer)
    ids = {letter: int(made.tokens[place]) for place, letter in ((0, "a"), (1, "b"), (3, "c"))}
    assert made.tokens.tolist() == [ids["a"], ids["b"], 2, ids["c"], 2]  # 2 is </s>; "" is no document
    assert made.hash == text_facts(text).hash
    assert made.vocab_size == 260
    monkeypatch.setattr(token_files, "_write", lambda *args: pytest.fail("tokenised twice"))
    assert token_file(text, byte_tokenizer).path == made.path
    assert token_file(text, byte_tokenizer, max_tokens=3).tokens.tolist() == made.tokens.tolist()[:3]
    text.write_text('{"text": "abd"}\n')
    with pytest.raises(pytest.fail.Exception, match="tokenised twice"):
        token_file(text, byte_tokenizer)
    assert not list(made.path.parent.glob("*.tmp")), "what was begun is not left lying"


def test_long_texts_are_tokenised_in_pieces_that_add_up(
    tmp_path: Path, byte_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {n}\n" for n in range(50)) + "x" * 90
    (tmp_path / "t.txt").write_text(text)
    whole = token_file(tmp_path / "t.txt", byte_tokenizer, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(token_files, "PIECE", 40)
    assert "".join(token_files._pieces(text, token_files.PIECE)) == text
    pieces = token_file(tmp_path / "t.txt", byte_tokenizer, cache_dir=tmp_path / "pieces")
    assert pieces.tokens.tolist() == whole.tokens.tolist()


def test_a_damaged_cache_is_told(tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("some text")
    made = token_file(tmp_path / "t.txt", byte_tokenizer)
    made.path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"damaged.*delete it"):
        token_file(tmp_path / "t.txt", byte_tokenizer)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text")
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="tokenizer"):
        token_file(tmp_path / "t.txt", tmp_path / "model")


def _file(count: int, vocab_size: int = 100) -> TokenFile:
    return TokenFile(Path("t.bin"), np.arange(count, dtype=np.uint32), vocab_size, "hash", "t.txt")


def test_too_little_text_and_too_large_a_vocabulary() -> None:
    _file(4 * 8 + 1).check(batch_size=4, length=8, vocab_size=100)
    with pytest.raises(DataError, match=r"shorter than one batch .*32 tokens.*at least 33"):
        _file(4 * 8).check(batch_size=4, length=8, vocab_size=100)
    with pytest.raises(DataError, match=r"more tokens than the model has embeddings .*100.*at most 99"):
        _file(100).check(batch_size=4, length=8, vocab_size=99)


@given(
    seed=strategies.integers(0, 2**31),
    batch=strategies.integers(1, 5),
    length=strategies.integers(1, 9),
    windows=strategies.integers(5, 23),
)
def test_each_epoch_sees_each_window_once_and_steps_stand_alone(
    seed: int, batch: int, length: int, windows: int
) -> None:
    tokens = _file(windows * length + 1)
    settings = {"seed": seed, "batch_size": batch, "length": length}
    steps = -(-2 * windows // batch)
    rows = [row for step in range(steps) for row in tokens.batch(step, **settings).tolist()]
    assert all(row == list(range(row[0], row[0] + length + 1)) for row in rows)
    everything = sorted(range(0, windows * length, length))
    first, second = [row[0] for row in rows[:windows]], [row[0] for row in rows[windows : 2 * windows]]
    assert sorted(first) == sorted(second) == everything
    later = tokens.batch(steps - 1, **settings)  # asked for alone, it is the same
    assert later.tolist() == rows[-batch:]


def test_another_seed_is_another_order() -> None:
    tokens = _file(1001)
    one, two = (tokens.batch(0, seed=seed, batch_size=50, length=10).tolist() for seed in (0, 1))
    assert one != two


@pytest.mark.slow
def test_self_is_sampled_from_the_teacher(tmp_path: Path, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SAMPLED", 4)
    monkeypatch.setattr(token_files, "LONGEST_SAMPLE", 24)
    teacher = tiny_checkpoint("llama")
    made = token_file("self", teacher, teacher=teacher, max_tokens=150, seed=1)
    assert len(made) == 150
    assert made.tokens[0] == 1, "documents begin with <s>"
    assert len(set(made.tokens.tolist())) > 20, "and are drawn, not the likeliest"
    again = token_file("self", teacher, teacher=teacher, max_tokens=150, seed=1, cache_dir=tmp_path / "again")
    other = token_file("self", teacher, teacher=teacher, max_tokens=150, seed=2)
    assert again.tokens.tolist() == made.tokens.tolist() != other.tokens.tolist()
    assert json.loads(made.path.with_suffix(".json").read_text())["hash"] == made.hash
    with pytest.raises(SettingError, match="needs a teacher"):
        token_file("self", teacher)


def test_spread_draws_pieces_from_all_of_the_text(tmp_path: Path, byte_tokenizer: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 20_000)
    drawn = token_file(tmp_path, byte_tokenizer, max_tokens=30_000, spread=True, cache_dir=tmp_path / "cache")
    again = token_file(tmp_path, byte_tokenizer, max_tokens=30_000, spread=True, cache_dir=tmp_path / "other")
    other = token_file(tmp_path, byte_tokenizer, max_tokens=30_000, spread=True, seed=1, cache_dir=tmp_path / "cache")
    first = token_file(tmp_path, byte_tokenizer, max_tokens=30_000, cache_dir=tmp_path / "cache")
    assert len(drawn) == len(other) == 30_000
    assert len(set(first.tokens.tolist())) < 4  # one document, and what stands around it
    assert len(set(drawn.tokens.tolist())) > 3  # several documents
    assert (drawn.tokens == again.tokens).all()
    assert drawn.hash == again.hash != other.hash
    assert (drawn.tokens != other.tokens).any()


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"tokens": "x"}', '{"tokens": 9, "dtype": "object"}'])
def test_damaged_facts_of_a_cache_are_told(content: str, tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("some text")
    made = token_file(tmp_path / "t.txt", byte_tokenizer)
    made.path.with_suffix(".json").write_text(content)
    with pytest.raises(DataError, match=r"damaged.*delete it"):
        token_file(tmp_path / "t.txt", byte_tokenizer)
    made.path.with_suffix(".json").unlink()
    assert len(token_file(tmp_path / "t.txt", byte_tokenizer)) == len(made)
