"""The report of a run: one HTML page with its numbers, figures, samples and what made them, and model cards.

The page is one file: figures are inline SVG, the style is inline, nothing is fetched and no script runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvfold.disk.output import disk_errors, replacing, written_by_kvfold
from kvfold.disk.record import Record
from kvfold.errors import OutputError
from kvfold.progress import SILENT, Progress
from kvfold.report import figures
from kvfold.report.card import templates, write_cards
from kvfold.report.folder import Run, collect
from kvfold.report.inspection import inspection_sections
from kvfold.report.outcome import cards, summary_of
from kvfold.report.sections import sections
from kvfold.report.verdict import RULE

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # but tab and line feed


def report(run_dir: str | Path, *, out: str | Path | None = None, progress: Progress = SILENT) -> Path:
    """Write the page of a run and the cards of its trained checkpoints, and return the path of the page.

    The page is `run_dir/report.html` unless `out` names another file. One line names what cannot be read; it is left
    out. Raises DataError if there is nothing to report, and OutputError if the page cannot be written.
    """
    run = collect(run_dir, progress)
    page = write_page(lambda: render(run), Path(out) if out is not None else run.folder / "report.html")
    with disk_errors(page):
        write_cards(run)
    return page


def write_page(rendered: Callable[[], str], page: Path) -> Path:
    """Write a page and return its path. Raises OutputError, before it is rendered, if it cannot be written there."""
    check_page(page)
    text = rendered()
    with disk_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        with replacing(page) as sibling:
            sibling.write_text(text, encoding="utf-8")
    return page


def check_page(page: Path) -> None:
    """Refuse to replace anything but a page that kvfold wrote. Raises OutputError."""
    if page.is_dir():
        raise OutputError("is a directory", where=page, next="name a file, such as report.html")
    if page.name in ("", "..") or "\0" in str(page):
        raise OutputError("cannot name a page", where=page, next="name a file, such as report.html")
    if os.path.lexists(page) and not written_by_kvfold(page):
        raise OutputError(
            "exists and was not written by kvfold",
            where=page,
            next="move it away, or name another file with --out",
        )


def render(run: Run) -> str:
    """The page of a run as HTML; the same run gives the same bytes."""
    missed = [record.name for record in run.records if record.status == "gate_missed"]
    gated = any(record.metrics.get("gate") for record in run.records)
    roots = sorted({checkpoint.lineage["root"]["name"] for checkpoint in run.checkpoints})
    students = cards(run)
    return _html(
        run.records,
        brand="kvfold report",
        title=run.folder.resolve().name,
        about=f"Folded from {', '.join(roots)}." if roots else "",
        verdict=f"missed by {', '.join(missed)}" if missed else "all hold" if gated else "",
        missed=bool(missed),
        students=students,
        summary=summary_of(students),
        rule=RULE,
        sections=sections(run),
    )


def render_inspection(record: Record) -> str:
    """The page of an inspection as HTML; the same record gives the same bytes."""
    read = f"Its heads, inspected on {record.metrics['tokens']:,} tokens of {record.settings['data']}."
    return _html(
        [record],
        brand="kvfold inspect",
        title=record.name,
        about=read,
        verdict="",
        missed=False,
        students=(),
        summary="",
        rule=(),
        sections=inspection_sections(record),
    )


def _html(records: Sequence[Record], **parts: Any) -> str:
    """The template with these parts, and with date and device of the records."""
    page = templates("html").get_template("report.html.j2")
    date = max((each.date for each in records), default="")[:10]
    device = next((each.device for each in records if each.device), "")
    text = page.render(date=date, device=device, figure_style=figures.style(), **parts)
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
