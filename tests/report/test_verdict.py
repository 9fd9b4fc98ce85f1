"""The verdict on a student: every outcome from made-up numbers, at the thresholds and without each measurement."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvfold.disk import record
from kvfold.report import render
from kvfold.report.figures import Point, front_of
from kvfold.report.folder import collect
from kvfold.report.labels import Box, leader, place
from kvfold.report.names import short_names
from kvfold.report.outcome import Card, cards, measured, summary_of
from kvfold.report.rows import Row
from kvfold.report.verdict import (
    CLOSING_LIMIT,
    GAP_LIMIT,
    LOSS_LIMIT,
    OUTCOMES,
    RECALL_LIMIT,
    RULE,
    Measured,
    verdict,
)

ROOT = Path(__file__).parents[2]
GOOD = Measured(
    loss=2.05,
    teacher_loss=2.0,
    cache_bytes=256,
    teacher_bytes=2048,
    fp8_bytes=1024,
    fp8_loss=2.01,
    gate=None,
    recall_kept=0.9,
    trained=True,
    closing=0.01,
)


def outcome(**changes: Any) -> str:
    return verdict(dataclasses.replace(GOOD, **changes)).outcome


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ship"),
        ({"loss": 1.9}, "ship"),  # better than its teacher
        ({"gate": True}, "ship"),
        ({"gate": True, "loss": 3.0, "recall_kept": 0.0, "closing": 0.0}, "ship"),  # the gate is the user's
        ({"trained": False, "closing": None}, "ship"),
        ({"gate": False}, "train"),
        ({"gate": False, "loss": 1.9}, "train"),
        ({"loss": 2.2}, "train"),
        ({"recall_kept": 0.5}, "train"),
        ({"recall_kept": -0.2}, "train"),
        ({"words_kept": 0.79}, "train"),  # the loss and the copies are kept, and the words are not
        ({"words_kept": 0.8}, "ship"),
        ({"limited": False, "loss": 3.0, "recall_kept": 0.0, "words_kept": 0.0}, "ship"),  # gate: none
        ({"closing": 0.04}, "train"),
        ({"gate": True, "closing": 0.04}, "train"),
        ({"loss": 2.01, "closing": 0.04}, "ship"),  # too little is left to train for
        ({"closing": -0.1}, "ship"),  # more training made it worse
        ({"cache_bytes": 1024}, "quantise"),  # no fewer bytes, no lower loss
        ({"cache_bytes": 1536, "loss": 2.01}, "quantise"),
        ({"cache_bytes": 1536, "gate": False}, "quantise"),
        ({"cache_bytes": 1023}, "ship"),
        ({"cache_bytes": 1024, "loss": 2.005}, "ship"),  # the loss is lower
        ({"cache_bytes": 1024, "fp8_loss": None}, "measure"),
        ({"fp8_loss": None}, "ship"),  # at fewer bytes it does not matter
        ({"fp8_bytes": None}, "measure"),
        ({"loss": None}, "measure"),
        ({"loss": math.nan}, "measure"),
        ({"loss": math.inf, "gate": False}, "measure"),
        ({"teacher_loss": None}, "measure"),
        ({"cache_bytes": None}, "measure"),
        ({"teacher_bytes": None}, "measure"),
    ],
)
def test_each_outcome(changes: Mapping[str, Any], expected: str) -> None:
    assert outcome(**changes) == expected


def test_a_threshold_itself_is_still_within_the_limit() -> None:
    near = {"teacher_loss": 0.0, "fp8_loss": 0.0, "closing": 0.0}
    assert outcome(**near, loss=LOSS_LIMIT) == "ship"
    assert outcome(**near, loss=math.nextafter(LOSS_LIMIT, 1)) == "train"
    assert outcome(recall_kept=RECALL_LIMIT) == "ship"
    assert outcome(recall_kept=math.nextafter(RECALL_LIMIT, 0)) == "train"
    assert outcome(teacher_loss=0.0, loss=GAP_LIMIT, closing=1.0) == "ship"
    assert outcome(teacher_loss=0.0, loss=0.0625, closing=0.0625 * CLOSING_LIMIT) == "train"
    assert outcome(teacher_loss=0.0, loss=0.0625, closing=0.06 * CLOSING_LIMIT) == "ship"


def test_what_is_missing_is_named() -> None:
    nothing = verdict(Measured())
    assert nothing.missing == (
        "the student's loss",
        "the teacher's loss",
        "the student's cache bytes",
        "the teacher's cache bytes",
    )
    assert "the student's loss, the teacher's loss" in nothing.reason
    bare = verdict(dataclasses.replace(GOOD, closing=None, recall_kept=None))
    assert (bare.outcome, bare.missing) == ("ship", ("whether more training would help", "recall"))
    gated = verdict(dataclasses.replace(GOOD, gate=True, recall_kept=None))
    assert gated.missing == ()
    flag = verdict(dataclasses.replace(GOOD, cache_bytes=1024, fp8_loss=None))
    assert flag.missing == ("the teacher's loss with an fp8 cache",)


def test_a_loose_gate_that_holds_names_the_limits_that_are_exceeded() -> None:
    loose = verdict(dataclasses.replace(GOOD, gate=True, loss=3.0, closing=0.0, recall_kept=0.25))
    assert "loss is 1.000 nats above" in loose.reason
    assert "25% of the teacher's copy gain" in loose.reason
    assert "default gate" not in verdict(dataclasses.replace(GOOD, gate=True)).reason


def test_the_printed_rule_and_the_docs_have_the_thresholds() -> None:
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8").partition("## The verdict")[2]
    for text in (" ".join(RULE), page):
        for words in (f"{LOSS_LIMIT:g} nats", f"{RECALL_LIMIT:.0%}", f"{GAP_LIMIT:g} nats", f"{CLOSING_LIMIT:.0%}"):
            assert words in text
    assert [line.partition(":")[0] for line in RULE] == [
        OUTCOMES[key] for key in ("measure", "quantise", "train", "ship")
    ]


# --- from records to the rule ----------------------------------------------------------------------------------------

TEACHER = {"loss": 2.0, "loss_fp8_cache": 2.01, "copy_gain": {"16": 4.0, "64": 2.0, "128": 0.1}}


def evaluated(name: str, loss: float, method: str = "gqa", **metrics: Any) -> record.Record:
    """An evaluation of a student with the settings in its name's row, beside one teacher."""
    row = {"role": "student", "method": method, **metrics.pop("row", {"kv_heads": 2})}
    found = {"loss": loss, "teacher_loss": 2.0, "teacher": TEACHER, **metrics}
    hashes = {"student": f"hash of {name}", "teacher": "hash of teacher", "tokens": "t"}
    return record.make("evaluate", name, {"data": "made-up", "row": row}, found, hashes=hashes, device="made-up")


