"""`--precision auto`: what it stands for, decided before a run gets its identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kvfold.disk.output import fingerprint, standing
from kvfold.machine import Precision, best_precision
from kvfold.train.loop import TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)


def decide(
    settings: Settings, out: str | Path, identity: Callable[[Settings], Mapping[str, Any]], *, overwrite: bool = False
) -> Settings:
    """Settings with a precision in place of `auto`, so that `identity` never depends on who computes.

    It is that of the output, or of its unfinished work, when one of this identity stands at `out`; else the best one of
    this machine. So a run that another kind of machine began goes on as it began.
    """
    if settings.precision != "auto":
        return settings
    choices: tuple[Precision, ...] = ("bf16", "fp32") if best_precision() == "bf16" else ("fp32", "bf16")
    known = {fingerprint(identity(each)): each for each in (replace(settings, precision=each) for each in choices)}
    there = standing(out, overwrite=overwrite)
    return next((known[inputs] for inputs in there if inputs in known), next(iter(known.values())))
