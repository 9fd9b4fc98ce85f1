"""From records to studies: which numbers belong to one row, and what they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvfold.disk.output import fingerprint
from kvfold.disk.record import Record
from kvfold.methods import all_methods
from kvfold.report.benches import speedups
from kvfold.report.rows import Row, Study

TRAINING = ("alpha", "tokens", "loss_name", "varied")  # keys of a row about its uptraining; the others are the method's
READING = ("sequence_length", "stride", "copy_trials", "passkey_trials", "lm_eval_limit", "seed", "dtype")
SEEDS = ("seed", "calibration_seed")  # what a row is repeated over


@dataclass(frozen=True)
class _Evaluation:
    """A record of an evaluation with the row that it belongs to."""

    record: Record
    row: Mapping[str, Any]

    @property
    def role(self) -> str:
        return str(self.row.get("role", "student"))

    @property
    def method(self) -> str:
        return str(self.row.get("method", "?"))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the method."""
        return {key: value for key, value in self.row.items() if key not in (*TRAINING, *SEEDS, "role", "method")}

    @property
    def training(self) -> dict[str, Any]:
        """The training; empty without any."""
        found = {key: self.row[key] for key in TRAINING if self.row.get(key)}
        return found if found.get("alpha") or found.get("tokens") else {}

    @property
    def student(self) -> str:
        """What identifies a student, trained or not."""
        return fingerprint([self.role, self.method, self.settings])