def gate(*passed: bool) -> dict[str, Any]:
    rows = [{"expr": "loss<=2", "left": 2.05, "right": 2.0, "passed": each} for each in passed]
    return {"passed": all(passed), "rows": rows}


def planned(kv_heads: int, **settings: Any) -> record.Record:
    """A plan of a teacher with 8 heads of 64 bytes each per layer and token, in bfloat16."""
    sides = {
        name: {
            "kv_heads": heads,
            "parameters": 1000,
            "cache_bytes_per_token": 256 * heads,
            "cache_bytes": 256 * heads * 100,
            "largest_batch": 64 // heads,
        }
        for name, heads in (("before", 8), ("after", kv_heads))
    }
    metrics = {"method": "gqa", "settings": {"kv_heads": kv_heads, **settings}, "context": 100, "batch": 1}
    metrics |= {"dtype": "bfloat16", "hardware": {"name": "h100"}, "tensor_parallel": 1, "warnings": [], "engines": []}
    return record.make("plan", "gqa", metrics["settings"], {**metrics, **sides, "speedup": 2.0}, device="made-up")


def run_of(folder: Path, *records: record.Record) -> Any:
    for each in records:
        record.write(each, folder / "records")
    return collect(folder)


def one_card(folder: Path, *records: record.Record) -> Card:
    ((_, (card,)),) = cards(run_of(folder, *records))
    return card


