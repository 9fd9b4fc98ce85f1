"""The cards at the head of the page: the verdict on each student, what was lost, what was gained, and its gate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk.record import Record
from kvfold.evaluate.gate import COPIES, KNOWS, NONE, judge_default
from kvfold.formats import size
from kvfold.report.benches import benched, benches
from kvfold.report.folder import Run
from kvfold.report.names import short_names
from kvfold.report.rows import Row, Spread, Study, number, spread
from kvfold.report.studies import plan_of
from kvfold.report.tables import percent
from kvfold.report.verdict import OUTCOMES, Measured, Outcome, verdict

TASKS = 4  # scores that a card shows
_SUMMARY: Mapping[Outcome, str] = {
    "ship": "to ship",
    "train": "to train longer",
    "quantise": "to replace by a quantised cache",
    "measure": "to measure first",
}
PLANNED = "planned, not measured"
_ANSWERS = ("exact_match", "f1", "cer", "bleu", "rougeL")  # of encoder-decoders, in the order that a card prefers them
_APART = 0.25  # doublings: runs whose tokens differ by less say little about more tokens
_LOG_LINES = 40  # a log with fewer lines is too short to read a trend from


@dataclass(frozen=True)
class Fact:
    """One number of a card, with its name and what it is compared with."""

    what: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """The verdict on a student, with the numbers that it depends on."""

    name: str
    settings: str
    outcome: Outcome
    words: str
    reason: str
    lost: tuple[Fact, ...]
    gained: tuple[Fact, ...]
    gate: tuple[tuple[str, bool], ...]  # its rows in words, and whether each holds
    gated: str  # whose gate that is: the recipe's, or the default
    missing: tuple[str, ...]


def cards(run: Run) -> list[tuple[str, list[Card]]]:
    """The students of each study by the text of their evaluation, those to ship first."""
    found = []
    for study in run.studies:
        students = [
            _card(study, row, name, run)
            for row, name in zip(study.everyone, short_names(study.everyone), strict=True)
            if row.group not in ("teacher", "control", "identity")
        ]
        if students:
            data = str(study.everyone[0].records[0].settings.get("data") or "")
            found.append((data, sorted(students, key=lambda card: list(OUTCOMES).index(card.outcome))))
    return found


def summary_of(found: Sequence[tuple[str, Sequence[Card]]]) -> str:
    """The number of students with each verdict, in a sentence."""
    outcomes = [card.outcome for _, students in found for card in students]
    counts = [f"{outcomes.count(key)} {_SUMMARY[key]}" for key in OUTCOMES if key in outcomes]
    if len(outcomes) < 2:
        return f"1 student: {OUTCOMES[outcomes[0]].lower()}." if outcomes else ""
    return f"{len(outcomes)} students: {', '.join(counts)}."


def _card(study: Study, row: Row, name: str, run: Run) -> Card:
    found = verdict(measured(study, row, run))
    lost = (*_loss(row), *_recall(study, row), *_tasks(study, row))
    gained = (*_bytes(row), *_speed(row), *_largest(row, run.records))
    facts = {fact.what for fact in (*lost, *gained) if not fact.note.startswith(PLANNED)}
    facts |= {"tasks"} if any(_scores(each) for each in row.records) else set()
    unmeasured = [what for what in ("recall", "tasks", "decode speed", "largest batch") if what not in facts]
    rows, gated = _gate_rows(row), "Gate"
    if not rows and _limited(row):
        rows, gated = default_gate(study, row), "Default gate"
    gate = tuple((f"{each['expr']}: {_against(each)}", bool(each["passed"])) for each in rows)
    return Card(
        name=name,
        settings=settings_of(row),
        outcome=found.outcome,
        words=OUTCOMES[found.outcome],
        reason=found.reason,
        lost=lost,
        gained=gained,
        gate=tuple(dict.fromkeys(gate)),
        gated=gated,
        missing=tuple(dict.fromkeys((*found.missing, *unmeasured))),
    )


def settings_of(row: Row) -> str:
    """Every setting of a row, its training, and its seeds."""
    seeds = f" Mean over {len(row.records)} seeds." if len(row.records) > 1 else ""
    return f"{row.name}. Training: {row.schooling}.{seeds}"


def _gate_rows(row: Row) -> list[dict[str, Any]]:
    return [each for record in row.records for each in (record.metrics.get("gate") or {}).get("rows", [])]


def _limited(row: Row) -> bool:
    """Whether the default gate applies."""
    return any(record.settings.get("gate") != NONE for record in row.records)


def default_gate(study: Study, row: Row) -> list[dict[str, Any]]:
    """The default gate, judged on means over seeds."""
    own, theirs = (
        {
            **{name: value.mean for name in ("loss", "last_word") if (value := each.metric(name))},
            "copy_gain": {key: value.mean for key, value in each.keyed("copy_gain").items()},
        }
        for each in (row, study.teacher or row)
    )
    return judge_default(own, theirs) if study.teacher else []


def _against(row: Mapping[str, Any]) -> str:
    sides = ("not measured" if row[side] is None else f"{row[side]:.4f}" for side in ("left", "right"))
    return f"{' against '.join(sides)}, {'holds' if row['passed'] else 'missed'}"


# --- what the verdict depends on -------------------------------------------------------------------------------------


def measured(study: Study, row: Row, run: Run) -> Measured:
    """What the verdict depends on, from the records and the training log of a student."""
    loss, itemsize = row.metric("loss"), cache_itemsize(run.records)
    fp8_loss = study.teacher.metric("loss_fp8_cache") if study.teacher else None
    gates = [each["passed"] for each in _gate_rows(row)]
    kept = _recall_kept(study, row)
    teacher_bytes = row.teacher_cache_bytes or (study.teacher.cache_bytes if study.teacher else None)
    return Measured(
        loss=loss.mean if loss else None,
        teacher_loss=row.teacher_loss,
        cache_bytes=row.cache_bytes,
        teacher_bytes=teacher_bytes,
        fp8_bytes=teacher_bytes / itemsize if teacher_bytes and itemsize else None,
        fp8_loss=fp8_loss.mean if fp8_loss else None,
        gate=all(gates) if gates else None,
        limited=_limited(row),
        recall_kept=None if kept is None else min((share for share, _, _, _ in kept), default=1.0),
        words_kept=_words_kept(study, row),
        trained=row.trained,
        closing=_closing(study, row, run),
    )


def cache_itemsize(records: Sequence[Record]) -> int | None:
    """Bytes of a cached number, by the plans, else by the evaluations; None where they differ."""
    planned = {str(record.metrics["dtype"]) for record in records if record.kind == "plan" and record.metrics}
    caches = [each for record in records for each in (record.metrics.get("cache") or {}).values() if each]
    formats = planned or {str(each.get("dtype")) for each in caches}
    return DTYPE_BYTES.get(formats.pop()) if len(formats) == 1 else None


def _recall_kept(study: Study, row: Row) -> list[tuple[float, str, float, float]] | None:
    """For each distance at which the teacher copies: the share of its copy gain that is left, and both gains."""
    own, theirs = row.keyed("copy_gain"), study.teacher.keyed("copy_gain") if study.teacher else {}
    shared = [key for key in own if key in theirs]
    if not shared:
        return None
    pairs = [(key, own[key].mean, theirs[key].mean) for key in shared if theirs[key].mean >= COPIES]
    return [(gain / teacher, key, gain, teacher) for key, gain, teacher in pairs]


def _words_kept(study: Study, row: Row) -> float | None:
    """The share of the teacher's accuracy on last words that is left; None where it has none to lose."""
    own, theirs = row.metric("last_word"), study.teacher.metric("last_word") if study.teacher else None
    return own.mean / theirs.mean if own and theirs and theirs.mean >= KNOWS else None


