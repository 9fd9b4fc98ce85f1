"""What models remember, in tables: copy loss by distance and pass keys by context, of students also without a part.

Copy loss is the loss on the second occurrence of a random span: only looking back can lower it (`probes`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfold.report import rows as tables
from kvfold.report.rows import Row, Study, Table

HEADINGS = {
    "copy_loss": "copy loss over {:,} tokens",
    "passkey": "passkey in {:,} tokens",
    "passkey_loss": "loss on a passkey in {:,} tokens",
}


def asked(study: Study, metric: str) -> list[Row]:
    """The rows of a study that have this metric, each with what it is without a part of its attention behind it."""
    everyone = [each for row in study.everyone for each in (row, *row.parted)]
    return [row for row in everyone if row.keyed(metric)]


def recall(rows: Sequence[Row], *metrics: str) -> Table:
    """A line for each row: its loss, and each of these metrics by what it was measured at."""
    places = [(name, key) for name in metrics for key in sorted({int(key) for row in rows for key in row.keyed(name)})]
    lines = [
        [
            row.label,
            tables.cell(row.metric("loss")),
            *(tables.cell(row.keyed(name).get(str(key)), 3) for name, key in places),
        ]
        for row in rows
    ]
    return ["model", "loss", *(HEADINGS[name].format(key) for name, key in places)], lines