@pytest.mark.parametrize(
    ("kv_heads", "loss", "metrics", "expected"),
    [
        (2, 2.05, {}, "ship"),
        (2, 2.5, {}, "train"),
        (2, 2.05, {"copy_gain": {"16": 3.9, "64": 1.0, "128": -0.2}}, "train"),
        (4, 2.05, {}, "quantise"),
        (4, 1.95, {}, "ship"),
        (2, 2.05, {"gate": gate(True, False)}, "train"),
        (2, 2.5, {"gate": gate(True, True)}, "ship"),
        (4, 2.05, {"teacher": {"loss": 2.0}}, "measure"),
    ],
)
def test_a_record_gets_its_verdict(
    tmp_path: Path, kv_heads: int, loss: float, metrics: Mapping[str, Any], expected: str
) -> None:
    found = {"copy_gain": {"16": 3.9, "64": 1.9, "128": -0.2}, "row": {"kv_heads": kv_heads}, **metrics}
    card = one_card(tmp_path, planned(kv_heads), evaluated("one", loss, **found))
    assert card.outcome == expected
    assert card.words == OUTCOMES[card.outcome]


def test_without_a_plan_the_bytes_are_missing(tmp_path: Path) -> None:
    card = one_card(tmp_path, evaluated("one", 2.05))
    assert card.outcome == "measure"
    assert {"the student's cache bytes", "recall", "tasks", "decode speed", "largest batch"} <= set(card.missing)
    assert [fact.what for fact in card.gained] == []


def test_the_plan_of_another_student_has_the_bytes_of_the_teacher_alone(tmp_path: Path) -> None:
    card = one_card(tmp_path, planned(4), evaluated("one", 2.05))
    assert card.reason == "The verdict depends on the student's cache bytes."


def test_a_card_has_what_was_lost_and_what_was_gained(tmp_path: Path) -> None:
    rows = [
        {"model": model, "cache": "native", "context": 128, "batch": 8, "decode_s_per_token": time}
        | {"cache_bytes": 1, "predicted_cache_bytes": 1, "prefill_s": 1.0}
        for model, time in (("teacher", 4e-3), ("one", 1e-3))
    ]
    largest = [
        {"model": model, "context": 128, "batch": batch, "memory": 2**30, "tokens_per_s": 10.0}
        for model, batch in (("teacher", 3), ("one", 12))
    ]
    bench = record.make("bench", "b", {}, {"rows": rows, "largest": largest}, device="made-up")
    student = evaluated(
        "one",
        2.05,
        copy_gain={"16": 3.0, "64": 1.0, "128": 0.0},
        lm_eval={"piqa": {"acc": 0.6, "acc_stderr": 0.1}},
        teacher={**TEACHER, "lm_eval": {"piqa": {"acc": 0.7}}},
        gate=gate(False),
    )
    card = one_card(tmp_path, planned(2), bench, student)
    lost = {fact.what: (fact.value, fact.note) for fact in card.lost}
    gained = {fact.what: (fact.value, fact.note) for fact in card.gained}
    assert lost["loss"] == ("+0.0500 nats", "2.0000 → 2.0500 per token")
    assert lost["recall"] == ("50% of the teacher’s copy gain", "1.00 nats over 64 tokens, teacher 2.00")
    assert lost["piqa acc"] == ("0.600", "teacher 0.700")
    assert gained["cache"] == ("25% of the teacher’s", "2,048 → 512 bytes per token")
    assert gained["decode speed"] == ("4.00× the teacher’s", "context 128 × batch 8")
    assert gained["largest batch"] == ("3 → 12", "in 1 GiB, context 128")
    assert card.gate == (("loss<=2: 2.0500 against 2.0000, missed", False),)
    assert card.missing == ()


def test_a_planned_batch_is_not_a_measured_one(tmp_path: Path) -> None:
    card = one_card(tmp_path, planned(2), evaluated("one", 2.05))
    (batch,) = (fact for fact in card.gained if fact.what == "largest batch")
    assert batch.value == "8 → 32"
    assert batch.note.startswith("planned, not measured")
    assert "largest batch" in card.missing


def test_a_teacher_that_does_not_copy_has_no_recall_to_lose(tmp_path: Path) -> None:
    teacher = {**TEACHER, "copy_gain": {"16": 0.1}}
    card = one_card(tmp_path, planned(2), evaluated("one", 2.05, teacher=teacher, copy_gain={"16": -3.0}))
    assert card.outcome == "ship"
    assert "recall" not in card.missing
    assert any(fact.value == "nothing to lose" for fact in card.lost)


