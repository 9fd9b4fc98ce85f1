"""The gate's little language: what it reads, what it refuses, how it judges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import SettingError
from kvfold.evaluate import gate

METRICS = {
    "loss": 4.1,
    "perplexity": 60.34,
    "agreement": 0.83,
    "copy_loss": {"64": 5.0},
    "lm_eval": {"arc_easy": {"acc": 0.31, "acc_norm": 0.3}, "my.task": {"acc": 0.5}},
}
TEACHER = {"loss": 4.07, "perplexity": 58.56, "copy_loss": {"64": 4.9}, "lm_eval": {"arc_easy": {"acc": 0.33}}}
CONTROL = {"loss": 4.11, "agreement": 0.9}


def judged(text: str) -> dict[str, object]:
    (threshold,) = gate.parse(text)
    return threshold.judge(METRICS, TEACHER, CONTROL)


@pytest.mark.parametrize(
    ("text", "left", "right", "passed"),
    [
        ("loss<=teacher+0.05", 4.1, 4.12, True),
        ("loss <= teacher + 2e-2", 4.1, 4.09, False),
        ("loss<=control-0.0", 4.1, 4.11, True),
        ("loss<4.1", 4.1, 4.1, False),
        ("loss<=4.1", 4.1, 4.1, True),
        ("perplexity<=1.1*teacher", 60.34, 1.1 * 58.56, True),
        ("perplexity<=1.1 * teacher - 5", 60.34, 1.1 * 58.56 - 5, False),
        ("agreement>=.8", 0.83, 0.8, True),
        ("agreement>control", 0.83, 0.9, False),
        ("copy_loss@64<=teacher+0.2", 5.0, 5.1, True),
        ("lm_eval@arc_easy.acc>=teacher-0.01", 0.31, 0.32, False),
        ("lm_eval@arc_easy.acc_norm>=0.25", 0.3, 0.25, True),
        ("lm_eval@my.task.acc>=0.25", 0.5, 0.25, True),
    ],
)
def test_judges(text: str, left: float, right: float, passed: bool) -> None:
    row = judged(text)
    assert row["left"] == left
    assert row["right"] == pytest.approx(right, rel=1e-12)
    assert row["passed"] is passed
    assert row["expr"] == text


@pytest.mark.parametrize(
    "text", ["passkey@256>=0", "lm_eval@piqa.acc>=0", "copy_loss@64<=control", "lm_eval@arc_easy.acc_norm>=teacher"]
)
def test_what_was_not_measured_is_missed(text: str) -> None:
    row = judged(text)
    assert row["passed"] is False
    assert "not measured" in gate.missed_line([row])


def test_not_a_number_is_missed() -> None:
    (threshold,) = gate.parse("loss<=teacher")
    assert threshold.judge({"loss": float("nan")}, TEACHER, None)["passed"] is False


def test_missed_line_names_the_missed_rows_alone() -> None:
    rows = [judged(text) for text in ("loss<=4.0", "agreement>=0.8", "perplexity<=1*teacher")]
    assert gate.missed_line(rows) == "loss<=4.0 (4.1 against 4); perplexity<=1*teacher (60.34 against 58.56)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lose<=teacher", ("unknown metric 'lose'", "did you mean 'loss'?", "copy_loss@DISTANCE")),
        ("loss<=techer+1", ("unknown reference 'techer'", "did you mean 'teacher'?")),
        ("loss=teacher", ("cannot read 'loss=teacher'",)),
        ("loss<=teacher*1.1", ("cannot read 'loss<=teacher*1.1'", "1.1*teacher")),
        ("loss<=", ("cannot read",)),
        ("loss<=0.1+", ("cannot read",)),
        ("1<loss<2", ("cannot read",)),
        ("loss<=1,,kl<1", ("a row is empty",)),
        ("", ("a row is empty",)),
        ("copy_loss<=teacher", ("copy_loss needs @DISTANCE", "copy_loss@64")),
        ("passkey@far>=0.5", ("passkey needs @CONTEXT",)),
        ("copy_loss@064<=1", ("copy_loss needs @DISTANCE",)),
        ("lm_eval@piqa>=0.5", ("lm_eval needs @TASK.METRIC", "lm_eval@arc_easy.acc")),
        ("loss@64<=1", ("loss has one value",)),
        ("agreement>=teacher", ("the teacher has none of its own", "agreement>=0.8")),
        ("kl<=1.5*teacher", ("the teacher has none of its own",)),
    ],
)
def test_refuses(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SettingError) as error:
        gate.parse(text)
    assert all(word in str(error.value) for word in ("gate", *words)), str(error.value)
    assert "\n" not in str(error.value)


def test_no_gate_is_no_rows() -> None:
    assert gate.parse(None) == gate.parse("none") == gate.parse("default") == ()


def test_the_default_gate_asks_for_recall_only_where_the_teacher_has_some() -> None:
    teacher = {"loss": 3.0, "copy_gain": {"16": 4.0, "64": 0.49}, "last_word": 0.3}
    metrics = {"loss": 3.05, "copy_gain": {"16": 3.2, "64": -1.0}, "last_word": 0.2, "teacher": teacher}
    rows = {row["expr"]: row["passed"] for row in gate.judge_default(metrics)}
    assert rows == {
        "loss<=teacher+0.1": True, "copy_gain@16>=0.8*teacher": True, "last_word>=0.8*teacher": False
    }  # fmt: skip
    assert [row["expr"] for row in gate.judge_default(metrics, {"loss": 3.0, "last_word": 0.05})] == [
        "loss<=teacher+0.1"
    ]
    assert gate.judge_default({"loss": 3.05}) == []  # no teacher
    assert [row["expr"] for row in gate.judge_default({"loss": 3.2, "teacher": teacher})] == ["loss<=teacher+0.1"]


def test_records_keep_the_default_gate_as_those_before_it() -> None:
    assert [gate.recorded(each) for each in ("default", None, "none", "loss<=2")] == [None, "none", "none", "loss<=2"]


@pytest.mark.parametrize(("text", "wanted"), [("kl<=1", True), ("loss<=1", False), ("loss<=teacher", True)])
def test_says_when_it_needs_the_teacher(text: str, wanted: bool) -> None:
    assert gate.parse(text)[0].needs_teacher is wanted


@given(
    factor=st.floats(0, 1e3),
    offset=st.floats(-1e3, 1e3),
    value=st.floats(0, 1e3),
    op=st.sampled_from(["<=", ">=", "<", ">"]),
)
def test_reads_any_factor_and_offset(factor: float, offset: float, value: float, op: str) -> None:
    text = f"loss{op}{factor!r}*teacher{'-' if offset < 0 else '+'}{abs(offset)!r}"
    (threshold,) = gate.parse(text)
    row = threshold.judge({"loss": value}, {"loss": 2.0}, None)
    bound = factor * 2.0 + offset
    assert row["right"] == pytest.approx(bound, abs=1e-9)
    assert row["passed"] is {"<=": value <= bound, ">=": value >= bound, "<": value < bound, ">": value > bound}[op]
