"""What a report reads of records, lineages and logs, as schemas: what does not fit is left out, with its reason.

Keys that are not named here are not read, and may hold anything: records of newer versions stay readable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk.record import Record
from kvfold.inputs import LARGEST

Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # a figure draws it
Positive = Annotated[float, Field(gt=1e-100, le=1e100)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Natural = Annotated[int, Field(ge=1, le=LARGEST)]
Words = Annotated[str, StringConstraints(min_length=1)]
Dtype = Annotated[str, StringConstraints(pattern=f"^({'|'.join(DTYPE_BYTES)})$")]
Keyed = dict[Annotated[str, StringConstraints(pattern=r"^\d{1,12}$")], Number | None]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Found(_Part):
    """What a conversion found at one site."""

    lossless: list[Any] | None = None
    lost: list[Number] | Number | None = None
    planes: Annotated[list[list[Count]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Found:
        if self.planes is not None and not isinstance(self.lost, int | float):
            raise ValueError("planes without what is lost")
        if self.lossless and not isinstance(self.lost, list):
            raise ValueError("lossless groups without all groups")
        return self


class _Mix(_Part):
    kv_heads: Any
    kl: Number


class _Layout(_Part):
    layout: Any
    kl: Number


class _Findings(_Part):
    sites: dict[str, _Found] | None = None
    budget: Number | None = None
    mix: _Mix | None = None
    uniform: _Mix | None = None
    chosen: _Layout | None = None
    alike: _Layout | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Findings:
        pairs = ((self.mix, self.uniform), (self.chosen, self.alike))
        if any(one is not None and (other is None or self.budget is None) for one, other in pairs):
            raise ValueError("a choice without its budget and what it is compared with")
        return self


class _Step(_Part):
    """One step of a lineage, or of what a record says of one."""

    stage: str
    settings: dict[str, Any] | None = None
    tokens: Count | None = None
    seed: Any = None
    found: _Findings | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Step:
        method = (self.settings or {}).get("method", "")
        if self.stage == "convert" and (self.settings is None or not isinstance(method, str)):
            raise ValueError("a conversion without its settings")
        return self


class _LineageStep(_Step):
    settings: dict[str, Any]
    source: str | None


class _Root(_Part):
    name: str
    hash: str
    parameters: Count


class _Lineage(_Part):
    hash: str
    root: _Root
    steps: list[_LineageStep]


class _Measured(_Part):
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
    exact_match: Keyed | None = None
    cer: Keyed | None = None
    bleu: Keyed | None = None
    rougeL: Keyed | None = None
    lm_eval: dict[str, dict[str, Any]] | None = None


class _GateRow(_Part):
    expr: str
    left: Number | None
    right: Number | None
    passed: bool


class _Gate(_Part):
    rows: list[_GateRow]


class _Sample(_Part):
    prompt: str
    student: str
    teacher: str = ""


class _Metrics(_Part):
    """What is shown of every kind of record."""

    gate: _Gate | None = None


class _Evaluation(_Measured, _Metrics):
    teacher: _Measured | None = None
    without: dict[str, _Measured] | None = None
    made_by: list[_Step] | None = None
    samples: list[_Sample] | None = None


class _RowSettings(_Part):
    role: str | None = None
    method: str | None = None
    alpha: Number | None = None
    tokens: Count | str | None = None


class _EvaluationSettings(_Part):
    row: _RowSettings | None = None
    tokens: Count | None = None


class _BenchRow(_Part):
    model: str
    cache: str
    context: Natural
    batch: Natural
    cache_bytes: Count
    predicted_cache_bytes: Natural | None = None
    prefill_s: Number
    decode_s_per_token: Positive


class _Largest(_Part):
    model: str
    context: Natural
    batch: Natural
    memory: Natural
    tokens_per_s: Positive


class _Bench(_Metrics):
    rows: Annotated[list[_BenchRow], Field(min_length=1)]
    largest: list[_Largest] | None = None
    notes: list[str] | None = None


class _Named(_Part):
    name: str


class _Engine(_Part):
    name: str
    loads: bool


class _Side(_Part):
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


METRICS: dict[str, type[BaseModel]] = {"evaluate": _Evaluation, "bench": _Bench, "plan": _Plan}


def record_fault(record: Record) -> str | None:
    """What of a record cannot be shown, or None."""
    fault = _fault(METRICS.get(record.kind, _Metrics), record.metrics, "metrics")
    return fault or (_fault(_EvaluationSettings, record.settings, "settings") if record.kind == "evaluate" else None)


def lineage_fault(lineage: object) -> str | None:
    """What of a lineage cannot be shown, or None."""
    return _fault(_Lineage, lineage, "lineage")


def _fault(schema: type[BaseModel], value: object, where: str) -> str | None:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join([where, *map(str, first['loc'])])}: {first['msg']}"
    return None


def log_line(line: object) -> Mapping[str, Any] | None:
    """The numbers of one line of train.jsonl that says a loss, or None."""
    if not isinstance(line, dict):
        return None
    kept = {key: value for key, value in line.items() if _is_number(value)}
    whole = "loss" in kept and isinstance(kept.get("tokens"), int) and kept["tokens"] >= 0
    return kept if whole else None


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST
    return isinstance(value, float) and math.isfinite(value) and abs(value) < 1e100