def test_a_student_without_a_gate_is_held_to_the_default_one(tmp_path: Path) -> None:
    teacher = {**TEACHER, "last_word": 0.4}
    kept = {"copy_gain": {"16": 3.9, "64": 1.9, "128": 0.1}, "teacher": teacher}
    holds = one_card(tmp_path / "holds", planned(2), evaluated("one", 2.05, **kept, last_word=0.35))
    assert (holds.outcome, holds.gated) == ("ship", "Default gate")
    assert [words.partition(":")[0] for words, _ in holds.gate] == [
        "loss<=teacher+0.1", "copy_gain@16>=0.8*teacher", "copy_gain@64>=0.8*teacher", "last_word>=0.8*teacher",
    ]  # fmt: skip
    assert {fact.what: fact.value for fact in holds.lost}["last words"] == "35.0%"
    lost = one_card(tmp_path / "lost", planned(2), evaluated("one", 2.05, **kept, last_word=0.01))
    assert lost.outcome == "train"
    assert [words for words, passed in lost.gate if not passed] == [
        "last_word>=0.8*teacher: 0.0100 against 0.3200, missed"
    ]
    free = evaluated("one", 2.05, **kept, last_word=0.01)
    free = dataclasses.replace(free, settings={**free.settings, "gate": "none"})
    assert one_card(tmp_path / "free", planned(2), free).outcome == "ship"


def test_one_seed_that_misses_the_gate_misses_it(tmp_path: Path) -> None:
    seeds = [
        evaluated(f"seed-{seed}", 2.05, row={"kv_heads": 2, "seed": seed}, gate=gate(passed))
        for seed, passed in enumerate((True, False, True))
    ]
    assert one_card(tmp_path, planned(2), *seeds).outcome == "train"


@pytest.mark.parametrize(("more", "closing"), [(2.02, 0.015), (2.045, 0.0025)])
def test_a_longer_run_of_the_same_student_says_what_a_doubling_closes(
    tmp_path: Path, more: float, closing: float
) -> None:
    rows = [{"kv_heads": 2, "tokens": tokens, "loss_name": "kl"} for tokens in (1000, 4000)]
    other = {"kv_heads": 2, "tokens": 8000, "loss_name": "ce"}  # trained otherwise: nothing to compare with
    run = run_of(
        tmp_path,
        planned(2),
        *(evaluated(f"{row['tokens']}", loss, row=row) for row, loss in zip(rows, (2.05, more), strict=True)),
        evaluated("other", 2.0, row=other),
    )
    (study,) = run.studies
    found = {(row.training["tokens"], row.training["loss_name"]): measured(study, row, run) for row in study.rows}
    assert found[1000, "kl"].closing == pytest.approx(closing)  # two doublings
    assert found[4000, "kl"].closing == pytest.approx(closing)
    assert found[8000, "ce"].closing is None


@pytest.mark.parametrize("tokens", [0, 1001, "many", None])
def test_a_run_of_no_other_length_says_nothing_about_more_training(tmp_path: Path, tokens: object) -> None:
    rows = [{"kv_heads": 2, "tokens": each, "loss_name": "kl"} for each in (1000, tokens)]
    run = run_of(tmp_path, planned(2), *(evaluated(str(row["tokens"]), 2.05, row=row) for row in rows))
    assert {measured(study, row, run).closing for study in run.studies for row in study.rows} == {None}


def test_a_negative_alpha_is_no_amount_of_training(tmp_path: Path) -> None:
    rows = [{"kv_heads": 2, "alpha": alpha} for alpha in (-0.05, 0.05)]
    run = run_of(tmp_path, planned(2), *(evaluated(str(row["alpha"]), 2.05, row=row) for row in rows))
    assert {measured(study, row, run).closing for study in run.studies for row in study.rows} == {None}


def test_tokens_that_a_recipe_wrote_as_words_are_those_of_the_lineage(tmp_path: Path) -> None:
    students = [
        evaluated(
            words,
            loss,
            row={"kv_heads": 2, "tokens": words},
            made_by=[{"stage": "uptrain", "tokens": tokens, "seconds": 1}],
        )
        for words, tokens, loss in (("1k", 1000, 2.05), ("2k", 2000, 2.04))
    ]
    run = run_of(tmp_path, planned(2), *students)
    (study,) = run.studies
    assert [measured(study, row, run).closing for row in study.rows] == [pytest.approx(0.01)] * 2


