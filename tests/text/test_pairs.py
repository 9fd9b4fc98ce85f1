"""What encoder-decoders read: T5's published span corruption, pairs, batches as a function of (seed, step)."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvfold import hf
from kvfold.errors import DataError, SettingError
from kvfold.text.documents import LEFT_OUT, MENDED
from kvfold.text.pairs import (
    UNSEEN,
    PairFile,
    Spans,
    are_pairs,
    batched,
    corpus,
    read_pairs,
    sentinels_of,
)
from kvfold.text.spans import corrupted, noise_counts, noise_mask, row_tokens

Make = Callable[..., Path]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 30


def spans_of(noise: Any) -> list[int]:
    """Lengths of the stretches of noise."""
    return [len(list(same)) for hidden, same in itertools.groupby(noise.tolist()) if hidden]


# --- span corruption ------------------------------------------------------------------------------------------------


def test_lengths_are_those_that_t5_was_trained_with() -> None:
    """512 tokens of input come from rows of 568, with 114 of target: t5.data's random_spans_helper at 15% and 3."""
    assert row_tokens(512) == 568
    assert noise_counts(568) == (85, 28)
    noise = noise_mask(568, np.random.default_rng(0))
    given, asked = corrupted(np.arange(1000, 1568), noise, range(100), 1)
    assert (len(given), len(asked)) == (512, 114)
    for inputs in (32, 128, 256, 2048):  # by the same definition: T - n + m + 1 <= S < the same of T + 1
        tokens = row_tokens(inputs)
        lengths = [t - round(0.15 * t) + round(round(0.15 * t) / 3) + 1 for t in (tokens, tokens + 1)]
        assert lengths[0] <= inputs < lengths[1]


@pytest.mark.parametrize("tokens", [2, 3, 5, 20, 97, 568])
def test_a_mask_has_the_noise_and_the_spans_that_were_asked_for(tokens: int) -> None:
    noise, spans = noise_counts(tokens)
    for seed in range(20):
        mask = noise_mask(tokens, np.random.default_rng(seed))
        assert len(mask) == tokens
        assert not mask[0]
        assert mask[-1]
        assert mask.sum() == noise == max(1, round(0.15 * tokens))
        assert len(spans_of(mask)) == spans


@pytest.mark.slow
def test_every_division_into_spans_is_alike_likely() -> None:
    """20 tokens at 40% in 3 spans: noise (21 ways) and the rest (55 ways) are cut independently."""
    generator, seen, draws = np.random.default_rng(0), Counter[tuple[bool, ...]](), 30_000
    for _ in range(draws):
        seen[tuple(noise_mask(20, generator, 0.4, 8 / 3).tolist())] += 1
    ways = 21 * 55
    assert len(seen) == ways
    expected = draws / ways
    statistic = sum((count - expected) ** 2 / expected for count in seen.values())
    assert abs(statistic - (ways - 1)) < 5 * (2 * (ways - 1)) ** 0.5  # chi-squared, five deviations


def test_a_row_by_hand() -> None:
    row, noise = np.array(list(b"abcdefgh")), np.array([0, 0, 1, 1, 0, 0, 1, 1], dtype=bool)
    given, asked = corrupted(row, noise, (900, 899), 1)
    assert given.tolist() == [*b"ab", 900, *b"ef", 899, 1]
    assert asked.tolist() == [900, *b"cd", 899, *b"gh", 1]


