"""The rows that reports compare: a way to make a student, over its seeds, and the study that it belongs to."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk.record import Record

LEAST_DAMAGE = 1e-3  # nats: a conversion that costs less leaves nothing to recover
MANY = 12  # layers: a setting of as many is written by its most frequent value


@dataclass(frozen=True)
class Spread:
    """A number over seeds: mean, sample standard deviation (0 for one seed), range, count."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 4) -> str:
        """The mean, with the deviation if there are several seeds."""
        shown = f"{self.mean:.{digits}f}"
        return shown if self.count == 1 else f"{shown} ± {self.deviation:.{digits}f}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are not None; None without any."""
    found = [float(value) for value in values if value is not None]
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return Spread(statistics.fmean(found), deviation, min(found), max(found), len(found))


def number(value: object) -> float | None:
    """A metric as a finite number; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Row:
    """One way to make a student (or the teacher, or a control), over its seeds."""

    role: str  # teacher, student, control
    method: str
    settings: Mapping[str, Any]  # of the method
    training: Mapping[str, Any]  # alpha, tokens, loss_name, varied; empty without training
    records: tuple[Record, ...]
    converted: tuple[Record, ...] = ()  # of the same student before training
    cache_bytes: float | None = None  # per token
    teacher_cache_bytes: float | None = None
    teacher_loss: float | None = None
    speedups: Mapping[tuple[int, int], float] = field(default_factory=dict)  # (context, batch) -> decode, of teacher's
    gap_closed: float | None = None
    left_out: str = ""  # the part of its attention that was switched off
    cached: str = ""  # the quantised cache that it was measured with

    @property
    def trained(self) -> bool:
        """Whether it was trained after the conversion."""
        return bool(self.training)

    @property
    def group(self) -> str:
        """The method of a student, else the role."""
        return self.method if self.role == "student" else self.role

    @property
    def name(self) -> str:
        """The row in words: `gqa, kv heads 2, init mean`."""
        if self.role != "student":
            return "teacher" if self.role == "teacher" else "control: the teacher, trained further"
        return ", ".join([self.method, *map(setting_words, self.settings, self.settings.values())])

    @property
    def schooling(self) -> str:
        """Its training in words: `alpha 0.05, kl`."""
        if not self.trained:
            return "" if self.role == "teacher" else "none"
        return ", ".join(training_words(self.training).values())

    @property
    def label(self) -> str:
        """Name and training in one line, for legends."""
        words = f"{self.name}; {self.schooling}" if self.trained else self.name
        return f"{words}; without its {self.left_out}" if self.left_out else words

    @property
    def place(self) -> tuple[bool, float, str, float]:
        """What rows are sorted by: controls first, then by bytes, name, and how long they were trained."""
        alpha, tokens = self.training.get("alpha"), self.training.get("tokens")
        spent = alpha or (tokens if isinstance(tokens, int | float) else 0)
        return self.role != "control", -(self.cache_bytes or 0), self.name, float(spent)

    def metric(self, name: str) -> Spread | None:
        """A metric with one value, over seeds."""
        return spread(record.metrics.get(name) for record in self.records)

    def keyed(self, name: str) -> dict[str, Spread]:
        """A metric with a value per key (`copy_loss`, `passkey`), each over seeds, in the order of the keys."""
        found = [record.metrics.get(name) or {} for record in self.records]
        keys = sorted({str(key) for each in found for key in each}, key=lambda key: (len(key), key))
        values = {key: spread(each.get(key) for each in found) for key in keys}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def parted(self) -> list[Row]:
        """The same students, measured without each removable part of their attention."""
        parts = dict.fromkeys(part for record in self.records for part in record.metrics.get("without") or {})
        return [
            replace(
                self,
                left_out=part,
                records=tuple(
                    replace(record, metrics=record.metrics["without"][part])
                    for record in self.records
                    if part in (record.metrics.get("without") or {})
                ),
            )
            for part in parts
        ]

    @property
    def quantised(self) -> list[Row]:
        """The same model with each quantised cache that it was measured with; of older records, the loss in fp8."""
        found: dict[str, list[tuple[Record, Mapping[str, Any]]]] = {}
        for record in self.records:
            loss = record.metrics.get("loss_fp8_cache")
            older = {} if loss is None else {"fp8": {"bits": 8.0, "loss": loss}}
            for name, metrics in (record.metrics.get("quantised_cache") or older).items():
                found.setdefault(name, []).append((record, metrics))
        return [
            replace(
                self,
                cached=name,
                cache_bytes=_quantised_bytes(self.cache_bytes, *measured[0]),
                records=tuple(replace(record, metrics=metrics) for record, metrics in measured),
                speedups={},
            )
            for name, measured in found.items()
        ]

    @property
    def loss_before(self) -> Spread | None:
        """Loss after the conversion, before training."""
        before = spread(record.metrics.get("loss") for record in self.converted)
        return before if self.trained or self.role != "student" else self.metric("loss")

    @property
    def loss_lost(self) -> float | None:
        """Loss above the teacher's, in nats per token."""
        loss = self.metric("loss")
        return None if loss is None or self.teacher_loss is None else loss.mean - self.teacher_loss

    @property
    def recovered(self) -> float | None:
        """The share of the conversion's loss that training undid."""
        before, after = self.loss_before, self.metric("loss")
        if not self.trained or before is None or after is None or self.teacher_loss is None:
            return None
        damage = before.mean - self.teacher_loss
        return (before.mean - after.mean) / damage if damage > LEAST_DAMAGE else None


