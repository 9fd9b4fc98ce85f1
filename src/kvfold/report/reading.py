"""The schemas of what a report reads of records and logs: what does not fit is left out, with the reason.

Keys without a field are not read, and may hold anything: records of newer versions stay readable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk.manifest import Count, Number, Part, Step, fault
from kvfold.disk.record import Record
from kvfold.inputs import LARGEST

Positive = Annotated[float, Field(gt=1e-100, le=1e100)]
Natural = Annotated[int, Field(ge=1, le=LARGEST)]
Words = Annotated[str, StringConstraints(min_length=1)]
Dtype = Annotated[str, StringConstraints(pattern=f"^({'|'.join(DTYPE_BYTES)})$")]
Keyed = dict[Annotated[str, StringConstraints(pattern=r"^\d{1,12}$")], Number | None]


class _Measured(Part):
    """Metrics of one model."""

    loss: Number | None = None
    teacher_loss: Number | None = None
    perplexity: float | None = None
    kl: Number | None = None
    agreement: Number | None = None
    loss_fp8_cache: Number | None = None
    copy_loss: Keyed | None = None
    copy_gain: Keyed | None = None
    passkey: Keyed | None = None
    passkey_loss: Keyed | None = None
    last_word: Number | None = None
    last_word_stderr: Number | None = None
    exact_match: Keyed | None = None
    f1: Keyed | None = None
    seconds_per_answer: dict[str, Number] | None = None
    passage_cache_bytes: dict[str, Number] | None = None
    cer: Keyed | None = None
    bleu: Keyed | None = None
    rougeL: Keyed | None = None
    lm_eval: dict[str, dict[str, Any]] | None = None


class _GateRow(Part):
    expr: str
    left: Number | None
    right: Number | None
    passed: bool


class _Gate(Part):
    rows: list[_GateRow]


class _Sample(Part):
    prompt: str
    student: str
    teacher: str = ""


class _Cached(Part):
    """What a model caches."""

    dtype: Dtype | None = None
    bytes_per_token: Positive


class _Metrics(Part):
    """Metrics of every kind of record."""

    gate: _Gate | None = None


class _Quantised(_Measured):
    """A model over a quantised cache."""

    bits: Positive


class _Evaluation(_Measured, _Metrics):
    teacher: _Measured | None = None
    quantised_cache: dict[str, _Quantised] | None = None
    without: dict[str, _Measured] | None = None
    made_by: list[Step] | None = None
    samples: list[_Sample] | None = None
    cache: dict[str, _Cached] | None = None


class _RowSettings(Part):
    role: str | None = None
    method: str | None = None
    alpha: Number | None = None
    tokens: Count | str | None = None


class _EvaluationSettings(Part):
    row: _RowSettings | None = None
    tokens: Count | None = None


class _BenchRow(Part):
    model: str
    cache: str
    context: Natural
    batch: Natural
    cache_bytes: Count
    predicted_cache_bytes: Natural | None = None
    prefill_s: Number
    decode_s_per_token: Positive


class _Largest(Part):
    model: str
    context: Natural
    batch: Natural
    memory: Natural
    tokens_per_s: Positive


class _Bench(_Metrics):
    rows: Annotated[list[_BenchRow], Field(min_length=1)]
    largest: list[_Largest] | None = None
    notes: list[str] | None = None


class _Named(Part):
    name: str


class _Engine(Part):
    name: str
    loads: bool


class _Side(Part):
    kv_heads: Any
    parameters: Count
    cache_bytes_per_token: Count
    cache_bytes: Natural
    largest_batch: Count


class _Plan(_Metrics):
    method: str
    settings: dict[str, Any]
    context: Natural
    batch: Natural
    dtype: Dtype
    tensor_parallel: Natural
    hardware: _Named
    before: _Side
    after: _Side
    engines: list[_Engine]
    warnings: list[Words]
    speedup: Number


Numbers = Annotated[list[Number], Field(min_length=1)]
Table = Annotated[list[Numbers], Field(min_length=1)]
Triple = Annotated[list[Number], Field(min_length=3, max_length=3)]
ByHeads = dict[Annotated[str, StringConstraints(pattern=r"^\d{1,6}$")], Number]


class _Inspected(Part):
    """The key/value heads of a layer, in order."""

    layer: Count
    heads: Natural
    fewest: Natural | None = None
    kl: Numbers | None = None
    rise: Numbers | None = None
    fold_kl: ByHeads | None = None
    fold_rise: ByHeads | None = None
    entropy: Numbers
    distance: Numbers
    sink: Numbers
    local: Numbers
    far: Numbers
    induction: Numbers
    key_rank: Numbers
    value_rank: Numbers
    keys: Table
    values: Table
    planes: Table | None = None

    @model_validator(mode="after")
    def _check(self) -> _Inspected:
        for name, value in self:
            if isinstance(value, list) and len(value) != self.heads:
                raise ValueError(f"{name} needs a number for each of {self.heads} heads")
        return self


class _Fold(Part):
    kv_heads: Natural | Words
    cache: Positive
    kl: Number
    rise: Number


class _Inspection(_Metrics):
    tokens: Count
    layers: Annotated[list[_Inspected], Field(min_length=1)]
    duplicates: list[Triple]
    recall_heads: list[Triple] | None = None
    predicted: dict[str, _Fold] | None = None
    uniform: _Fold | None = None
    mix: _Fold | None = None
    copying: list[Count] | None = None


class _ComparedRow(_Measured, _Metrics):
    loss: Number
    kl: Number
    weight_bytes: Natural
    cache_bytes_per_token: Positive
    training_tokens: Count


class _ComparedTime(Part):
    model: str
    context: Natural
    batch: Natural
    prefill_s: Positive
    decode_s_per_token: Positive


class _Comparison(_Metrics):
    rows: Annotated[list[_ComparedTime], Field(min_length=1)]
    peaks: dict[str, Natural]


class _ShownRow(Part):
    name: Words
    group: Words
    about: str


class _ComparedRowSettings(Part):
    row: _ShownRow


class _ComparisonSettings(Part):
    rows: list[str]


METRICS: dict[str, type[Part]] = {
    "evaluate": _Evaluation,
    "bench": _Bench,
    "plan": _Plan,
    "inspect": _Inspection,
    "compare-row": _ComparedRow,
    "compare": _Comparison,
}
SETTINGS: dict[str, type[Part]] = {
    "evaluate": _EvaluationSettings,
    "compare-row": _ComparedRowSettings,
    "compare": _ComparisonSettings,
}


def record_fault(record: Record) -> str | None:
    """Why a record cannot be shown; None if it can."""
    if wrong := fault(METRICS.get(record.kind, _Metrics), record.metrics):
        return f"metrics.{wrong}"
    return settings_fault(record)


def settings_fault(record: Record) -> str | None:
    """Why the settings of a record, of a failure too, cannot be shown; None if they can."""
    wrong = fault(SETTINGS.get(record.kind, Part), record.settings)
    return wrong and f"settings.{wrong}"


def log_line(line: object) -> Mapping[str, Any] | None:
    """The numbers in one line of train.jsonl; None for a line without a loss."""
    if not isinstance(line, dict):
        return None
    kept = {key: value for key, value in line.items() if _is_number(value)}
    whole = "loss" in kept and isinstance(kept.get("tokens"), int) and kept["tokens"] >= 0
    return kept if whole else None


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST
    return isinstance(value, float) and math.isfinite(value) and abs(value) < 1e100
