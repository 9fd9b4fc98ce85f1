"""The parts of a page: sections of tables, figures, text to copy, and samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvfold.report.tables import Table


@dataclass(frozen=True)
class Block:
    """One piece of a section: a table, a figure, a text to copy, or samples side by side."""

    kind: Literal["table", "figure", "code", "samples"]
    title: str
    about: str = ""
    table: Table | None = None
    content: Any = None
    words: int = 1  # columns of the table that are words
    folded: bool = False  # shown on demand
    wide: bool = False  # a figure across the page
    more: tuple[str, ...] = ()  # words for each row of the table, shown on demand


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    id: str
    title: str
    about: str
    blocks: tuple[Block, ...]


def tabulated(title: str, columns: list[str], rows: list[list[str]], **look: Any) -> tuple[Block, ...]:
    """A table as blocks of a section; none without rows."""
    return (Block("table", title, table=(columns, rows), **look),) if rows else ()
