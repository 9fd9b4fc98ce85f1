"""Reading ahead: the next layer alone, in order, with the same numbers; its errors are those of reading; it ends."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold import machine
from kvfold.calibrate.decoder import CalibrationSettings, read
from kvfold.contracts.effort import RepairSettings
from kvfold.contracts.requests import InputGram
from kvfold.contracts.site import Site
from kvfold.convert.conversion import convert
from kvfold.disk import ahead
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError
from kvfold.hf import Layers, layers
from kvfold.repair.layers import repair
from kvfold.text.tokens import TokenFile

Make = Callable[..., Path]
IDS_BT = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(0))
REQUESTS = [InputGram(Site(layer)) for layer in range(4)]


@pytest.fixture
def source(tiny_checkpoint: Make) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))


@pytest.fixture
def reading_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU computes."""
    monkeypatch.setattr(layers, "_computes_faster_than_it_reads", lambda device: True)


def _threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("reading ahead")]


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _text() -> TokenFile:
    ids = np.random.default_rng(0).integers(3, 96, 384).astype(np.uint32)
    return TokenFile(Path("text"), ids, 96, "text", "text")


def test_the_next_layer_is_read_by_one_thread_and_no_other(
    source: Checkpoint, reading_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    copies: list[tuple[int, weakref.ref[Tensor]]] = []
    parameter = source.parameter

    def watched(name: str, shape: Any) -> Tensor:
        seen.append((threading.current_thread() is threading.main_thread(), _layer(name)))
        return parameter(name, shape)

    def kept(self: ahead.Ahead, name: str, shape: Any) -> Tensor:
        made = copy(self, name, shape)
        copies.append((_layer(name), weakref.ref(made)))
        return made

    copy = ahead.Ahead._read
    monkeypatch.setattr(source, "parameter", watched)
    monkeypatch.setattr(ahead.Ahead, "_read", kept)
    with Layers(source, in_turn=3) as model:
        hidden_BTD = model.embed(IDS_BT)
        for number in range(3):
            layer = model.open(number)
            assert {where for where, ref in copies if ref() is not None} <= {number + 1}, "one layer is held ahead"
            hidden_BTD = layer.run(hidden_BTD)
            assert max(at for _, at in seen) <= min(number + 1, 2)
    assert _threads() == []
    count = len(seen) // 3
    assert seen == [(True, 0)] * count + [(False, 1)] * count + [(False, 2)] * count
    expected = Layers(source)
    other_BTD = expected.embed(IDS_BT)
    for number in range(3):
        other_BTD = expected.open(number).run(other_BTD)
    assert torch.equal(hidden_BTD, other_BTD)


def test_another_layer_than_the_next_may_be_opened(source: Checkpoint, reading_ahead: None) -> None:
    hidden_BTD = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with Layers(source, in_turn=4) as model:
        for number in (0, 2, 2, 1):
            assert torch.equal(model.open(number).run(hidden_BTD), Layers(source).open(number).run(hidden_BTD))


def test_a_processor_reads_when_it_needs(source: Checkpoint) -> None:
    with Layers(source, in_turn=4) as model:
        model.open(0)
        assert _threads() == []


@pytest.mark.slow
def test_calibration_and_repair_find_the_same(
    source: Checkpoint, tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Checkpoint.open(tiny_checkpoint("phi3", name="packed"))
    student = Checkpoint.open(convert(teacher.path, tmp_path / "student", "gqa", {"kv_heads": 1}))
    rows, found = list(IDS_BT), []
    for reads in (False, True):
        monkeypatch.setattr(layers, "_computes_faster_than_it_reads", lambda device, reads=reads: reads)
        answers = read(source, REQUESTS, rows, CalibrationSettings(length=24))
        tensors = [each for request in REQUESTS for each in answers[request].values()]
        settings = RepairSettings(length=16, q_tokens=384)
        repaired = list(repair(teacher, student, ["q", "o", "down"], _text(), settings))
        found.append([*tensors, *(each for layer in repaired for each in layer.values())])
    assert len(found[0]) == 4 * 2 + 4 * 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_what_cannot_be_read_is_the_error_of_reading(
    source: Checkpoint, reading_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = source.parameter

    def broken(name: str, shape: Any) -> Tensor:
        if _layer(name) == 2:
            raise CheckpointError("is truncated", where=name)
        return parameter(name, shape)

    monkeypatch.setattr(source, "parameter", broken)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+: is truncated"):
        read(source, REQUESTS, list(IDS_BT), CalibrationSettings(length=24))
    assert _threads() == []


def test_what_ends_the_work_ends_the_thread(
    source: Checkpoint, reading_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, names = threading.Event(), threading.Event(), list[str]()
    parameter = source.parameter

    def slow(name: str, shape: Any) -> Tensor:
        names.append(name)
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(60)
        return parameter(name, shape)

    def answering(pool: ThreadPoolExecutor, **options: Any) -> None:
        """The disk answers while the work is being ended."""
        shutdown(pool, wait=False, **options)
        go_on.set()
        shutdown(pool)

    def interrupted() -> None:
        with Layers(source, in_turn=4) as model:
            model.open(0)
            assert begun.wait(60)
            raise KeyboardInterrupt

    shutdown = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", answering)
    monkeypatch.setattr(source, "parameter", slow)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _threads() == []
    assert [_layer(name) for name in names].count(1) == 1, "the parameters behind it are not read any more"


def test_memory_that_cannot_be_pinned_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def refusing(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    monkeypatch.setattr(machine, "best_device", lambda: "cuda")
    assert machine.host_empty((2, 3), torch.bfloat16).shape == (2, 3)
    monkeypatch.setattr(machine, "best_device", lambda: "cpu")
    assert machine.host_empty((2, 3), torch.bfloat16).dtype == torch.bfloat16
    assert asked == [True, False, False]
