"""The files of a training run: its state, from which it continues, and its log.

They lie in a folder that others may have touched, so a damaged file is one clear error.

Training goes on while a state is written that lies on a GPU: between two steps it is copied into the memory of the
host, and a thread of each rank writes the copy. If it lies in the memory of the host (on CPUs, or offloaded), the step
waits for the write. There a copy would take another 12 bytes for each trained parameter, and on CPUs the thread would
take the cores that training uses. Two ranks that train the demo (3M parameters) wait for 0.2 s, once in five minutes.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from pydantic import FiniteFloat, NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from kvfold import ranks
from kvfold.disk.output import damaged, disk_errors, flush, flush_file, read_json, replacing, write_json
from kvfold.errors import KvfoldError, OutputError
from kvfold.formats import json_text
from kvfold.inputs import LARGE, parse_json, read_bytes
from kvfold.machine import best_device
from kvfold.train.placing import local

LOG = "train.jsonl"
MOMENT = "/"  # in a slot, between a parameter's name and one of the optimiser's moments
STATE = "state.json"  # names the slot from which the run continues
Slot = Literal["state-a", "state-b", "state-a.pt", "state-b.pt"]
SLOTS: tuple[Slot, Slot] = ("state-a", "state-b")  # folders with a file of each rank
OLD_SLOTS: tuple[Slot, Slot] = ("state-a.pt", "state-b.pt")  # files of one process, as older versions wrote


@dataclass
class Position:
    """How far a run has come."""

    stage: NonNegativeInt = 0
    stage_step: NonNegativeInt = 0  # steps done in this stage
    spared: NonNegativeInt = 0  # steps that the stage before left to this one
    step: NonNegativeInt = 0  # steps done in all
    tokens: NonNegativeInt = 0
    seconds: FiniteFloat = 0.0
    smooth: float | None = None  # the smoothed loss
    lowest: float | None = None  # its lowest value


@dataclass
class _Marker:
    slot: Slot
    position: Position


@dataclass
class _Pending:
    """A save that has begun: the marker that will name it, and this rank's write."""

    marker: _Marker
    write: Future[None]


