"""Evaluating encoder-decoders: losses and answers against transformers, metrics against definitions by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.errors import GateMissed, SettingError
from kvfold.evaluate.encoder_decoder import edit_distance, judge
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.text.pairs import UNSEEN, corpus

Make = Callable[..., Path]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 30


@pytest.fixture
def teacher(tiny_checkpoint: Make) -> Path:
    return tiny_checkpoint("t5")


@pytest.fixture
def student(teacher: Path, tmp_path: Path) -> Path:
    return convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{'abcdefgh'[n % 8] * (1 + n % 5)}\t{n:b}\n" for n in range(11)))
    return path


# --- metrics by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("ab", "ba", 2)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_distance_by_its_recursion(one: str, other: str) -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance(one, other) == slow(one, other)


@pytest.mark.slow
def test_answers_are_judged() -> None:
    said, asked = ["the cat sat on the mat", "a dog ", "xy"], ["the cat sat on the mat", "a dog", "xyz"]
    found = judge(said, asked)
    assert found["exact_match"] == 2 / 3
    assert found["cer"] == 1 / (22 + 5 + 3)
    assert found["rouge1"] == found["rougeL"] == pytest.approx(100 * 2 / 3)
    assert judge(asked, asked)["bleu"] == pytest.approx(100)
    assert 0 < found["bleu"] < 100
    assert judge(["q"], ["xyz"])["cer"] == 1.0


def test_metrics_whose_library_is_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    assert set(judge(["a"], ["a"])) == {"exact_match", "cer"}


# --- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_losses_are_transformers_own(teacher: Path, student: Path, pairs: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(data=str(pairs), answers=0, batch_size=4)
    made = evaluate(student, settings, teacher=teacher, records=tmp_path / "records")
    totals: dict[str, float] = {"student": 0.0, "teacher": 0.0, "kl": 0.0, "agreement": 0.0}
    tokens = 0
    models: dict[str, Any] = {"student": hf.load(student), "teacher": hf.load(teacher)}
    for ids, target in corpus(pairs, student).rows(100):
        labels, scored = torch.from_numpy(target)[None], {}
        with torch.inference_mode():
            for who, model in models.items():
                out = model(input_ids=torch.from_numpy(ids)[None], labels=labels)
                totals[who] += float(out.loss) * labels.numel()
                scored[who] = out.logits.log_softmax(-1)
        p, q = scored["teacher"], scored["student"]
        totals["kl"] += float((p.exp() * (p - q)).sum())
        totals["agreement"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += labels.numel()
    metrics = made.metrics
    assert (metrics["tokens"], metrics["windows"]) == (tokens, 11)
    assert metrics["loss"] == pytest.approx(totals["student"] / tokens, rel=1e-5)
    assert metrics["teacher_loss"] == pytest.approx(totals["teacher"] / tokens, rel=1e-5)
    assert metrics["kl"] == pytest.approx(totals["kl"] / tokens, rel=1e-4)
    assert metrics["agreement"] == pytest.approx(totals["agreement"] / tokens)
    assert "answered" not in metrics


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_transformers_own(beams: int, teacher: Path, student: Path, pairs: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(
        data=str(pairs), answers=7, answer_tokens=6, beams=(beams,), batch_size=3, gate=f"cer@{beams}<=9,loss<=99"
    )
    made = evaluate(student, settings, teacher=teacher, records=tmp_path / "records")
    model, tokenizer = hf.load(student), hf.load_tokenizer(student)
    said = []
    for given_text, _ in corpus(pairs, student).texts[:7]:  # type: ignore[union-attr]
        ids = torch.tensor([[*tokenizer.encode(given_text), tokenizer.eos_token_id]])
        out = hf.generate(model, ids, max_new_tokens=6, num_beams=beams)
        said.append(tokenizer.decode(out[0], skip_special_tokens=True))
    asked = [asked for _, asked in corpus(pairs, student).texts[:7]]  # type: ignore[union-attr]
    for name, value in judge(said, asked).items():
        assert made.metrics[name] == {str(beams): pytest.approx(value)}, name
        assert set(made.metrics["teacher"][name]) == {str(beams)}
    assert [row["student"] for row in made.metrics["answered"]] == said[:3]
    assert set(made.metrics["answered"][0]) == {"input", "target", "student", "teacher"}


@pytest.mark.slow
def test_span_corruption_is_scored_alike_for_both(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = EvaluateSettings(data=str(tmp_path / "text.txt"), tokens=1500, sequence_length=64)
    same = convert(teacher, tmp_path / "same", "identity")
    made = evaluate(same, settings, teacher=teacher, records=tmp_path / "records")
    assert made.metrics["loss_gap"] == made.metrics["kl"] == 0.0
    assert made.metrics["agreement"] == 1.0
    rows = list(corpus(tmp_path / "text.txt", same, max_tokens=1500).rows(64))
    assert made.metrics["tokens"] == sum(len(target) for _, target in rows)
    assert UNSEEN not in {int(token) for _, target in rows for token in target}
    again = evaluate(same, settings, teacher=teacher, records=tmp_path / "records")
    assert again.metrics == made.metrics


@pytest.mark.slow
def test_gates_and_settings(teacher: Path, student: Path, pairs: Path, tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        settings = EvaluateSettings(data=str(pairs), answers=2, answer_tokens=3, beams=(1,), **changes)
        return evaluate(student, settings, teacher=teacher, records=tmp_path / "records", overwrite=True)

    with pytest.raises(GateMissed, match=r"exact_match@1>=0.9 \(0 against 0.9\)"):
        run(gate="exact_match@1>=0.9")
    with pytest.raises(SettingError, match="exact_match is not measured at 4 .*; add it to beams"):
        run(gate="exact_match@4>=0.9")
    with pytest.raises(SettingError, match="lm-eval needs a decoder-only model"):
        run(lm_eval=("piqa",))
    for name, value in (("beams", (0,)), ("answers", -1), ("answer_tokens", 0)):
        with pytest.raises(SettingError, match=f"{name} must be at least"):
            EvaluateSettings(**{"data": str(pairs), name: value})  # type: ignore[arg-type]
