"""Offloading: what is in the memory of the host, and that it changes no bit of what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import modeling_utils

from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.errors import SettingError
from kvfold.families import all_families
from kvfold.predict.plan import PlanSettings
from kvfold.predict.training_memory import Rank, rank_memory
from kvfold.train import placing
from kvfold.train import uptrain as stage
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.uptrain import UptrainSettings, uptrain
from plug import Plug
from processes import on_ranks

pytestmark = pytest.mark.usefixtures("alone")

SMALL: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "tokens": 4 * 64, "precision": "fp32"}
BOTH: dict[str, Any] = {"offload": "both", "checkpointing": "block"}


@pytest.fixture
def student(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 1})


def _weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_one_process_trains_the_same_weights_and_continues_without(
    student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[Any] = []

    def watched(module: Any, **options: Any) -> Any:
        policies.append(options["offload_policy"])
        return fully_shard(module, **options)

    def made(name: str, **changes: Any) -> bytes:
        settings = UptrainSettings(data=str(text), **{**SMALL, "checkpoint_steps": 1, **changes})
        return _weights(uptrain(student, tmp_path / name, settings))

    monkeypatch.setattr(placing, "fully_shard", watched)
    whole = made("whole")
    assert policies == []
    assert made("offloaded", **BOTH) == whole
    assert len(policies) == 9, "four blocks of student and teacher, and the rest"
    assert all(isinstance(each, CPUOffloadPolicy) for each in policies)
    assert not dist.is_initialized(), "the process group of one goes with its training"
    settings = UptrainSettings(data=str(text), **SMALL, **BOTH, checkpoint_steps=1)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        uptrain(student, tmp_path / "stopped", settings, progress=Plug(2))
    assert not dist.is_initialized()
    assert made("stopped") == whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_no_parameters(student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two passes all of them, their gradients and the optimiser's states are in pinned memory of the host."""
    roots: list[Any] = []
    place = placing.place
    monkeypatch.setattr(stage, "place", lambda *args, **options: roots.append(place(*args, **options)) or roots[-1])
    losses = []
    for changes in ({}, BOTH):
        settings = UptrainSettings(data=str(text), **SMALL, **changes, log_every=1)
        out = uptrain(student, tmp_path / f"out{len(changes)}", settings)
        losses.append([json.loads(line).get("loss") for line in (out / "train.jsonl").read_text().splitlines()][:-1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    whole, offloaded = ([placing.local(each) for each in root.parameters()] for root in roots)
    assert all(each.is_cuda for each in whole)
    assert all(each.is_pinned() for each in offloaded)


@pytest.mark.slow
def test_a_pretraining_is_the_same(text: Path, tmp_path: Path) -> None:
    config = {**all_families()["llama"].tiny(), "vocab_size": 300}
    settings = [PretrainSettings(data=str(text), **SMALL, **each) for each in ({}, {"offload": "parameters"})]
    whole, offloaded = (pretrain(config, tmp_path / each.offload, each) for each in settings)
    assert _weights(offloaded) == _weights(whole)


TRAIN = """
from kvfold.train.uptrain import UptrainSettings, uptrain

def command():
    for student, out, settings in json.loads(Path(arguments[0]).read_text()):
        uptrain(student, out, UptrainSettings(**settings))
"""


@pytest.mark.slow
def test_two_ranks_train_the_same_weights(student: Path, text: Path, tmp_path: Path) -> None:
    common = {**SMALL, "data": str(text), "micro_batch": 1, "converted_only": True}
    jobs = [
        [str(student), str(tmp_path / name), {**common, **changes}] for name, changes in (("whole", {}), ("both", BOTH))
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    on_ranks(TRAIN, [tmp_path / "jobs.json"])
    assert _weights(tmp_path / "both") == _weights(tmp_path / "whole")


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_the_inputs_of_blocks_alone_leave_the_device(checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is moved: what an accelerator's pass would move is seen by a stand-in of `save_on_cpu`."""
    model: Any = hf.build(all_families()["llama"].tiny(), seed=0, attention=hf.ATTENTION)
    moved: list[Tensor] = []
    back: list[Tensor] = []

    def leave(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return tensor

    def come(tensor: Tensor) -> Tensor:
        back.append(tensor)
        return tensor

    def save_on_cpu(*, pin_memory: bool, device_type: str) -> saved_tensors_hooks:
        assert pin_memory
        return saved_tensors_hooks(leave, come)

    monkeypatch.setattr(modeling_utils, "save_on_cpu", save_on_cpu)
    monkeypatch.setattr(placing, "best_device", lambda: "cuda")
    settings: dict[str, Any] = {"data": "text", "tokens": 1, "checkpointing": checkpointing, "offload": "activations"}
    placing.prepare(model, UptrainSettings(**settings))
    inputs: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(torch.arange(16).view(2, 8)).logits.sum().backward()
    seen = [each for each in moved if each.numel()]
    assert [each.data_ptr() for each in seen] == [each.data_ptr() for each in inputs]
    assert [each.shape for each in seen] == [(2, 8, model.config.hidden_size)] * len(model.model.layers)
    assert len(back) == len(moved)
    family = all_families()["llama"]
    shape, rank = (
        family.shape(family.tiny()),
        Rank(rows=2, length=8, checkpointing=checkpointing, offload="activations"),
    )
    assert rank_memory(family, family.tiny(), shape, shape, rank).host == sum(each.nbytes for each in seen)


def test_what_is_not_offloaded_is_refused(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    for made in (lambda: UptrainSettings(data="text", tokens=1, offload="both"), lambda: PlanSettings(offload="both")):
        with pytest.raises(SettingError, match="the inputs of checkpointed blocks .* add --checkpointing block"):
            made()
    fused = convert(tiny_checkpoint("qwen2"), tmp_path / "fused", "dha", {"kv_heads": 2})
    with pytest.raises(SettingError, match=r"offload does not apply \(got parameters\); leave out --offload"):
        uptrain(fused, tmp_path / "out", UptrainSettings(data=str(text), **SMALL, offload="parameters"))
