"""Gates: thresholds on measured numbers. A run that misses one fails, with the numbers.

    loss<=teacher+0.05, perplexity<=1.1*teacher, copy_gain@64>=teacher-0.2, last_word>=0.9*teacher, agreement>=0.8

A row is `METRIC OP BOUND`. The bound is a number, or the same metric of the teacher or of the control, with a factor
before it and an offset after it. A metric with several values names one after `@`: a distance, a context, a number of
beams, or `TASK.METRIC` of lm-eval.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvfold.errors import SettingError, choices, did_you_mean

Reference = Literal["teacher", "control"]

ANSWERS = ("exact_match", "cer", "bleu", "rouge1", "rouge2", "rougeL")  # of an encoder-decoder
PLAIN = ("loss", "perplexity", "bits_per_byte", "kl", "agreement", "last_word", "last_word_perplexity")
KEYED = {
    **dict.fromkeys(("copy_loss", "copy_gain"), "a distance"),
    **dict.fromkeys(("passkey", "passkey_loss"), "a context"),
    "lm_eval": "TASK.METRIC",
    **dict.fromkeys(ANSWERS, "a number of beams"),
}
MEASURED_BY = {  # metric -> the setting that has it measured; the others always are
    **dict.fromkeys(("last_word", "last_word_perplexity"), "last_words"),
    **dict.fromkeys(("copy_loss", "copy_gain"), "copy_distances"),
    **dict.fromkeys(("passkey", "passkey_loss"), "passkey_contexts"),
    "lm_eval": "lm_eval",
    **dict.fromkeys(ANSWERS, "beams"),
}
OF_THE_PAIR = ("kl", "agreement")  # measured between student and teacher: the teacher alone has none

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_ROW = re.compile(r"(?P<metric>\w+)(?:@(?P<key>[^\s<>=@]+))?\s*(?P<op><=|>=|<|>)\s*(?P<bound>[^<>=]+)")
_NAMED = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?P<who>[A-Za-z_]+)(?:\s*(?P<sign>[+-])\s*(?P<offset>{_NUMBER}))?"
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
    reference: Reference | None
    offset: float

    @property
    def needs_teacher(self) -> bool:
        """Is this row measured against the teacher, or by it?"""
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


def parse(gate: str | None) -> tuple[Threshold, ...]:
    """Read a gate. Raises SettingError for a row that is not one, an unknown metric, or a key that is missing."""
    rows = [row.strip() for row in (gate or "").split(",")]
    if gate is not None and not all(rows):
        raise SettingError("a row is empty", where="gate", got=repr(gate), allowed=_SHAPE)
    return tuple(_parse_row(row) for row in rows if row)


def _parse_row(text: str) -> Threshold:
    found = _ROW.fullmatch(text)
    if found is None:
        raise SettingError(f"cannot read {text!r}", where="gate", allowed=_SHAPE)
    metric, key = found["metric"], found["key"]
    if metric not in PLAIN and metric not in KEYED:
        known = [*PLAIN, *(f"{name}@{what.removeprefix('a ').upper()}" for name, what in KEYED.items())]
        hint = did_you_mean(metric, [*PLAIN, *KEYED])
        raise SettingError(f"unknown metric {metric!r}", where="gate", got=text, allowed=choices(known), next=hint)
    if metric in PLAIN and key is not None:
        raise SettingError(f"{metric} has one value", where="gate", got=text, next=f"write {metric} without @{key}")
    if metric in KEYED:
        _check_key(metric, key, text)
    factor, reference, offset = _parse_bound(found["bound"].strip(), metric, text)
    return Threshold(text, metric, key, found["op"], factor, reference, offset)


def _check_key(metric: str, key: str | None, text: str) -> None:
    """A key is a whole number, or TASK.METRIC."""
    if metric == "lm_eval":
        good = key is not None and all(key.rpartition(".")[::2])
        example = "lm_eval@arc_easy.acc"
    else:
        good = key is not None and re.fullmatch(r"0|[1-9]\d*", key) is not None
        example = f"{metric}@64"
    if not good:
        raise SettingError(f"{metric} needs {KEYED[metric]}", where="gate", got=text, next=f"for example {example}")


def _parse_bound(bound: str, metric: str, text: str) -> tuple[float, Reference | None, float]:
    """`1.1*teacher+0.05` -> (1.1, "teacher", 0.05); `0.8` -> (0, None, 0.8)."""
    if re.fullmatch(rf"-?{_NUMBER}", bound):
        return 0.0, None, _finite(bound, text)
    found = _NAMED.fullmatch(bound)
    if found is None:
        raise SettingError(f"cannot read the bound {bound!r}", where="gate", got=text, allowed=_SHAPE)
    who = found["who"]
    if who not in ("teacher", "control"):
        hint = did_you_mean(who, ("teacher", "control"))
        raise SettingError(
            f"unknown reference {who!r}", where="gate", got=text, allowed="teacher or control", next=hint
        )
    if who == "teacher" and metric in OF_THE_PAIR:
        raise SettingError(
            f"{metric} is the student's distance to the teacher; the teacher has none of its own",
            where="gate",
            got=text,
            next=f"compare with a number or with control, as in {metric}{'>=' if metric == 'agreement' else '<='}0.8",
        )
    offset = _finite(f"{found['sign']}{found['offset']}", text) if found["offset"] else 0.0
    reference: Reference = "teacher" if who == "teacher" else "control"
    return _finite(found["factor"] or "1", text), reference, offset


def _finite(number: str, text: str) -> float:
    """A number of a gate's row. Raises SettingError for one that no float holds."""
    value = float(number)
    if not math.isfinite(value):
        raise SettingError("a number is too large", where="gate", got=text)
    return value


def missed_line(rows: list[dict[str, Any]]) -> str:
    """The missed rows with their numbers, in one line."""
    said = []
    for row in rows:
        if not row["passed"]:
            numbers = ("not measured" if row[side] is None else f"{row[side]:.6g}" for side in ("left", "right"))
            said.append(f"{row['expr']} ({' against '.join(numbers)})")
    return "; ".join(said)
