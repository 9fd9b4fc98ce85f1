"""What `kvfold inspect` prints: a line for each layer, the suggestion, and its commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvfold.cli.console import OUT, table
from kvfold.disk.record import Record
from kvfold.report.inspection import advice, commands


def show(record: Record) -> None:
    """Print an inspection."""
    rows = [dict(_cells(row)) for row in record.metrics["layers"]]
    table(f"{record.name}; 5: 0.31 is head 5 and its number", list(rows[0]), [list(row.values()) for row in rows])
    for line in (*advice(record), *commands(record).values()):
        OUT.show(line)


def _cells(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The cells of a layer by column; of its heads, the one with the most, or the mean."""
    yield "layer", str(row["layer"])
    yield "heads", str(row["heads"])
    if "fewest" in row:
        yield "needed", str(row["fewest"])
    for key, column in (("kl", "most needed"), ("rise", "copies most"), ("induction", "induction")):
        if key in row:
            most = max(range(row["heads"]), key=row[key].__getitem__)
            yield column, f"{most}: {row[key][most]:.2f}"
    for key in ("sink", "local", "far"):
        yield key, f"{_mean(row[key]):.0%}"
    for key, column in (("entropy", "entropy"), ("key_rank", "rank of k"), ("value_rank", "rank of v")):
        yield column, f"{_mean(row[key]):.1f}"
    for key in ("keys", "values"):
        alike = max((value for head, each in enumerate(row[key]) for value in each[:head]), default=None)
        yield f"most alike {key}", "" if alike is None else f"{alike:.2f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