def _closing(study: Study, row: Row, run: Run) -> float | None:
    """Nats that a doubling of the training tokens closes: by the same student with more, else fewer tokens.

    Without another, by the second half of its training log.
    """
    loss, (unit, own) = row.metric("loss"), spent(row)
    if not row.trained or loss is None:
        return None
    pairs = []
    for other in study.rows:
        other_loss, (other_unit, other_spent) = other.metric("loss"), spent(other)
        if other_loss is None or unit != other_unit or min(own, other_spent) <= 0:
            continue
        doublings = math.log2(other_spent) - math.log2(own)
        if abs(doublings) >= _APART and _same_but_for_tokens(row, other):
            pairs.append((doublings < 0, abs(doublings), (loss.mean - other_loss.mean) / doublings))
    if pairs:
        return min(pairs)[2]
    logged = [found for record in row.records if (found := _closed_in_log(record, run)) is not None]
    return statistics.fmean(logged) if logged else None


def spent(row: Row) -> tuple[str, float]:
    """The training of a row: the tokens of its lineage, else its alpha, else its tokens; 0 if that is no number."""
    for record in row.records:
        steps = record.metrics.get("made_by") or ()
        if tokens := sum(step.get("tokens") or 0 for step in steps if step["stage"] == "uptrain"):
            return "tokens", float(tokens)
    unit = "alpha" if row.training.get("alpha") else "tokens"
    known = row.training.get(unit)
    return unit, float(known) if isinstance(known, int | float) else 0.0


def _same_but_for_tokens(row: Row, other: Row) -> bool:
    def rest(each: Row) -> list[Any]:
        known = {key: value for key, value in each.training.items() if key not in ("alpha", "tokens")}
        return [each.role, each.method, dict(each.settings), known, "alpha" in each.training]

    return other.trained and rest(row) == rest(other)