@pytest.mark.parametrize(("lines", "closing"), [(100, 0.5), (20, None)])
def test_a_training_log_says_what_its_second_half_closed(tmp_path: Path, lines: int, closing: float | None) -> None:
    steps = [{"stage": "convert", "settings": {"method": "gqa", "kv_heads": 2}, "source": "hash of teacher"}]
    steps += [{"stage": "uptrain", "settings": {"loss": "kl"}, "source": "x", "tokens": 1000, "seed": 0}]
    root = {"hash": "hash of teacher", "name": "made-up", "parameters": 1}
    folder = tmp_path / "uptrained"
    folder.mkdir()
    (folder / "kvfold.json").write_text(
        json.dumps({"format": 1, "inputs": "", "hash": "hash of one", "root": root, "steps": steps})
    )
    (folder / "config.json").write_text("{}")
    log = [{"tokens": n * 10, "loss": 1, "kl": 1.0 if n <= 0.6 * lines else 0.5} for n in range(1, lines + 1)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    row = {"kv_heads": 2, "tokens": 1000, "loss_name": "kl"}
    run = run_of(tmp_path, planned(2), evaluated("one", 2.05, row=row))
    (study,) = run.studies
    assert measured(study, study.rows[0], run).closing == closing


# --- the page --------------------------------------------------------------------------------------------------------


def nine(folder: Path) -> Any:
    """A run of nine students whose points lie close together."""
    rows = [({"kv_heads": heads, "init": init}, init) for heads in (4, 2, 1) for init in ("mean", "first", "fit")]
    students = [
        evaluated(f"{row['kv_heads']}-{init}", 2.02 + 0.015 * n, row=row, loss_fp8_cache=2.03 + 0.015 * n)
        for n, (row, init) in enumerate(rows)
    ]
    return run_of(
        folder, *(planned(heads, init=init) for heads in (1, 2, 4) for init in ("mean", "first", "fit")), *students
    )


def test_the_page_opens_with_a_verdict_for_each_student(tmp_path: Path) -> None:
    run = nine(tmp_path)
    text = render(run)
    head = text.partition("<main>")[0]
    assert head.count('<article class="student') == 9
    assert summary_of(cards(run)) in head
    for line in RULE:
        assert line.replace("'", "&#39;") in head
    order = re.findall(r'<article class="student (\w+)"', head)
    assert order == sorted(order, key=list(OUTCOMES).index)
    assert {"ship", "train", "quantise"} == set(order)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], ""),
        (["train"], "1 student: train it longer."),
        (["ship", "ship", "quantise"], "3 students: 2 to ship, 1 to replace by a quantised cache."),
    ],
)
def test_the_summary_counts_verdicts(outcomes: list[Any], expected: str) -> None:
    made = [Card("x", "", key, OUTCOMES[key], "", (), (), (), "", ()) for key in outcomes]
    assert summary_of([("text", made)]) == expected


