"""The files of a training run: its state, from which it continues, and its log.

They lie in a folder that others may have touched, so a damaged file is one clear error.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from pydantic import FiniteFloat, NonNegativeInt
from torch import nn

from kvfold.disk.output import damaged, disk_errors, read_json, replacing, write_json
from kvfold.errors import KvfoldError, OutputError
from kvfold.formats import json_text
from kvfold.inputs import LARGE, parse_json, read_bytes
from kvfold.machine import best_device

LOG = "train.jsonl"
STATE = "state.json"  # names the slot from which the run continues
Slot = Literal["state-a.pt", "state-b.pt"]
SLOTS: tuple[Slot, Slot] = ("state-a.pt", "state-b.pt")


@dataclass
class Position:
    """How far a run has come."""

    stage: NonNegativeInt = 0
    stage_step: NonNegativeInt = 0  # steps done in this stage
    step: NonNegativeInt = 0  # steps done in all
    tokens: NonNegativeInt = 0
    seconds: FiniteFloat = 0.0
    smooth: float | None = None  # the smoothed loss
    lowest: float | None = None  # its lowest value


@dataclass
class _Marker:
    slot: Slot
    position: Position


class State:
    """The state of a run in a folder: two slots, and a marker that names the good one.

    A slot is written whole before the marker turns to it, so a process killed at any moment leaves a good state. All
    methods raise OutputError for damaged files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _marker(self) -> _Marker | None:
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            return pydantic.TypeAdapter(_Marker).validate_python(read_json(path))
        except pydantic.ValidationError as error:
            raise damaged(path) from error

    def position(self) -> Position | None:
        """How far the saved state has come; None if there is none."""
        marker = self._marker()
        return None if marker is None else marker.position

    def save(self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state into the slot that is not in use, then turn the marker."""
        marker = self._marker()
        slot = SLOTS[marker is not None and marker.slot == SLOTS[0]]
        with disk_errors(self.folder), (self.folder / slot).open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
            write_json(self.folder / STATE, {"slot": slot, "position": vars(position)})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the saved state into a model and an optimiser of the same architecture."""
        marker = self._marker()
        assert marker is not None  # `position` was read before
        path = self.folder / marker.slot
        if not path.is_file():
            raise damaged(path)
        try:
            content: Any = torch.load(path, map_location=best_device(), weights_only=True)
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

    def remove(self) -> None:
        """Delete the state of a run that is complete."""
        for name in (STATE, *SLOTS):
            (self.folder / name).unlink(missing_ok=True)


class Log:
    """`train.jsonl`, one object per line, and TensorBoard's files if it is installed."""

    def __init__(self, folder: Path, step: int):
        path = folder / LOG
        kept = kept_lines(path, step) if step and path.exists() else b""
        with replacing(path) as sibling:
            sibling.write_bytes(kept)
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line."""
        self._file.write(json_text(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def kept_lines(path: Path, step: int) -> bytes:
    """The lines of a log up to a step. A half-written line and later steps are left out: they are written again."""
    lines = read_bytes(path, limit=LARGE, error=OutputError).splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for a damaged line."""
    try:
        found = parse_json(line, where="a log")
    except KvfoldError:
        return math.inf
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else math.inf