@dataclass(frozen=True)
class Study:
    """One teacher with its students and controls, all evaluated alike: only rows of one study are compared."""

    teacher: Row | None
    rows: tuple[Row, ...]  # controls, then students
    converted: tuple[Row, ...] = ()  # students that were also trained, as they were before

    @property
    def everyone(self) -> tuple[Row, ...]:
        """The teacher, the controls, the students."""
        return (self.teacher, *self.rows) if self.teacher else self.rows

    @property
    def students(self) -> list[Row]:
        """The rows of students."""
        return [row for row in self.rows if row.role == "student"]


def _quantised_bytes(whole: float | None, record: Record, metrics: Mapping[str, Any]) -> float | None:
    """Bytes per token of a quantised cache; None where the dtype of the cache is unknown."""
    dtype = ((record.metrics.get("cache") or {}).get("student") or {}).get("dtype")
    return whole * metrics["bits"] / (8 * DTYPE_BYTES[dtype]) if whole and dtype else None


def setting_words(key: str, value: object) -> str:
    """A setting in words: `kv heads 2`; of many layers, `kv heads 1 (3 in layers 0, 16-20)`."""
    name, layers = key.replace("_", " "), str(value).split("/")
    if len(layers) < MANY:
        return f"{name} {value}"
    usual = max(layers, key=layers.count)
    places = {other: [at for at, each in enumerate(layers) if each == other] for other in layers if other != usual}
    return f"{name} {usual} ({'; '.join(f'{other} in layers {_runs(found)}' for other, found in places.items())})"


def _runs(places: Sequence[int]) -> str:
    """Numbers as people write them: `0, 16-20`."""
    words = []
    for _, group in itertools.groupby(enumerate(places), key=lambda each: each[1] - each[0]):
        run = [place for _, place in group]
        words.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(words)


def training_words(training: Mapping[str, Any]) -> dict[str, str]:
    """What a row knows of its training, in words by key."""
    found = {}
    if training.get("alpha") is not None:
        found["alpha"] = f"alpha {training['alpha']:g}"
    if training.get("tokens") is not None:
        count = training["tokens"]
        found["tokens"] = f"{count if isinstance(count, str) else compact(count)} tokens"
    return found | {key: str(training[key]) for key in ("loss_name", "varied") if training.get(key)}


def compact(number: float) -> str:
    """A count for people: `192k`, `20M`."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:g}"
