"""Questions with passages: the public format of Fusion-in-Decoder, and its batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold.errors import DataError
from kvfold.text.documents import read_texts
from kvfold.text.pairs import UNSEEN, PairFile, are_pairs, corpus, read_questions

ROWS: list[dict[str, Any]] = [
    {
        "id": "0",
        "question": "who ran",
        "target": "Ann",
        "answers": ["Ann", "ann b"],
        "ctxs": [{"id": "7", "title": "Run", "text": "Ann ran.", "score": 1.5}, {"title": "", "text": "No."}],
    },
    {"question": "what fell", "answers": ["rain", "snow"], "ctxs": [{"title": "Sky", "text": "rain fell"}]},
]


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_as_the_public_code_reads_them(tmp_path: Path) -> None:
    """facebookresearch/FiD: `question: ...`, `title: ...` and `context: ...`; without a target, one of the answers."""
    path = write(tmp_path, ROWS)
    assert are_pairs(path)
    one, other = read_questions(path)
    assert one.inputs() == ["question: who ran title: Run context: Ann ran.", "question: who ran context: No."]
    assert (one.target, one.answers) == ("Ann", ("Ann", "ann b"))
    assert (other.target, other.answers) == ("rain", ("rain", "snow"))
    array = tmp_path / "questions.json"
    array.write_text(json.dumps(ROWS))
    assert read_questions(array) == [one, other]


def test_a_batch_has_a_place_for_each_token_of_each_passage(tmp_path: Path, span_tokenizer: Path) -> None:
    found = corpus(write(tmp_path, ROWS), span_tokenizer)
    assert isinstance(found, PairFile)
    batch = found.batch(0, seed=0, batch_size=2, length=12)
    assert batch.input_BS.shape == batch.seen_BS.shape == (2, 2, 12)
    assert sorted(batch.seen_BS.flatten(1).sum(1).tolist()) == [12, 24]
    assert not bool(batch.input_BS[~batch.seen_BS].any())
    assert int((batch.target_BT != UNSEEN).sum()) == len("Ann") + len("rain") + 2
    parts = batch.split(1)
    assert torch.equal(torch.cat([each.input_BS for each in parts]), batch.input_BS)
    assert found.encoded_tokens == sum(len(text) + 1 for each in read_questions(found.source) for text in each.inputs())
    assert found.answers == [("Ann", "ann b"), ("rain", "snow")]


def test_the_order_and_the_answers_belong_to_its_identity(tmp_path: Path, span_tokenizer: Path) -> None:
    hashes = {corpus(write(tmp_path, rows), span_tokenizer).hash for rows in (ROWS, ROWS[::-1], [ROWS[0]])}
    changed = [{**ROWS[0], "answers": ["Ann"]}, ROWS[1]]
    assert len(hashes | {corpus(write(tmp_path, changed), span_tokenizer).hash}) == 4


def test_a_tokenizer_is_trained_on_all_of_a_record(tmp_path: Path) -> None:
    one, other = read_texts(write(tmp_path, ROWS))
    assert all(word in one for word in ("who ran", "Run", "Ann ran.", "No.", "ann b"))
    assert "snow" in other


@pytest.mark.parametrize(
    "changes",
    [
        {"ctxs": []},
        {"ctxs": "Ann ran."},
        {"ctxs": [{"title": "Run"}]},
        {"answers": [], "target": None},
        {"question": 3},
    ],
)
def test_what_is_no_record_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, [ROWS[1], {**ROWS[0], **changes}])
    with pytest.raises(DataError, match=r"questions.jsonl:2: is no question with passages and answers; allowed: \{"):
        read_questions(path)
