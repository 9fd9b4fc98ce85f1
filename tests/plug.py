"""A training whose plug is pulled after a number of steps."""

from __future__ import annotations

from collections.abc import Callable

from kvfold.progress import Silent


class Plug(Silent):
    """Progress that ends a run after `steps` steps: by an error, or by what `how` does."""

    def __init__(self, steps: int, how: Callable[[], None] | None = None) -> None:
        self.left, self.how = steps, how

    def advance(self, amount: float, note: str = "") -> None:
        """Count the steps of training."""
        self.left -= note.startswith("loss")
        if self.left == 0:
            self.left = -1
            if self.how is None:
                raise RuntimeError("pulled the plug")
            self.how()
