"""Students by their start, for pages that compare starts.

A start is an init and the roles that are repaired after it. Losses are compared only between evaluations of the same
tokens, read alike; gaps are compared between any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.contracts.site import REPAIRABLE
from kvfold.disk.record import Record
from kvfold.methods import gqa
from kvfold.report.studies import question, row_of
from kvfold.settings import decode

INITS = ("mean", "first", "random", "align", "align-norm", "fit")


@dataclass(frozen=True)
class Start:
    """What training would start from: an init, and what is repaired after it."""

    init: str
    repair: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The start as a row of a table names it."""
        repaired = f"{self.init}, {', '.join(self.repair)} repaired" if self.repair else self.init
        return f"{repaired} (default)" if self == DEFAULT else repaired

    @property
    def order(self) -> tuple[bool, int, int]:
        """The order of its row: published starts first, repaired means last."""
        return (self.init != "fit" and bool(self.repair), INITS.index(self.init), len(self.repair))


def _asked_for(init: str) -> tuple[str, ...]:
    return tuple(gqa.METHOD.repairs(gqa.Config(kv_heads=1, init=init)))  # type: ignore[arg-type]


DEFAULT = Start("fit", _asked_for("fit"))
MEAN = Start("mean")


@dataclass(frozen=True)
class _Spent:
    """Tokens of uptraining, as recipes write them."""

    tokens: int | None = None


@dataclass(frozen=True)
class Result:
    """The evaluation of a student, and what is known of how it was made."""

    record: Record
    run: str
    start: Start
    kv_heads: int
    tokens: int
    alpha: float
    loss_name: str
    loss: float
    teacher_loss: float
    reading: str  # results of one reading are comparable

    @property
    def trained(self) -> bool:
        """Was it trained after the conversion?"""
        return bool(self.tokens or self.alpha)


def results(records: Sequence[Record]) -> list[Result]:
    """The students of these records with a known init and one number of heads for all layers."""
    found = []
    for record in records:
        row = row_of(record, {}) if record.kind == "evaluate" and record.status != "failed" else {}
        row = {**_converted(record), **row}
        known = row.get("role") == "student" and row.get("init") in INITS and str(row.get("kv_heads")).isdigit()
        if not known or record.metrics.get("loss") is None or record.metrics.get("teacher_loss") is None:
            continue
        spent = decode(_Spent, {"tokens": row.get("tokens")}, record.name).tokens
        found.append(
            Result(
                record=record,
                run=record.name.partition("/")[0],
                start=Start(row["init"], _repair(record.name, row)),
                kv_heads=int(row["kv_heads"]),
                tokens=spent or 0,
                alpha=float(row.get("alpha") or 0),
                loss_name=str(row.get("loss_name") or ""),
                loss=float(record.metrics["loss"]),
                teacher_loss=float(record.metrics["teacher_loss"]),
                reading=question(record),
            )
        )
    return found


def _converted(record: Record) -> dict[str, str]:
    """The init that a recipe left to the method, as the student's lineage has it."""
    steps = record.metrics.get("made_by", ())
    settings: Mapping[str, str] = next((step["settings"] for step in reversed(steps) if step["stage"] == "convert"), {})
    return {"init": settings["init"]} if "init" in settings else {}


def _repair(name: str, row: Mapping[str, object]) -> tuple[str, ...]:
    """What was repaired: as the row says, else the label in the record's name, else what the init asks for."""
    labelled = re.search(r"_repair-([a-z-]+)", name)
    repaired = row.get("repair", labelled and labelled[1])
    if repaired is None:
        return _asked_for(str(row["init"]))
    words = re.findall("[a-z]+", str(repaired))
    return tuple(role for role in REPAIRABLE if role in words)


@dataclass(frozen=True)
class Ground:
    """Every result, and the merely mean-pooled students that gaps are held against."""

    records: Sequence[Record]
    results: Sequence[Result]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Ground:
        """The results in these records."""
        return cls(records, results(records))

    def of_run(self, run: str) -> list[Result]:
        """The students of one run."""
        return [each for each in self.results if each.run == run]

    def gap_closed(self, result: Result) -> float | None:
        """Of the loss that mean pooling alone adds to the teacher's, the part that is not there; None when unknown."""
        same = [
            other.loss
            for other in self.results
            if not other.trained and other.start == MEAN and other.kv_heads == result.kv_heads
            if other.reading == result.reading
        ]
        if not same or same[0] <= result.teacher_loss:
            return None
        return (same[0] - result.loss) / (same[0] - result.teacher_loss)

    def folds(self, teacher: str) -> dict[int, tuple[int, int]]:
        """Heads that stay -> how many times fewer, and heads of the teacher: by the evaluations of its students."""
        found = {}
        for record in (each for each in self.records if each.kind == "evaluate" and each.metrics.get("cache")):
            cache = record.metrics["cache"]
            before, after = ((cache.get(who) or {}).get("kv_heads") for who in ("teacher", "student"))
            if record.settings.get("teacher") == teacher and before and after:
                found[after] = (before // after, before)
        return found


def bare_name(text: object) -> str:
    """The name of a model or a text, without its folders."""
    return Path(str(text)).name if "/" in str(text) else str(text)
