"""Reading what an unfinished training left: how far it came, its tensors, the lines of its log.

The files lie in a folder that others may have touched: what is not what was written is one clear error.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from pydantic import FiniteFloat, NonNegativeInt

from kvfold.disk.output import damaged, read_json
from kvfold.errors import KvfoldError, OutputError
from kvfold.inputs import LARGE, parse_json, read_bytes

STATE = "state.json"  # in the work folder: which of the two slots holds the state to go on from
SLOTS: tuple[Literal["state-a.pt"], Literal["state-b.pt"]] = ("state-a.pt", "state-b.pt")


@dataclass
class Position:
    """How far a run has come."""

    stage: NonNegativeInt = 0
    stage_step: NonNegativeInt = 0  # steps done in this stage
    step: NonNegativeInt = 0  # steps done in all
    tokens: NonNegativeInt = 0
    seconds: FiniteFloat = 0.0
    smooth: float | None = None  # the loss, smoothed
    lowest: float | None = None  # the lowest that it has been


@dataclass
class Marker:
    """Which slot holds the good state, and how far it had come."""

    slot: Literal["state-a.pt", "state-b.pt"]
    position: Position


def read_marker(folder: Path) -> Marker | None:
    """The marker of a work folder; None when no state was saved. Raises OutputError when it is damaged."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        return pydantic.TypeAdapter(Marker).validate_python(read_json(path))
    except pydantic.ValidationError as error:
        raise damaged(path) from error


def load_slot(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
    """Read a slot into a model and an optimiser of the same make. Raises OutputError when it is damaged."""
    if not path.is_file():
        raise damaged(path)
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise damaged(path) from error


def kept_lines(path: Path, step: int) -> bytes:
    """The whole lines of a log up to a step: one that was half-written and those past the state are made again."""
    lines = read_bytes(path, limit=LARGE, error=OutputError).splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for a line that is damaged."""
    try:
        found = parse_json(line, where="a log")
    except KvfoldError:
        return math.inf
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else math.inf
