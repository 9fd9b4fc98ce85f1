"""Tables of studies, and their cells in words. Reports, model cards, the README and the docs pages share them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from kvfold.disk.record import Record
from kvfold.report.rows import Row, Spread, Study
from kvfold.report.studies import studies

GAP_CLOSED = (
    "(loss of the published start - loss) / (loss of the published start - loss of the teacher), for the same method, "
    "bytes and tokens"
)
RECALL = {  # by metric: the heading of a column
    "copy_loss": "copy loss over {:,} tokens",
    "passkey": "passkey in {:,} tokens",
    "passkey_loss": "loss on a passkey in {:,} tokens",
}
NONE = "–"  # a cell without a number

Table = tuple[list[str], list[list[str]]]  # columns and rows; the first column is words


def cell(value: Spread | None, digits: int = 4) -> str:
    """A number over seeds as the cell of a table."""
    return NONE if value is None else value.text(digits)


def percent(value: Spread | None) -> str:
    """A share as a percentage, with its deviation over seeds."""
    if value is None:
        return NONE
    return f"{value.mean:.1%}" if value.count == 1 else f"{value.mean:.1%} ± {value.deviation:.1%}"


def part_of(value: float) -> str:
    """A share as a percentage, without a zero decimal: `12.5%`, `25%`."""
    return f"{value:.1%}".replace(".0%", "%")


def headline(study: Study) -> Table:
    """One line per row: bytes, losses, distance to the teacher, speed. A column without a number is left out."""
    place = headline_place(study)
    lines = [_cells(row, place) for row in study.everyone]
    columns = [
        each
        for each in (lines[0] if lines else {})
        if each == "model" or any(line[each] not in (NONE, "") for line in lines)
    ]
    return columns, [[line[each] or NONE for each in columns] for line in lines]


def _cells(row: Row, place: tuple[int, int] | None) -> dict[str, str]:
    """The cells of one row of a headline, by column."""
    compared = row.role != "teacher"
    cells = {
        "model": row.name,
        "training": row.schooling + (f" ({len(row.records)} seeds)" if len(row.records) > 1 else ""),
        "cache bytes/token": NONE if row.cache_bytes is None else f"{row.cache_bytes:,.0f}",
        "of teacher": NONE,
        "loss before training": cell(row.loss_before),
        "loss": cell(row.metric("loss") if row.trained or row.role != "student" else None),
        "KL": cell(row.metric("kl")) if compared else NONE,
        "agreement": percent(row.metric("agreement")) if compared else NONE,
        "recovered": NONE if row.recovered is None else f"{row.recovered:.0%}",
        "gap closed": NONE if row.gap_closed is None else f"{row.gap_closed:.0%}",
        "exact match": percent(next(iter(row.keyed("exact_match").values()), None)),  # fewest beams
        "F1": percent(next(iter(row.keyed("f1").values()), None)),
        "CER": percent(next(iter(row.keyed("cer").values()), None)),
    }
    if row.cache_bytes and row.teacher_cache_bytes:
        cells["of teacher"] = part_of(row.cache_bytes / row.teacher_cache_bytes)
    if place:
        speed = row.speedups.get(place)
        cells[f"decode at {place[0]:,} × {place[1]}"] = NONE if speed is None else f"{speed:.2f}×"
    return cells


def headline_place(study: Study) -> tuple[int, int] | None:
    """The largest context, and there the largest batch, at which students were timed."""
    return max((place for row in study.rows for place in row.speedups), default=None)


def summary(records: Sequence[Record]) -> Table:
    """The headline of the first study, narrow enough for a terminal; empty without an evaluation."""
    found = studies(records)
    if not found:
        return ["model"], []
    columns, rows = headline(found[0])
    left_out = {"of teacher", "agreement"}
    if len({row[0] for row in rows}) == len(rows):  # the model alone tells the rows apart
        left_out.add("training")
    kept = [at for at, column in enumerate(columns) if column not in left_out]
    return [columns[at].replace("/", " / ") for at in kept], [[row[at] for at in kept] for row in rows]


def asked(study: Study, metric: str) -> list[Row]:
    """The rows of a study that have this metric, each followed by itself without a part of its attention."""
    everyone = [each for row in study.everyone for each in (row, *row.parted)]
    return [row for row in everyone if row.keyed(metric)]


def recall(rows: Sequence[Row], *metrics: str) -> Table:
    """One line per row: its loss, and each of these metrics at each distance or context."""
    places = [(name, key) for name in metrics for key in sorted({int(key) for row in rows for key in row.keyed(name)})]
    lines = [
        [
            row.label,
            cell(row.metric("loss")),
            *(cell(row.keyed(name).get(str(key)), 3) for name, key in places),
        ]
        for row in rows
    ]
    return ["model", "loss", *(RECALL[name].format(key) for name, key in places)], lines


def renamed(table: Table, names: Mapping[str, str]) -> Table:
    """A table whose rows have other names, where these are known."""
    columns, rows = table
    return columns, [[names.get(row[0], row[0]), *row[1:]] for row in rows]


def markdown(table: Table, *, words: int = 1, bold: Collection[tuple[int, int]] = ()) -> str:
    """A table as Markdown: the first `words` columns are words, the others numbers; `bold` are (row, column)."""
    columns, rows = table
    shown = [
        [f"**{plain(text)}**" if (number, at) in bold else plain(text) for at, text in enumerate(row)]
        for number, row in enumerate(rows)
    ]
    lines = [[*map(plain, columns)], ["---" if at < words else "---:" for at in range(len(columns))], *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(text.split()))
