"""Gates: thresholds on measured numbers. A run that misses one fails, with the numbers.

    loss<=teacher+0.05, perplexity<=1.1*teacher, copy_gain@64>=teacher-0.2, last_word>=0.9*teacher, agreement>=0.8

A row is `METRIC OP BOUND`. The bound is a number, or the same metric of the teacher or of the control, with a factor
before it and an offset after it. A metric with several values names one after `@`: a distance, a context, a number of
beams, or `TASK.METRIC` of lm-eval.

The default gate is on loss and recall. It fails no run: reports and runs say which of its rows a student misses.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvfold.errors import SettingError, choices, did_you_mean

METRICS: dict[str, tuple[str | None, str | None]] = {  # metric -> its key, and the setting that measures it
    **dict.fromkeys(("loss", "perplexity", "bits_per_byte", "kl", "agreement"), (None, None)),
    **dict.fromkeys(("last_word", "last_word_perplexity"), (None, "last_words")),
    **dict.fromkeys(("copy_loss", "copy_gain"), ("DISTANCE", "copy_distances")),
    **dict.fromkeys(("passkey", "passkey_loss"), ("CONTEXT", "passkey_contexts")),
    "lm_eval": ("TASK.METRIC", "lm_eval"),
    **dict.fromkeys(("exact_match", "f1", "cer", "bleu", "rouge1", "rouge2", "rougeL"), ("BEAMS", "beams")),
}
OF_THE_PAIR = ("kl", "agreement")  # measured between student and teacher: the teacher alone has none

DEFAULT, NONE = "default", "none"  # the gate where none is set, and none at all
LOSS_LIMIT = 0.1  # nats per token above the teacher's loss
RECALL_LIMIT = 0.8  # of the teacher's copy gain at a distance, and of its accuracy on last words
COPIES = 0.5  # nats: with a smaller copy gain, a teacher has no recall to lose
KNOWS = 0.1  # share of last words: a teacher that gets fewer right has none to lose

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_ROW = re.compile(
    rf"""(?P<metric>\w+)(?:@(?P<key>[^\s<>=@]+))?\s*(?P<op><=|>=|<|>)\s*
    (?:(?P<number>-?{_NUMBER})
      |(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?P<reference>[A-Za-z_]+)(?:\s*(?P<offset>[+-]\s*{_NUMBER}))?)""",
    re.VERBOSE,
)
_SHAPE = "rows such as loss<=teacher+0.05, perplexity<=1.1*teacher or agreement>=0.8, between commas"


@dataclass(frozen=True)
class Threshold:
    """One row of a gate: `metric[@key] op factor * reference + offset`; without a reference, `op offset`."""

    expr: str
    metric: str
    key: str | None
    op: str
    factor: float
    reference: str | None  # teacher or control
    offset: float

    @property
    def needs_teacher(self) -> bool:
        """Whether the row cannot be judged without a teacher."""
        return self.reference == "teacher" or self.metric in OF_THE_PAIR

    def judge(
        self, metrics: Mapping[str, Any], teacher: Mapping[str, Any] | None, control: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """`{expr, left, right, passed}`; a side that was not measured is None, and then the row is missed."""
        left = lookup(metrics, self.metric, self.key)
        right: float | None = self.offset
        if self.reference is not None:
            other = lookup((teacher if self.reference == "teacher" else control) or {}, self.metric, self.key)
            right = None if other is None else self.factor * other + self.offset
        passed = left is not None and right is not None and _OPERATORS[self.op](left, right)
        return {"expr": self.expr, "left": left, "right": right, "passed": passed}


def lookup(metrics: Mapping[str, Any], metric: str, key: str | None) -> float | None:
    """The value of `metric[@key]` in the metrics of a record; None when it was not measured."""
    value = metrics.get(metric)
    if key is not None and metric == "lm_eval":
        task, _, name = key.rpartition(".")
        value = ((value or {}).get(task) or {}).get(name)
    elif key is not None:
        value = (value or {}).get(key)
    return None if value is None else float(value)


def default(teacher: Mapping[str, Any]) -> tuple[Threshold, ...]:
    """The default gate, by the metrics of a teacher: its loss, and its recall where it has any."""
    gains: Mapping[str, float | None] = teacher.get("copy_gain") or {}
    rows = [f"loss<=teacher+{LOSS_LIMIT:g}"]
    rows += [f"copy_gain@{key}>={RECALL_LIMIT:g}*teacher" for key, gain in gains.items() if (gain or 0) >= COPIES]
    rows += [f"last_word>={RECALL_LIMIT:g}*teacher"] if (teacher.get("last_word") or 0) >= KNOWS else []
    return parse(", ".join(rows))


def judge_default(metrics: Mapping[str, Any], teacher: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The rows of the default gate, judged: against the teacher that was measured beside, unless one is given.

    A row of what was not measured is left out.
    """
    teacher = teacher or metrics.get("teacher")
    rows = [row.judge(metrics, teacher, None) for row in default(teacher)] if teacher else []
    return [row for row in rows if row["left"] is not None]


