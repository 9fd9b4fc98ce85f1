"""States that are written while training goes on, as on GPUs: what they hold, when they count, and how they fail."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvfold.errors import Interrupted, OutputError, TrainingError
from kvfold.progress import Progress, Silent
from kvfold.train import state as states
from kvfold.train.loop import Work, parameter_groups, train
from kvfold.train.settings import UptrainSettings
from kvfold.train.state import Position, State
from plug import Plug

pytestmark = pytest.mark.usefixtures("alone")


class Disk:
    """Where states are written: a file may have to wait, and no two are written at once."""

    def __init__(self) -> None:
        self.ready, self.begun, self.busy = threading.Event(), threading.Event(), threading.Lock()
        self.ready.set()

    def write(self, tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        """Write a file."""
        assert self.busy.acquire(blocking=False)
        try:
            self.begun.set()
            assert self.ready.wait(60)
            save_file(tensors, path, metadata)
        finally:
            self.busy.release()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(states, "background", lambda content: True)
    monkeypatch.setattr(states, "save_file", made.write)
    return made


class Rows:
    """Training data of one row."""

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Tensor:
        return torch.full((1, 1), float(step))


def _train(
    folder: Path, steps: int, every: int, progress: Progress, seen: list[Tensor], nan: int | None = None
) -> None:
    """Train a vector towards the number of the step; `seen` gets its value before each. At step `nan`, the loss is."""
    model = nn.Module()
    weight = nn.Parameter(torch.zeros(3))
    model.register_parameter("weight", weight)
    folder.mkdir(exist_ok=True)

    def loss(row: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(weight.detach().clone())
        return (weight - row).square().sum() * (float("nan") if len(seen) == nan else 1), {}

    settings = UptrainSettings("none", tokens=1, batch_size=1, sequence_length=1, checkpoint_steps=every, log_every=1)
    works = [Work("ce", steps, loss, lambda: parameter_groups({"weight": weight}, 0.0), rises=True)]
    train(model, works, Rows(), settings, folder, progress)


def _step(folder: Path) -> int | None:
    position = State(folder).position()
    return position and position.step


def _weight(folder: Path, slot: str) -> Tensor:
    (file,) = (folder / slot).iterdir()
    return load_file(file)["weight"]


def test_a_state_in_the_memory_of_the_host_is_not_copied() -> None:
    """AdamW keeps the number of its steps there, whatever the device."""
    here: Any = SimpleNamespace(device=torch.device("cpu"))
    there: Any = SimpleNamespace(device=torch.device("cuda"))
    assert not states.background({"weight": here, "weight/step": here})
    assert states.background({"weight": there, "weight/step": here})


def test_training_goes_on_while_a_state_is_written(disk: Disk, tmp_path: Path) -> None:
    """The state is that of the step at which its save began, and counts once it is written."""
    marked: list[int | None] = []
    seen: list[Tensor] = []
    disk.ready.clear()

    def look() -> None:
        assert disk.begun.wait(60)
        marked.append(_step(tmp_path))
        disk.ready.set()

    _train(tmp_path, 7, 4, Plug(6, look), seen)
    assert marked == [None], "two steps after its save began"
    assert _step(tmp_path) == 4, "the end of the training awaits it"
    assert len(seen) == 7
    assert torch.equal(_weight(tmp_path, "state-a"), seen[4])
    assert not torch.equal(seen[4], seen[6])


def test_a_save_waits_for_the_one_in_flight_and_takes_the_other_slot(disk: Disk, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = State(tmp_path)

    def save(step: int, *, wait: bool = False) -> None:
        with torch.no_grad():
            model.weight.fill_(step)
        state.save(Position(step=step), model, optimizer, wait=wait)

    def kept() -> tuple[int | None, dict[str, float]]:
        slots = sorted(path.name for path in tmp_path.glob("state-*") if any(path.iterdir()))
        return _step(tmp_path), {slot: float(_weight(tmp_path, slot).mean()) for slot in slots}

    disk.ready.clear()
    save(1)
    assert state.writing
    assert kept() == (None, {})
    threading.Timer(0.1, disk.ready.set).start()
    save(2)
    assert _step(tmp_path) == 1
    state.finish()
    assert not state.writing
    assert kept() == (2, {"state-a": 1, "state-b": 2})
    save(3, wait=True)
    assert kept() == (3, {"state-a": 3, "state-b": 2})
    state.finish()
    state.close()
    assert kept() == (3, {"state-a": 3, "state-b": 2})


@pytest.mark.parametrize("nan", [None, 6])
def test_the_last_save_comes_after_the_one_in_flight(
    nan: int | None, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a signal, and where a loss stops the training."""
    marked: list[int] = []

    def write(path: Path, marker: dict[str, Any]) -> None:
        marked.append(marker["position"]["step"])
        path.write_text(json.dumps(marker))

    def stop() -> None:
        disk.ready.set()
        if nan is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(states, "write_json", write)
    disk.ready.clear()
    seen: list[Tensor] = []
    with pytest.raises(Interrupted if nan is None else TrainingError, match=r"state is saved|loss is nan at step 6"):
        _train(tmp_path, 9, 4, Plug(5, stop), seen, nan)
    assert marked == [4, 5]
    assert torch.equal(_weight(tmp_path, "state-a"), seen[4])
    seen.clear()
    _train(tmp_path, 9, 4, Silent(), seen)
    assert torch.equal(_weight(tmp_path, "state-a"), seen[3]), "it went on with step 6, and saved after step 8"


def test_an_error_of_the_training_drops_the_save_in_flight(disk: Disk, tmp_path: Path) -> None:
    """The error comes out once the thread has ended: nothing writes into the folder any more."""

    def fail() -> None:
        assert disk.begun.wait(60)
        threading.Timer(0.1, disk.ready.set).start()
        raise RuntimeError("pulled the plug")

    disk.ready.clear()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        _train(tmp_path, 9, 4, Plug(5, fail), [])
    assert not any(thread.name.startswith("state") for thread in threading.enumerate())
    assert [path.name for path in (tmp_path / "state-a").iterdir()] == ["shard-00001.safetensors"]
    assert _step(tmp_path) is None


def test_a_full_disk_is_one_line_at_a_later_step(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def full() -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        assert disk.begun.wait(60)  # the state of step 2
        monkeypatch.setattr(states, "save_file", refuse)

    with pytest.raises(OutputError, match=r"the disk is full; free some space; the same command continues") as caught:
        _train(tmp_path, 9, 2, Plug(3, full), seen)
    assert str(tmp_path) in str(caught.value)
    assert len(seen) in (5, 6), (
        "the state of step 4 could not be written, and that of step 6 finds it out at the latest"
    )
    assert _step(tmp_path) == 2
    assert torch.equal(_weight(tmp_path, "state-a"), seen[2])
    assert not list((tmp_path / "state-b").iterdir())
    monkeypatch.setattr(states, "save_file", save_file)
    again: list[Tensor] = []
    _train(tmp_path, 9, 2, Silent(), again)
    whole: list[Tensor] = []
    _train(tmp_path / "whole", 9, 2, Silent(), whole)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen[:2] + again, whole, strict=True))
    assert len(whole) == 9