class _Labels(HTMLParser):
    """The labels of the figure for a wide page, and the hover texts of its points."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.labels: list[str] = []
        self.hovers: dict[str, str] = {}
        self._in: list[str] = []
        self._text = False
        self._title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "g":
            self._in.append(dict(attrs).get("id") or "")
        self._text, self._title = tag == "text", tag == "title"

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._in.pop()
        self._text = self._title = False

    def handle_data(self, data: str) -> None:
        here = self._in[-1] if self._in else ""
        if self._title and "-point-" in here:
            self.hovers[here] = data
        if self._text and any("scatter-for-wide-label-" in each for each in self._in):
            self.labels.append(data)


@pytest.mark.slow
def test_each_student_is_labelled_where_it_stands_and_each_mark_shows_its_numbers(tmp_path: Path) -> None:
    run = nine(tmp_path)
    found = _Labels(render(run))
    (study,) = run.studies
    names = short_names(study.everyone)
    assert sorted(found.labels) == sorted([*names, "teacher, fp8 cache"])
    wide = [hover for key, hover in found.hovers.items() if key.startswith("scatter-for-wide-point")]
    assert len(wide) == 10 + 10  # the teacher and nine students, each with its fp8 twin
    assert all(
        re.search(r"cache bytes per token: [\d,]+\nloss above the teacher’s \(nats\): \d", hover) for hover in wide
    )


@pytest.mark.slow
def test_a_mark_is_hollow_for_an_fp8_cache_and_of_one_colour_for_a_method(tmp_path: Path) -> None:
    text = render(nine(tmp_path))
    points = re.findall(r'<g id="scatter-for-wide-point-\d+"><title>(.*?)</title>(.*?)</g>\s*</g>', text, re.S)
    assert len(points) == 20
    students = [(hover, drawn) for hover, drawn in points if hover.startswith("gqa")]
    assert len({re.search(r"stroke: (var\([\w-]+\))", drawn)[1] for _, drawn in students}) == 1  # type: ignore[index]
    assert all(("fill: var(--paper)" in drawn) == ("fp8 cache" in hover) for hover, drawn in points)


def _apart(one: Box, other: Box) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize(
    "marks", [[(150, 100)] * 6, [(150 + 2 * n, 100 + n % 3) for n in range(12)], [(2, 2), (298, 198)]]
)
def test_labels_cover_neither_one_another_nor_marks_and_stay_in_the_frame(marks: list[tuple[float, float]]) -> None:
    frame = (0.0, 0.0, 300.0, 200.0)
    avoided = [(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    boxes = place(marks, [(70.0, 10.0)] * len(marks), avoided, frame)
    assert len(boxes) == len(marks)
    for number, box in enumerate(boxes):
        assert box is not None
        assert box[2] - box[0] == pytest.approx(70)
        assert min(box[:2]) >= 0
        assert box[2] <= 300
        assert box[3] <= 200
        assert all(_apart(box, other) for other in [*boxes[:number], *avoided] if other is not None)


def test_a_label_without_room_is_left_out() -> None:
    assert place([(50, 50)], [(200.0, 10.0)], [], (0.0, 0.0, 100.0, 100.0)) == [None]


def test_a_line_leads_to_a_label_that_is_far_away() -> None:
    assert leader((0, 0), (5, -5, 60, 5)) is None
    assert leader((0, 0), (30, 10, 90, 20)) == ((0, 0), (30, 10))


def test_the_front_is_what_no_point_beats_at_both() -> None:
    points = [Point("a", 4, 1.0), Point("b", 2, 2.0), Point("c", 3, 2.5), Point("d", 1, 3.0), Point("e", 4, 0.5)]
    assert [point.label for point in front_of(points)] == ["d", "b", "e"]


# --- short names -----------------------------------------------------------------------------------------------------


def _row(method: str = "gqa", training: Mapping[str, Any] | None = None, **settings: Any) -> Row:
    return Row("student", method, settings, training or {}, ())


def test_short_names_tell_rows_apart_with_few_settings() -> None:
    rows = [
        Row("teacher", "identity", {}, {}, ()),
        Row("control", "identity", {}, {"tokens": 600_000, "loss_name": "ce"}, ()),
        _row(kv_heads=2, init="fit"),
        _row(kv_heads=2, init="mean"),
        _row(kv_heads=1, init="mean"),
        _row("cla", share=2, after="gqa kv_heads 4"),
        _row("cla", share=2, after="gqa kv_heads 2"),
        _row("supra", preset="hybrid", window=16),
        _row("supra", preset="hybrid", window=16, features="none"),
        _row("elitekv", ratio=0.25, search="uniform", metric="weights"),
    ]
    assert short_names(rows) == [
        "teacher",
        "control",
        "gqa, kv heads 2, init fit",
        "gqa, kv heads 2, init mean",
        "gqa, kv heads 1",
        "cla, after gqa kv heads 4",
        "cla, after gqa kv heads 2",
        "supra, preset hybrid",
        "supra, features none",
        "elitekv, ratio 0.25",
    ]


def test_short_names_take_the_training_where_settings_are_alike() -> None:
    rows = [_row(training={"alpha": alpha, "loss_name": "kl"}, kv_heads=2) for alpha in (0.01, 0.05)]
    assert short_names(rows) == ["gqa, alpha 0.01", "gqa, alpha 0.05"]
    same = [_row(kv_heads=2), _row(kv_heads=2)]
    assert short_names(same) == ["gqa, kv heads 2", "gqa, kv heads 2"]  # nothing tells these apart