def recorded(gate: str | None) -> str | None:
    """A gate as records have it: None for the default, as those of versions that had no default gate."""
    return {DEFAULT: None, None: NONE}.get(gate, gate)


def parse(gate: str | None) -> tuple[Threshold, ...]:
    """Read a gate. Raises SettingError for a row that is not one, an unknown metric, or a key that is missing."""
    if gate in (DEFAULT, NONE):
        return ()
    rows = [row.strip() for row in (gate or "").split(",")]
    if gate is not None and not all(rows):
        raise SettingError("a row is empty", where="gate", got=repr(gate), allowed=_SHAPE)
    return tuple(_parse_row(row) for row in rows if row)


def _parse_row(text: str) -> Threshold:
    found = _ROW.fullmatch(text)
    if found is None:
        raise SettingError(f"cannot read {text!r}", where="gate", allowed=_SHAPE)
    metric, key, reference = found["metric"], found["key"], found["reference"]
    _check_metric(metric, key, text)
    if reference not in (None, "teacher", "control"):
        hint = did_you_mean(reference, ("teacher", "control"))
        raise SettingError(
            f"unknown reference {reference!r}", where="gate", got=text, allowed="teacher or control", next=hint
        )
    if reference == "teacher" and metric in OF_THE_PAIR:
        raise SettingError(
            f"{metric} is the student's distance to the teacher; the teacher has none of its own",
            where="gate",
            got=text,
            next=f"compare with a number or with control, as in {metric}{'>=' if metric == 'agreement' else '<='}0.8",
        )
    factor = float(found["factor"] or 1)
    offset = float((found["number"] or found["offset"] or "0").replace(" ", ""))
    if not math.isfinite(factor) or not math.isfinite(offset):
        raise SettingError("a number is too large", where="gate", got=text)
    return Threshold(text, metric, key, found["op"], factor, reference, offset)


def _check_metric(metric: str, key: str | None, text: str) -> None:
    """Refuse an unknown metric, and a key that is missing, not expected, or not what the metric has."""
    if metric not in METRICS:
        known = [name if what is None else f"{name}@{what}" for name, (what, _) in METRICS.items()]
        hint = did_you_mean(metric, METRICS)
        raise SettingError(f"unknown metric {metric!r}", where="gate", got=text, allowed=choices(known), next=hint)
    what, _ = METRICS[metric]
    if what is None and key is not None:
        raise SettingError(f"{metric} has one value", where="gate", got=text, next=f"write {metric} without @{key}")
    if metric == "lm_eval":
        good, example = all((key or "").rpartition(".")[::2]), "lm_eval@arc_easy.acc"
    else:
        good, example = what is None or re.fullmatch(r"0|[1-9]\d*", key or "") is not None, f"{metric}@64"
    if not good:
        raise SettingError(f"{metric} needs @{what}", where="gate", got=text, next=f"for example {example}")


def missed_line(rows: list[dict[str, Any]]) -> str:
    """The missed rows with their numbers, in one line."""
    missed = []
    for row in rows:
        if not row["passed"]:
            numbers = ("not measured" if row[side] is None else f"{row[side]:.6g}" for side in ("left", "right"))
            missed.append(f"{row['expr']} ({' against '.join(numbers)})")
    return "; ".join(missed)