def test_input_and_target_together_are_the_row(tiny_checkpoint: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    teacher = tiny_checkpoint("t5")
    spans = corpus(text, teacher)
    assert isinstance(spans, Spans)
    assert spans.sentinels == tuple(range(299, 259, -1))
    spans.check(batch_size=2, length=64, vocab_size=300)
    batch = spans.batch(3, seed=1, batch_size=4, length=64)
    assert batch.input_BS.shape == (4, 64)
    assert bool(batch.seen_BS.all())
    assert not (batch.target_BT == UNSEEN).any()
    row = row_tokens(64)
    windows = {bytes((spans.tokens.tokens[start : start + row]).tolist()) for start in range(0, len(spans) - row, row)}
    for given, asked in zip(batch.input_BS.tolist(), batch.target_BT.tolist(), strict=True):
        hidden: dict[int, list[int]] = {}
        for token in asked[:-1]:
            if token >= 260:
                hidden[token] = []
            else:
                hidden[list(hidden)[-1]].append(token)
        whole = [each for token in given[:-1] for each in hidden.get(token, [token])]
        assert bytes(whole) in windows
        assert list(hidden) == list(range(299, 299 - len(hidden), -1))


def test_a_batch_is_a_function_of_seed_and_step(tiny_checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    spans = corpus(tmp_path / "text.txt", tiny_checkpoint("t5"))
    how = {"batch_size": 4, "length": 40}
    first = spans.batch(5, seed=2, **how)
    again, later, other = (spans.batch(5, seed=2, **how), spans.batch(6, seed=2, **how), spans.batch(5, seed=3, **how))
    assert torch.equal(first.input_BS, again.input_BS)
    assert torch.equal(first.target_BT, again.target_BT)
    assert not torch.equal(first.input_BS, later.input_BS)
    assert not torch.equal(first.input_BS, other.input_BS)
    epochs = len(spans) // row_tokens(40) // 4
    next_epoch = spans.batch(5 + epochs, seed=2, **how)
    assert not torch.equal(first.input_BS, next_epoch.input_BS)


def test_what_span_corruption_lacks_is_said(tiny_checkpoint: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    spans = corpus(tmp_path / "text.txt", tiny_checkpoint("t5"))
    with pytest.raises(
        DataError, match=r"hides 43 spans, .* \(got 40 tokens <extra_id_N>, the largest id 299 of 300\)"
    ):
        spans.check(batch_size=1, length=784, vocab_size=300)
    with pytest.raises(DataError, match="the tokenizer knows more tokens than the model has embeddings"):
        spans.check(batch_size=1, length=64, vocab_size=290)
    with pytest.raises(DataError, match="4 tokens or more"):
        spans.check(batch_size=1, length=3, vocab_size=300)
    with pytest.raises(DataError, match="shorter than one batch"):
        spans.check(batch_size=100, length=64, vocab_size=300)
    plain = corpus(tmp_path / "text.txt", tiny_checkpoint("llama", name="plain"))
    with pytest.raises(DataError, match="got 0 tokens <extra_id_N>"):
        plain.check(batch_size=1, length=64, vocab_size=300)
    with pytest.raises(SettingError, match="only a decoder can sample text"):
        corpus("self", tmp_path / "teacher")


def test_sentinels_are_known_as_t5_and_mt5_spell_them() -> None:
    named = {"<extra_id_0>": 9, "<extra_id_1>": 8, "a": 3, "<extra_id_3>": 6}
    assert sentinels_of(type("T", (), {"get_vocab": lambda self: named})()) == (9, 8)
    marked = {"▁<extra_id_1>": 8, "▁<extra_id_0>": 9}
    assert sentinels_of(type("T", (), {"get_vocab": lambda self: marked})()) == (9, 8)


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.jsonl", "pairs:names.txt"])
def test_pairs_of_every_kind_of_file(name: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / name.removeprefix("pairs:")
    rows = [("ab", "xyz"), ("c", "w")]
    lines = [
        json.dumps({"input": given, "target": asked}) if path.suffix == ".jsonl" else f"{given}\t{asked}"
        for given, asked in rows
    ]
    path.write_text("\n".join(lines) + "\n\n")
    source = f"pairs:{path}" if name.startswith("pairs:") else str(path)
    assert are_pairs(source)
    teacher = tiny_checkpoint("t5")
    made = corpus(source, teacher)
    assert isinstance(made, PairFile)
    assert made.texts == rows
    tokenizer = hf.load_tokenizer(teacher)
    assert [ids.tolist() for ids in made.pairs[0]] == [[*tokenizer.encode(word), 2] for word in ("ab", "xyz")]
    batch = made.batch(0, seed=0, batch_size=2, length=16)
    long, short = sorted(range(2), key=lambda row: -int(batch.seen_BS[row].sum()))
    assert batch.input_BS[long].tolist() == [*tokenizer.encode("ab"), 2]
    assert batch.target_BT[short].tolist() == [*tokenizer.encode("w"), 2, UNSEEN, UNSEEN]
    assert batch.seen_BS[short].tolist() == [True, True, False]
    assert batch.shifted(0)[short].tolist() == [0, *tokenizer.encode("w"), 2, 0]
    assert corpus(source, teacher).hash == made.hash


def test_lines_that_are_no_pairs_are_named(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5")
    for name, text in (("a.tsv", "x\ty\nz\n"), ("b.tsv", "x\ty\tz\n"), ("c.jsonl", '{"input": "x", "target": 1}\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name}:\d: is not a pair \(got .*; allowed: input, tab, target"):
            corpus(tmp_path / name, teacher)
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    assert not are_pairs(tmp_path / "text.jsonl")
    (tmp_path / "none.tsv").write_text("\n")
    with pytest.raises(DataError, match="there are no pairs"):
        corpus(tmp_path / "none.tsv", teacher)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        corpus(tmp_path / "nowhere.tsv", teacher)
    (tmp_path / "keys.jsonl").write_text('{"input": "x", "target": "y"}\n{"input": "x", "answer": "y"}\n')
    with pytest.raises(DataError, match=r"keys.jsonl:2: is not a pair \(got keys input, answer\)"):
        corpus(tmp_path / "keys.jsonl", teacher)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.tsv", b"\xef\xbb\xbfab\txyz\nc\tw\n"),
        ("windows.tsv", b"ab\txyz\r\nc\tw\r\n"),
        ("wide.TSV", "ab\txyz\nc\tw\n".encode("utf-16")),
        ("packed.tsv.gz", gzip.compress(b"ab\txyz\nc\tw\n", mtime=0)),
        ("mark.jsonl", b'\xef\xbb\xbf{"input": "ab", "target": "xyz"}\n{"input": "c", "target": "w"}\n'),
        ("list.json", b'[{"input": "ab", "target": "xyz"}, null, {"input": "c", "target": "w"}]'),
        ("null.jsonl", b'{"input": "ab", "target": "xyz"}\n{"input": null, "target": "y"}\n{"input":"c","target":"w"}'),
    ],
)
def test_pairs_as_people_have_them(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert are_pairs(tmp_path / name)
    told = Counter[str]()
    assert list(read_pairs(tmp_path / name, told)) == [("ab", "xyz"), ("c", "w")]
    assert told[LEFT_OUT] == (b"null" in content)


def test_a_line_ends_at_its_end_and_half_a_surrogate_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("a\u2028b\tc\x0cd\n")
    (tmp_path / "s.jsonl").write_text('{"input": "a\\ud800", "target": "b"}\n')
    assert list(read_pairs(tmp_path / "p.tsv")) == [("a\u2028b", "c\x0cd")]
    told = Counter[str]()
    assert list(read_pairs(tmp_path / "s.jsonl", told)) == [("a\ufffd", "b")]
    assert told == {MENDED: 1}


def test_a_pipe_is_no_pairs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    assert not are_pairs(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        list(read_pairs(tmp_path / "p.jsonl"))


def test_batches_move_and_part_as_tensors_do() -> None:
    rows = [(np.arange(n, n + 3), np.arange(n, n + 2)) for n in range(4)]
    batch = batched(rows)
    parts = batch.to("cpu").split(3)
    assert [len(part.input_BS) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.target_BT for part in parts]), batch.target_BT)
