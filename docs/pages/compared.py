"""The table and the picture of a comparison with what else would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvfold.disk.record import Record
from kvfold.report import figures
from kvfold.report.comparison import ABOUT, comparisons
from kvfold.report.tables import markdown, plain


def compared_tables(records: Sequence[Record]) -> Iterator[str]:
    """Every row of each comparison, and how it is read."""
    for each in comparisons(records):
        columns, rows = each.table()
        yield markdown((columns, rows))
        settings = each.times.settings
        yield f"{ABOUT} In {settings['dtype']}, on {plain(each.times.device)}."


def compared_figure(records: Sequence[Record]) -> str | None:
    """The two fronts of the first comparison as a file; None without one."""
    found = next(comparisons(records), None)
    return None if found is None else figures.standalone(found.figure("compared"))
