"""Readers of passages are evaluated on their answers, their time and their cache; pre-training reads questions too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold import hf
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.evaluate import squad
from kvfold.evaluate.encoder_decoder import answers
from kvfold.evaluate.evaluation import evaluate
from kvfold.evaluate.reader import PARTS
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.families import all_families
from kvfold.text.pairs import PairFile, corpus
from kvfold.train.pretrain import pretrain
from kvfold.train.settings import PretrainSettings

Make = Callable[..., Path]
WORDS = ("oak", "ash", "elm", "fir", "yew", "bay")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve questions with two or three passages, of unequal lengths."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "question": f"what is {number}",
            "answers": [WORDS[number % 6], f"the {WORDS[number % 6]}"],
            "ctxs": [
                {"title": str(each), "text": WORDS[each % 6] * (1 + each % 3)} for each in range(number, number + 2)
            ]
            + [{"title": "", "text": "none"}] * (number % 2),
        }
        for number in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_record_has_answers_times_and_bytes(tiny_checkpoint: Make, questions: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5", num_layers=2, num_decoder_layers=4)
    student = convert(source, tmp_path / "student", "fido", {"cross_every": 4})
    settings = EvaluateSettings(data=str(questions), answers=5, answer_tokens=3, beams=(1,), samples=2)
    found = evaluate(student, settings, teacher=source, records=tmp_path / "records").metrics
    read = corpus(str(questions), source)
    assert isinstance(read, PairFile)
    written = answers(hf.load(student), hf.load_tokenizer(source), read, settings, beams=1, length=512)
    assert found["exact_match"]["1"] == squad.best(squad.exact_match, written, read.answers[:5])
    assert found["f1"]["1"] == squad.best(squad.f1, written, read.answers[:5])
    held, theirs = found["passage_cache_bytes"], found["teacher"]["passage_cache_bytes"]
    passages = sum(len(given.ids) for given, _ in read.pairs[:5])  # type: ignore[union-attr]
    tokens = sum(len(given) for given, _ in read.pairs[:5])
    width = 2 * 4 * 8 * 4  # bytes of keys and values of a layer
    assert held["predicted"] == held["measured"] == round(width * tokens / passages)
    assert theirs["measured"] == pytest.approx(4 * held["measured"], abs=4)
    assert set(found["seconds_per_answer"]) == set(PARTS)
    assert all(seconds > 0 for seconds in found["seconds_per_answer"].values())


def test_pretraining_reads_questions(questions: Path, tmp_path: Path) -> None:
    config = {**all_families()["t5"].tiny(), "vocab_size": 400}
    settings = PretrainSettings(data=str(questions), tokens=8 * 32, sequence_length=32, batch_size=4, log_every=1)
    made = pretrain(config, tmp_path / "made", settings)
    losses = [json.loads(line).get("loss") for line in (made / "train.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
    hf.load(made)


def test_repair_and_calibration_read_questions(tiny_checkpoint: Make, questions: Path, tmp_path: Path) -> None:
    """Passages of one record are encoded apart and not padded: the loss of a student falls on what repair has read."""
    source = tiny_checkpoint("t5")
    losses = []
    for repair in ((), ("o", "down")):
        how = ConvertSettings(
            calibration=str(questions), calibration_tokens=10**6, calibration_length=64, effort="quick", repair=repair
        )
        settings = {"cross_layers": "auto", "cross_every": 2}
        student = convert(source, tmp_path / f"student-{len(repair)}", "fido", settings, options=how)
        asked = EvaluateSettings(data=str(questions), answers=0, samples=0, sequence_length=64)
        losses.append(evaluate(student, asked, teacher=source, records=tmp_path / f"r{len(repair)}").metrics["kl"])
    assert losses[1] < losses[0]
    assert len(Checkpoint.open(student).shape.crossed) == 2
