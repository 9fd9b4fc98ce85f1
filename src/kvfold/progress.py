"""What a stage tells while it works; who shows it, and how, is the command line's affair."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener to one task at a time."""

    def start(self, what: str, total: float, unit: str) -> None:
        """A task of `total` units (`tokens`, `bytes`, `layers`, ...) begins."""

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside the bar."""

    def stop(self) -> None:
        """The task has ended, well or not."""

    def say(self, line: str) -> None:
        """One line for the reader, kept on the screen."""


class Silent:
    """The listener of the Python API: nothing is shown."""

    def start(self, what: str, total: float, unit: str) -> None:
        """Ignore the beginning of a task."""

    def advance(self, amount: float, note: str = "") -> None:
        """Ignore an advance."""

    def stop(self) -> None:
        """Ignore the end of a task."""

    def say(self, line: str) -> None:
        """Ignore a line."""


SILENT: Progress = Silent()