class State:
    """The state of a run in a folder: two slots, and a marker that names the good one.

    A slot holds safetensors in the format of `torch.distributed.checkpoint`: each rank writes what lies on it, and each
    rank of a later run, however many there are, reads what will lie on it. `save` begins a save, and `finish` ends it:
    the marker turns once every rank has written its file and flushed it to the disk, so processes killed at any moment
    leave a good state. All ranks call `save`, `finish` and `load`. The thread that writes calls no collective, so none
    can come between those of training. `changing` are the names of the parameters that training changes; None: of all
    that the model holds.

    All methods raise OutputError for damaged files.
    """

    def __init__(self, folder: Path, changing: Collection[str] | None = None):
        self.folder, self.changing = folder, changing
        self._pending: _Pending | None = None
        self._layout: dict[str, Any] = {}
        self._offsets: dict[str, list[int]] = {}
        self._writer = ThreadPoolExecutor(1, "state")
        pinned = best_device() == "cuda"
        self._stager = DefaultStager(  # the next save uses its memory again
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=pinned,
            )
        )

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

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part of a save."""
        return self._pending is not None and not self._pending.write.done()

    def save(
        self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer, *, wait: bool = False
    ) -> None:
        """Begin to write the state into the slot that is not in use; with `wait`, or outside of GPUs, also `finish`.

        A save that is still pending is finished first. If the new one were skipped instead, a slow disk would let a
        kill lose more steps than the settings allow.
        """
        self.finish()
        content = self._weights(model)
        for name, parameter in _trained(model, optimizer).items():
            content |= {f"{name}{MOMENT}{key}": value for key, value in optimizer.state[parameter].items()}
        with disk_errors(self.folder):
            slot = ranks.broadcast_object(self._free_slot() if ranks.current().main else None)
            offsets = self._planned(content, self.folder / slot)
        later = background(content)
        tensors: Any = {name: local(content[name]).contiguous() for name in offsets}
        if later:
            tensors = self._stager.stage(tensors)
        file = self.folder / slot / f"shard-{ranks.current().rank + 1:05d}.safetensors"
        write = self._writer.submit(_write, file, tensors, offsets)
        self._pending = _Pending(_Marker(slot, replace(position)), write)
        if wait or not later:
            self.finish()

    def _free_slot(self) -> Slot:
        """The slot that is not in use, emptied."""
        marker = self._marker()
        slot = SLOTS[marker is not None and marker.slot == SLOTS[0]]
        shutil.rmtree(self.folder / slot, ignore_errors=True)
        (self.folder / slot).mkdir()
        return slot

    def _planned(self, content: Mapping[str, Tensor], folder: Path) -> dict[str, list[int]]:
        """The tensors that this rank writes, each with the offsets of its part in the whole.

        DCP divides them among the ranks. Its planning takes longer than the write of a small state, so it plans again
        only if names, shapes or placements have changed.
        """
        layout = {name: (value.shape, getattr(value, "placements", None)) for name, value in content.items()}
        if layout != self._layout:
            plan = _Plan(str(folder), save_distributed=True)
            with _single(), _own_errors():
                state_dict_saver.save(dict(content), storage_writer=plan)
            self._layout, self._offsets = layout, plan.offsets
        return self._offsets

    def finish(self) -> None:
        """Wait until all ranks have written the pending save, if there is one, and turn the marker to it.

        Raises the error of a rank that could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.write.exception()
        for each in (error, *ranks.gather_in_order(error)):  # its own first, which has a traceback
            if each is not None:
                raise each
        if ranks.current().main:
            slot, position = pending.marker.slot, pending.marker.position
            with disk_errors(self.folder):
                flush(self.folder / slot)
                write_json(self.folder / STATE, {"slot": slot, "position": vars(position)})
        ranks.barrier()

    def close(self) -> None:
        """Wait for this rank's write. The marker does not turn: the other ranks may have ended."""
        self._writer.shutdown()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Read the saved state into a model and an optimiser of the same architecture."""
        marker = self._marker()
        assert marker is not None  # `position` was read before
        path = self.folder / marker.slot
        if not path.exists():
            raise damaged(path)
        try:
            if marker.slot in OLD_SLOTS:
                _load_old(path, model, optimizer)
            else:
                self._load(path, model, optimizer)
        except torch.OutOfMemoryError:
            raise
        except (
            CheckpointException,
            SafetensorError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise damaged(path) from error

    def _load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        reader = HuggingFaceStorageReader(str(path))
        content = self._weights(model)
        moments: dict[str, dict[str, Tensor]] = {}
        trained = _trained(model, optimizer)
        for key, found in reader.read_metadata().state_dict_metadata.items():
            name, apart, moment = key.partition(MOMENT)
            if apart and isinstance(found, TensorStorageMetadata):
                like = trained[name]
                made = torch.zeros_like(like) if found.size == like.shape else torch.zeros(found.size)
                moments.setdefault(name, {})[moment] = content[key] = made.detach()
        with _single():
            state_dict_loader.load(content, storage_reader=reader)
        model.load_state_dict({name: content[name] for name in self._weights(model)}, strict=False)
        numbers = {name: number for number, name in enumerate(trained)}
        optimizer.load_state_dict(
            {
                "state": {numbers[name]: found for name, found in moments.items()},
                "param_groups": optimizer.state_dict()["param_groups"],
            }
        )

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the model that training changes, by name."""
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        once = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # a tied one under one name
        return {
            name: state[name].detach() for name in (once if self.changing is None else self.changing) if name in state
        }

    def remove(self) -> None:
        """Delete the state of a run that is complete."""
        (self.folder / STATE).unlink(missing_ok=True)
        for name in OLD_SLOTS:
            (self.folder / name).unlink(missing_ok=True)
        for name in SLOTS:
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimiser by their names in the model, in the optimiser's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(each)]: each for group in optimizer.param_groups for each in group["params"]}


def _load_old(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a state of one process that an older version wrote."""
    if ranks.current().world > 1:
        what = "is the state of one process, from an older version of kvfold"
        raise OutputError(what, where=path, next="continue it without --gpus")
    content: Any = torch.load(path, map_location=best_device(), weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])


def background(content: Mapping[str, Tensor]) -> bool:
    """Whether training goes on while these tensors are written: they lie on GPUs. All ranks have the same answer."""
    return any(each.device.type == "cuda" for each in content.values())


class _Plan(HuggingFaceStorageWriter):
    """DCP's writer of safetensors without the writing: it keeps the offsets of what the plan gives to this rank.

    DCP's own writer makes the bytes of the whole file in memory and holds Python's interpreter lock meanwhile: in a
    thread, it would stop the training. `async_save` would also run collectives in that thread.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Keep the offsets."""
        self.offsets = {each.index.fqn: list(each.tensor_data.chunk.offsets) for each in plan.items if each.tensor_data}
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([])
        return done


def _write(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, list[int]]) -> None:
    """Write the tensors of this rank as DCP's reader expects them, through to the disk."""
    places = {name: {"saved_offsets": each} for name, each in offsets.items()}
    with disk_errors(path.parent.parent):
        save_file(dict(tensors), path, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
        flush_file(path)


@contextmanager
def _single() -> Iterator[None]:
    """Silence what torch warns about a checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the error of the disk, or the Ctrl-C, that made a save fail, and not what wraps it."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise first if isinstance(first, OSError | KeyboardInterrupt) else error from None


class NoLog:
    """The log of the ranks that write none."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""


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
