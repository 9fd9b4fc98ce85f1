"""Progress of a stage. The command line shows it; the Python API is silent by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Where a stage reports its progress, one task at a time."""

    def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
        """Begin a task of `total` units (`tokens`, `bytes`, `layers`, ...), or continue it after `done` of them."""

    def advance(self, amount: float, note: str = "") -> None:
        """Add `amount` units to what is done, and show `note` beside the bar."""

    def stop(self) -> None:
        """End the task, complete or not."""

    def say(self, line: str) -> None:
        """Print one line that stays on the screen."""


class Silent:
    """A progress that shows nothing."""

    def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
        """Show nothing."""

    def advance(self, amount: float, note: str = "") -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""

    def say(self, line: str) -> None:
        """Show nothing."""


SILENT: Progress = Silent()


@contextmanager
def task(progress: Progress, what: str, total: float, unit: str, done: int = 0) -> Iterator[None]:
    """A context in which a task of `total` units runs, after `done` of them; it stops with the context."""
    progress.start(what, total, unit, done)
    try:
        yield
    finally:
        progress.stop()
