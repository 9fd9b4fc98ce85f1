"""Benchmarks: their rows, and the decode speed of students over their teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.disk.record import Record

Place = tuple[int, int]  # context and batch


def benches(records: Sequence[Record]) -> list[Record]:
    """The records of benchmarks that completed (`status` is `done`)."""
    return [record for record in records if record.kind == "bench" and record.status == "done"]


def bench_rows(record: Record, **same: Any) -> list[Mapping[str, Any]]:
    """The rows of a benchmark whose fields have these values."""
    rows = record.metrics.get("rows") or []
    return [row for row in rows if all(row.get(key) == value for key, value in same.items())]


def teacher_model(bench: Record) -> str:
    """The name of the first model of a benchmark: the teacher."""
    return str(bench.metrics["rows"][0]["model"])


def teacher_times(bench: Record) -> dict[Place, float]:
    """Seconds per token of the teacher with an unquantised cache, by (context, batch)."""
    rows = bench_rows(bench, model=teacher_model(bench), cache="native")
    return {(row["context"], row["batch"]): row["decode_s_per_token"] for row in rows}


def speedups(records: Sequence[Record], own: Sequence[Record]) -> dict[Place, float]:
    """Decode speed relative to the teacher in the same run, by (context, batch)."""
    found = {}
    for bench in benches(records):
        teacher = teacher_times(bench)
        for row in bench_rows(bench, cache="native"):
            place = (row["context"], row["batch"])
            if row["model"] != teacher_model(bench) and place in teacher and benched(bench, row["model"], own):
                found[place] = teacher[place] / row["decode_s_per_token"]
    return found


def benched(bench: Record, model: str, own: Sequence[Record]) -> bool:
    """Whether a model of a benchmark is the one that these records evaluated: by content hash, else by name."""
    hashed = bench.hashes.get(model)
    if hashed is not None and any(record.hashes.get("student") for record in own):
        return any(record.hashes.get("student") == hashed for record in own)
    return any(model in (record.name, *record.name.split("/")) for record in own)
