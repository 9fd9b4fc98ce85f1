"""Progress, lines and tables on the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from kvfold.errors import plain
from kvfold.formats import count, size
from kvfold.progress import Progress

LONGEST = 4000  # characters of a line and of a cell; the middle of longer ones is left out


class Screen(Console):
    """A console that prints control characters escaped, and whose reader may leave, as in `kvfold plan SRC | head`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, emoji=False)

    def show(self, text: str) -> None:
        """Print one line, with control characters escaped."""
        self.print(plain(text, LONGEST), markup=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Print lines as they are."""
        self.print(text, markup=False, soft_wrap=True)

    @override
    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(self.file)


def silence(stream: IO[str]) -> None:
    """Redirect a stream whose reader has gone to the null device, so that flushing it is no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


OUT = Screen()
if not OUT.is_terminal:
    OUT.width = 160  # a file has no edge, so tables need not wrap
ERR = Screen(stderr=True)

QUIET_SECONDS = 20  # between two lines of `Lines`


def quantity(amount: float, unit: str) -> str:
    """An amount as text: `5.8 MiB`, `1.2M tokens`."""
    if unit == "bytes":
        return size(amount)
    return f"{count(amount) if amount >= 10 else f'{amount:.0f}'} {unit}"


class _Amount(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        total = "" if task.total is None else f" of {quantity(task.total, unit)}"
        return Text(f"{quantity(task.completed, unit)}{total}", style="progress.download")


class Bars(Progress):
    """Progress on a terminal: one bar at a time, with the estimated time left."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    @override
    def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
        self.stop()
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            _Amount(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=ERR,
        )
        self._bar.add_task(plain(what, LONGEST), total=total, completed=done, unit=unit, note="")
        self._bar.start()

    @override
    def advance(self, amount: float, note: str = "") -> None:
        if self._bar is not None:
            task = self._bar.tasks[0]
            self._bar.update(task.id, advance=amount, note=plain(note, LONGEST) or task.fields["note"])

    @override
    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @override
    def say(self, line: str) -> None:
        ERR.print(plain(line, LONGEST), markup=False)  # above the bar


class Lines(Progress):
    """Progress in a log: a line at the start, one every `QUIET_SECONDS`, and one at the end."""

    def __init__(self) -> None:
        self._what = self._unit = ""
        self._total = self._first = self._done = 0.0
        self._began = self._shown = 0.0

    @override
    def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
        self.stop()
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._began = self._shown = time.monotonic()
        self.say(f"{what}: {quantity(total, unit)}")

    @override
    def advance(self, amount: float, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown >= QUIET_SECONDS and self._done > self._first:
            self._shown = now
            left = (now - self._began) * (self._total - self._done) / (self._done - self._first)
            self.say(f"{self._what}: {self._done / max(self._total, 1e-9):.0%}, {left:.0f} s left {note}".rstrip())

    @override
    def stop(self) -> None:
        if self._what:
            self.say(f"{self._what}: {time.monotonic() - self._began:.1f} s")
            self._what = ""

    @override
    def say(self, line: str) -> None:
        ERR.show(line)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
    """Print a table whose first `words` columns are text and whose other columns are numbers."""
    made = Table(title=Text(plain(title, LONGEST)) if title else None, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(Text(plain(column, LONGEST)), justify="left" if number < words else "right")
    for row in rows:
        made.add_row(*(Text(plain(cell, LONGEST)) for cell in row))
    OUT.print(made)
