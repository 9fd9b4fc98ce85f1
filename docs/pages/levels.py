"""The table of uptraining on two levels beside one level of the same FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvfold.disk.record import Record
from kvfold.report.studies import studies
from kvfold.report.tables import NONE, cell, markdown, plain


def levels_tables(records: Sequence[Record]) -> Iterator[str]:
    """One line for each way of training: tokens, FLOPs, loss and KL over its seeds."""
    for study in studies(records):
        lines = []
        for row in study.everyone:
            flops = [step["flops"] for each in row.records for step in each.metrics["made_by"] if "flops" in step]
            spent = NONE if not flops else f"{sum(flops) / len(flops):.4g}"
            own = [row.schooling, spent, cell(row.metric("loss")), cell(row.metric("kl"))]
            lines.append([row.name, *own])
        yield markdown((["model", "training", "FLOPs", "loss", "KL"], lines), words=2)
        first = study.everyone[0].records[0]
        yield (
            "FLOPs by parameters: 6 a token of a student, 2 a token of the teacher. ± is the standard deviation over "
            f"seeds. Measured on {plain(first.device)}."
        )
