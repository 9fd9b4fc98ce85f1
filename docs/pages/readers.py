"""Tables of readers of passages: right answers, the time of one by part of the model, and the bytes of a passage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvfold.disk.record import Record
from kvfold.report.rows import Row
from kvfold.report.studies import studies
from kvfold.report.tables import NONE, markdown, percent, plain

TIMES = "seconds_per_answer"
PARTS = {"encoder": "encoder", "cross": "cross-attention", "self": "self-attention", "rest": "rest"}


def reader_tables(records: Sequence[Record]) -> Iterator[str]:
    """Every reader of each study, the teacher first; times are means over questions and seeds."""
    for study in studies(records):
        readers = [row for row in study.everyone if row.keyed(TIMES)]
        if not readers:
            continue
        columns = ["reader", "exact match", "F1", "ms an answer", *PARTS.values(), "bytes a passage"]
        yield markdown((columns, [_cells(row) for row in readers]))
        seeds = max(len(row.records) for row in readers)
        yield (
            f"Means over questions, answered one by one, {seeds} seed{'s' if seeds > 1 else ''}; bytes are "
            f"those of a live cache. Measured on {plain(readers[0].records[0].device)}."
        )


def _cells(row: Row) -> list[str]:
    times, held = row.keyed(TIMES), row.keyed("passage_cache_bytes")
    answers = [percent(next(iter(row.keyed(name).values()), None)) for name in ("exact_match", "f1")]
    whole = sum(times[part].mean for part in PARTS)
    spent = [f"{1e3 * each:.1f}" for each in (whole, *(times[part].mean for part in PARTS))]
    bytes_ = f"{held['measured'].mean:,.0f}" if held else NONE
    return [row.name, *answers, *spent, bytes_]