def row_of(record: Record, lineages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The row of a record: as it was evaluated, else by the lineage of the checkpoint that it names."""
    if named := record.settings.get("row"):
        return dict(named)
    lineage = lineages.get(record.hashes.get("student") or "")
    if lineage is None:
        role = "teacher" if record.metrics.get("teacher_loss") is None else "student"
        return {"role": role, "method": record.name if role == "student" else "identity", "seed": record.seed}
    row: dict[str, Any] = {"role": "student", "method": "identity", "seed": record.seed}
    tokens, losses = 0, []
    for step in lineage.get("steps", []):
        settings = step.get("settings", {})
        if step.get("stage") == "convert":
            others = ("dtype", "shard_size", "repaired_by")
            row |= {key: value for key, value in settings.items() if value is not None and key not in others}
        elif step.get("stage") == "uptrain":
            tokens += step.get("tokens") or 0
            losses.append(str(settings.get("stages") or settings.get("loss")))
            row["seed"] = step.get("seed")
        elif step.get("stage") == "pretrain":
            row["role"] = "teacher"
    if tokens:
        row |= {"tokens": tokens, "loss_name": " then ".join(losses)}
        row["role"] = "control" if row["method"] == "identity" else "student"
    return row


def studies(records: Sequence[Record], lineages: Mapping[str, Mapping[str, Any]] | None = None) -> list[Study]:
    """Every study among the records, in their order. `lineages` are kvfold.json files by content hash."""
    found: dict[str, list[_Evaluation]] = {}
    for record in records:
        if record.kind == "evaluate" and record.status != "failed" and "loss" in record.metrics:
            found.setdefault(question(record), []).append(_Evaluation(record, row_of(record, lineages or {})))
    return [_study(evaluations, records) for evaluations in found.values()]


def question(record: Record) -> str:
    """What makes two evaluations comparable: the tokens, how they were read, and the teacher."""
    asked = {key: record.settings.get(key) for key in READING}
    teacher = record.hashes.get("teacher") or record.hashes.get("student")
    return fingerprint([asked, record.hashes.get("tokens"), teacher])


def _study(found: Sequence[_Evaluation], records: Sequence[Record]) -> Study:
    groups: dict[str, list[_Evaluation]] = {}
    for each in found:
        group = groups.setdefault(fingerprint([each.student, each.training]), [])
        hashed = each.record.hashes.get("student")
        if hashed is None or all(other.record.hashes.get("student") != hashed for other in group):  # runs share it
            group.append(each)
    trained = {each.student for each in found if each.training}
    made = [_row(group, found, records) for group in groups.values()]
    rows: list[Row] = []
    converted: list[Row] = []
    for row, group in zip(made, groups.values(), strict=True):
        if row.role != "teacher":
            (rows if row.trained or group[0].student not in trained else converted).append(_with_gap(row, made))
    teacher = next((row for row in made if row.role == "teacher"), None)
    return Study(
        teacher or _measured_beside(found, records),
        tuple(sorted(rows, key=lambda row: row.place)),
        tuple(sorted(converted, key=lambda row: row.place)),
    )


def _measured_beside(found: Sequence[_Evaluation], records: Sequence[Record]) -> Row | None:
    """The teacher as it was measured beside its first student, if it has no record of its own."""
    for each in found:
        if metrics := each.record.metrics.get("teacher"):
            cache = {"student": (each.record.metrics.get("cache") or {}).get("teacher")}
            own = replace(each.record, name="teacher", metrics={**metrics, "cache": cache})
            return _row([_Evaluation(own, {"role": "teacher", "method": "identity"})], found, records)
    return None


def _row(group: Sequence[_Evaluation], found: Sequence[_Evaluation], records: Sequence[Record]) -> Row:
    first, own = group[0], tuple(each.record for each in group)
    student = first.role == "student"
    teacher_bytes, own_bytes = cache_bytes(records, first.row, own)
    same = [each for each in found if each.student == first.student]  # training changes neither bytes nor seconds
    losses = [record.metrics.get("teacher_loss") for record in own]
    losses += [each.record.metrics.get("loss") for each in found if each.row.get("role") == "teacher"]
    return Row(
        role=first.role,
        method=first.method,
        settings=first.settings,
        training=first.training,
        records=own,
        converted=tuple(each.record for each in same if student and first.training and not each.training),
        cache_bytes=own_bytes if student else teacher_bytes,
        teacher_cache_bytes=teacher_bytes,
        teacher_loss=next((float(loss) for loss in losses if loss is not None), None),
        speedups=speedups(records, [each.record for each in same]) if student else {},
    )


# --- the gap ---------------------------------------------------------------------------------------------------------


def _with_gap(row: Row, everyone: Sequence[Row]) -> Row:
    """The row with the share of the published start's loss that it avoids, at the same bytes and tokens.

    If several starts are published, the best counts.
    """
    loss = row.metric("loss")
    if row.role != "student" or _is_published(row) or row.teacher_loss is None or loss is None:
        return row
    baselines = [
        other
        for other in everyone
        if _is_published(other)
        and other.method == row.method
        and other.cache_bytes == row.cache_bytes
        and (other.cache_bytes is not None or other.settings.get("kv_heads") == row.settings.get("kv_heads"))
        and all(other.training.get(key) == row.training.get(key) for key in ("alpha", "tokens"))
    ]
    alike = [other for other in baselines if other.training.get("loss_name") == row.training.get("loss_name")]
    losses = [published.mean for other in alike or baselines if (published := other.metric("loss")) is not None]
    if not losses or min(losses) <= row.teacher_loss:
        return row
    return replace(row, gap_closed=(min(losses) - loss.mean) / (min(losses) - row.teacher_loss))


def _is_published(row: Row) -> bool:
    """Whether it starts as a paper does and was not repaired: by what the conversion resolved to, if that is known."""
    steps = [step for record in row.records for step in record.metrics.get("made_by") or ()]
    known = {**row.settings, **next((step["settings"] for step in reversed(steps) if step["stage"] == "convert"), {})}
    method = all_methods().get(row.method)
    starts = method.published if method else ()
    alike = any(all(known.get(key) == value for key, value in start.items()) for start in starts)
    return row.role == "student" and alike and known.get("repair") in (None, "none", [], ())


# --- bytes -----------------------------------------------------------------------------------------------------------


def plan_of(records: Sequence[Record], row: Mapping[str, Any]) -> Record | None:
    """The plan of a row: of those that do not contradict its method and settings, the one that shares most with it.

    A setting that the row does not have is rather its default than anything else.
    """
    found: list[tuple[int, int, Record]] = []
    method = all_methods().get(str(row.get("method")))
    usual = {each.name: each.default for each in fields(method.Config)} if method else {}
    for record in records:
        if record.kind != "plan" or record.status != "done":
            continue
        known = {"method": record.metrics.get("method"), **(record.metrics.get("settings") or {})}
        shared = [key for key in known if key in row]
        same = all(known.get(key) == row.get(key) for key in ("method", "after"))
        if same and all(str(known[key]) == str(row[key]) for key in shared):
            defaults = sum(known[key] == value for key, value in usual.items() if key in known)
            found.append((len(shared), defaults, record))
    return max(found, key=lambda each: each[:2])[2] if found else None


def changed_by_training(plan: Record, row: Mapping[str, Any]) -> bool:
    """Whether a row was trained into another shape than its plan has for the conversion."""
    return bool(plan.metrics.get("trained") and (row.get("tokens") or row.get("alpha")))


def cache_bytes(
    records: Sequence[Record], row: Mapping[str, Any], own: Sequence[Record] = ()
) -> tuple[float | None, float | None]:
    """Cache bytes per token of the teacher and of the row: by its plan, else by its own evaluations.

    For a teacher or a control, any plan will do; for a student whose shape training changed, none. Of an
    encoder-decoder, bytes are those of a token written and a token read together.
    """
    plan = plan_of(records, row)
    if plan is None and row.get("role") != "student":
        plan = next((record for record in records if record.kind == "plan" and record.status == "done"), None)
    if plan is not None and not changed_by_training(plan, row):
        tokens = plan.metrics["batch"] * plan.metrics["context"]
        return plan.metrics["before"]["cache_bytes"] / tokens, plan.metrics["after"]["cache_bytes"] / tokens
    found: Mapping[str, Any] = next((record.metrics["cache"] for record in own if record.metrics.get("cache")), {})
    teacher, itself = ((found.get(who) or {}).get("bytes_per_token") for who in ("teacher", "student"))
    return (itself if teacher is None and row.get("role") == "teacher" else teacher), itself
