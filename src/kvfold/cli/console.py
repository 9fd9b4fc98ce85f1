"""What people see: progress with an estimate, and tables. Machines read `--json` on standard output instead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvfold.errors import plain

LONGEST = 4000  # characters of a line, and of a cell: what is longer is left out in the middle


class Screen(Console):
    """A console whose lines are safe to print, and whose reader may leave: `kvfold plan SRC | head -1` is no fault."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False)

    def show(self, text: str) -> None:
        """Print one line, as it is but for control characters."""
        self.print(plain(text, LONGEST), markup=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Go on in silence."""
        self.quiet = True
        silence(self.file)


def silence(stream: IO[str]) -> None:
    """Lead a stream that nobody reads any more to nowhere, so that its end is no error either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


OUT = Screen()
if not OUT.is_terminal:
    OUT.width = 160  # a log has no edge: no word of a table is broken
ERR = Screen(stderr=True)

QUIET_SECONDS = 20  # between two lines where no bar can be drawn


def quantity(amount: float, unit: str) -> str:
    """An amount for people: bytes in powers of 1024, the rest in thousands and millions."""
    if unit == "bytes":
        for name in ("B", "KiB", "MiB", "GiB", "TiB"):
            if abs(amount) < 1024 or name == "TiB":
                return f"{amount:.0f} {name}" if name == "B" else f"{amount:.1f} {name}"
            amount /= 1024
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(amount) >= limit:
            return f"{amount / {'B': 1e9, 'M': 1e6, 'k': 1e3}[suffix]:.1f}{suffix} {unit}"
    return f"{amount:.0f} {unit}"


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        total = "" if task.total is None else f" of {quantity(task.total, unit)}"
        return Text(f"{quantity(task.completed, unit)}{total}", style="progress.download")


class Bars:
    """Progress on a terminal: one bar at a time, with an estimate of what is left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def start(self, what: str, total: float, unit: str) -> None:
        """Draw a new bar."""
        self.stop()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            _Amount(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=ERR,
        )
        self._progress.add_task(plain(what, LONGEST), total=total, unit=unit, note="")
        self._progress.start()

    def advance(self, amount: float, note: str = "") -> None:
        """Move the bar."""
        if self._progress is not None:
            task = self._progress.tasks[0]
            self._progress.update(task.id, advance=amount, note=plain(note, LONGEST) or task.fields["note"])

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        ERR.print(plain(line, LONGEST), markup=False)  # which knows of the bar below


class Lines:
    """Progress where no bar can be drawn, as in a log: a line at the start, one now and then, one at the end."""

    def __init__(self) -> None:
        self._what = self._unit = ""
        self._total = self._done = 0.0
        self._began = self._said = 0.0

    def start(self, what: str, total: float, unit: str) -> None:
        """Say what begins."""
        self.stop()
        self._what, self._total, self._unit, self._done = what, total, unit, 0.0
        self._began = self._said = time.monotonic()
        self.say(f"{what}: {quantity(total, unit)}")

    def advance(self, amount: float, note: str = "") -> None:
        """Say how far it is, now and then."""
        self._done += amount
        now = time.monotonic()
        if now - self._said >= QUIET_SECONDS and self._done:
            self._said = now
            left = (now - self._began) * (self._total - self._done) / self._done
            self.say(f"{self._what}: {self._done / max(self._total, 1e-9):.0%}, {left:.0f} s left {note}".rstrip())

    def stop(self) -> None:
        """Say how long it took."""
        if self._what:
            self.say(f"{self._what}: {time.monotonic() - self._began:.1f} s")
            self._what = ""

    def say(self, line: str) -> None:
        """Print a line."""
        ERR.show(line)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
    """Print a table whose first `words` columns are words and whose others are numbers."""
    made = Table(title=Text(plain(title, LONGEST)) if title else None, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(Text(plain(column, LONGEST)), justify="left" if number < words else "right")
    for row in rows:
        made.add_row(*(Text(plain(cell, LONGEST)) for cell in row))
    OUT.print(made)