def _closed_in_log(record: Record, run: Run) -> float | None:
    """How much the KL (else the cross-entropy) falls in the second half of a training log, between means of a tenth."""
    name = next((each.name for each in run.checkpoints if each.lineage["hash"] == record.hashes.get("student")), None)
    lines = run.logs.get(name or "", ())
    part = next((part for part in ("kl", "ce") if any(part in line for line in lines)), None)
    points = [(line["tokens"], float(line[part])) for line in lines if part and isinstance(line.get(part), int | float)]
    if len(points) < _LOG_LINES:
        return None
    end = points[-1][0]
    half, last = (
        [value for tokens, value in points if low * end <= tokens <= high * end]
        for low, high in ((0.45, 0.55), (0.9, 1.0))
    )
    return statistics.fmean(half) - statistics.fmean(last) if half and last else None


# --- what was lost ---------------------------------------------------------------------------------------------------


def _loss(row: Row) -> Iterator[Fact]:
    loss, before = row.metric("loss"), row.loss_before
    if loss is None:
        return
    value = loss.text() if row.loss_lost is None else f"{row.loss_lost:+.4f} nats"
    notes = [] if row.loss_lost is None else [f"{row.teacher_loss:.4f} → {loss.text()} per token"]
    notes += [f"{before.mean:.4f} before training"] if before and row.trained else []
    yield Fact("loss", value, "; ".join(notes))


def _recall(study: Study, row: Row) -> Iterator[Fact]:
    kept = _recall_kept(study, row)
    if kept:
        share, distance, gain, teacher = min(kept)
        note = f"{gain:.2f} nats over {int(distance):,} tokens, teacher {teacher:.2f}"
        yield Fact("recall", f"{share:.0%} of the teacher’s copy gain", note)
    elif kept is not None:
        yield Fact("recall", "nothing to lose", f"the teacher’s copy gain is below {COPIES:g} nats at every distance")
    words, theirs = row.metric("last_word"), study.teacher.metric("last_word") if study.teacher else None
    if words:
        yield Fact("last words", percent(words), f"teacher {percent(theirs)}" if theirs else "")


def _scores(record: Record) -> list[tuple[str, str]]:
    """The scores of tasks that a record has, as (metric, key)."""
    found = [(name, "") for name in _ANSWERS if record.metrics.get(name)]
    for task, results in sorted((record.metrics.get("lm_eval") or {}).items()):
        names = [name for name in ("acc", *sorted(results)) if number(results.get(name)) is not None]
        found += [(task, names[0])] if names else []
    return found


def _tasks(study: Study, row: Row) -> Iterator[Fact]:
    shown = list(dict.fromkeys(each for record in row.records for each in _scores(record)))
    for task, name in shown[:TASKS]:
        own, theirs = (_score(each, task, name) for each in (row, study.teacher))
        note = f"teacher {theirs.text(3)}" if theirs else ""
        if own:
            yield Fact(f"{task} {name}".strip().replace("_", " "), own.text(3), note)


def _score(row: Row | None, task: str, name: str) -> Spread | None:
    if row is None:
        return None
    if not name:
        return next(iter(row.keyed(task).values()), None)  # fewest beams
    found = [(record.metrics.get("lm_eval") or {}).get(task) or {} for record in row.records]
    return spread(number(each.get(name)) for each in found)


# --- what was gained -------------------------------------------------------------------------------------------------


def _bytes(row: Row) -> Iterator[Fact]:
    if row.cache_bytes and row.teacher_cache_bytes:
        note = f"{row.teacher_cache_bytes:,.0f} → {row.cache_bytes:,.0f} bytes per token"
        yield Fact("cache", f"{100 * row.cache_bytes / row.teacher_cache_bytes:.3g}% of the teacher’s", note)


def _speed(row: Row) -> Iterator[Fact]:
    place = max(row.speedups, default=None)
    if place is not None:
        note = f"context {place[0]:,} × batch {place[1]}"
        yield Fact("decode speed", f"{row.speedups[place]:.2f}× the teacher’s", note)


def _largest(row: Row, records: Sequence[Record]) -> Iterator[Fact]:
    """The largest batch in a given memory: as benchmarked, else as planned."""
    own = (*row.records, *row.converted)
    for bench in benches(records):
        rows = bench.metrics.get("largest") or []
        mine = [each for each in rows if benched(bench, each["model"], own)]
        for each in sorted(mine, key=lambda each: -each["context"])[:1]:
            teacher = [
                other["batch"]
                for other in rows
                if other["model"] == rows[0]["model"] and other["context"] == each["context"]
            ]
            value = f"{teacher[0]:,} → {each['batch']:,}" if teacher else f"{each['batch']:,}"
            yield Fact("largest batch", value, f"in {size(each['memory'])}, context {each['context']:,}")
            return
    plan = plan_of(records, {"method": row.method, **row.settings})
    if plan is not None:
        before, after = (plan.metrics[side]["largest_batch"] for side in ("before", "after"))
        where = f"context {plan.metrics['context']:,} on {plan.metrics['hardware']['name']}"
        yield Fact("largest batch", f"{before:,} → {after:,}", f"{PLANNED}: {where}")
