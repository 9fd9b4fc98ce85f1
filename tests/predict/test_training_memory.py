"""The predicted memory of training: against what autograd keeps, parameter counts, and the memory of two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold import hf
from kvfold.contracts.site import Shape
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.families import all_families
from kvfold.predict.plan import PlanSettings, plan
from kvfold.predict.training_memory import Rank, RankMemory, rank_memory, remedies
from processes import on_ranks

LLAMA = all_families()["llama"]
WIDE = {
    **LLAMA.tiny(),
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def _folded(shape: Shape, heads: int = 2) -> Shape:
    return shape.with_sites({site: replace(each, num_key_value_heads=heads) for site, each in shape.sites.items()})


def _memory(rank: Rank) -> RankMemory:
    shape = LLAMA.shape(WIDE)
    return rank_memory(LLAMA, WIDE, _folded(shape), shape, rank)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(bf16: bool) -> None:
    config = {**WIDE, "num_key_value_heads": 2}
    model: Any = hf.build(config, seed=0, attention=hf.ATTENTION)
    if bf16:  # as FSDP2 gathers the parameters of blocks
        model.base_model.layers.to(torch.bfloat16)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    rows, length = 2, 96
    rounding = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), rounding:
        hidden = model.base_model(torch.randint(0, 64, (rows, length)), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    found = _memory(Rank(rows=rows, length=length, bf16=bf16)).activations
    assert found == pytest.approx(sum(kept.values()), rel=0.1)


def test_parameters_teacher_and_moments_are_counted() -> None:
    shape = LLAMA.shape(WIDE)
    student: Any = hf.build({**WIDE, "num_key_value_heads": 2}, seed=0)
    count = sum(each.numel() for each in student.parameters())
    whole = _memory(Rank(bf16=False))
    assert (whole.parameters, whole.moments, whole.gradients) == (4 * count, 8 * count, 4 * count)
    assert whole.teacher == 4 * shape.parameters
    assert _memory(Rank(bf16=False, gpus=4)).parameters == count
    attention = sum(each.numel() for name, each in student.named_parameters() if "self_attn" in name)
    part = _memory(Rank(bf16=False, converted_only=True))
    assert (part.parameters, part.moments, part.gradients) == (4 * count, 8 * attention, 4 * attention)
    assert part.teacher == 4 * sum(each.parameters for each in shape.sites.values()), "its attention alone is its own"
    assert _memory(Rank(kl=False)).teacher == 0


def test_what_is_offloaded_is_counted_on_the_host() -> None:
    shape = LLAMA.shape(WIDE)
    student, teacher = _folded(shape).parameters, shape.parameters
    plain = Rank(rows=4, length=64, bf16=False, checkpointing="block")
    for gpus in (1, 4):
        here = replace(plain, gpus=gpus)
        before, after = _memory(here), _memory(replace(here, offload="parameters"))
        assert (before.host, after.host) == (0, (16 * student + 4 * teacher) // gpus)
        assert (after.parameters, after.teacher, after.moments) == (0, 0, 0)
        assert (after.activations, after.logits) == (before.activations, before.logits)
    inputs = 4 * 128 * 4 * 64  # of a block
    before, after = _memory(plain), _memory(replace(plain, offload="activations"))
    assert (after.host, before.activations - after.activations) == (4 * inputs, (4 - 2) * inputs)
    assert before == replace(after, host=0, activations=before.activations)
    both = _memory(replace(plain, offload="both"))
    assert both.host == _memory(replace(plain, offload="parameters")).host + after.host


def test_remedies_need_less_and_less() -> None:
    rank = Rank(rows=8, length=512, bf16=True)
    totals = [_memory(rank).total, *(_memory(each).total for _, each in remedies(rank))]
    assert totals == sorted(totals, reverse=True)
    flags = [words for words, _ in remedies(rank)]
    assert flags[:3] == [
        "--micro-batch 1",
        "--micro-batch 1 --checkpointing selective",
        "--micro-batch 1 --checkpointing block",
    ]
    assert [words for words, _ in remedies(Rank(checkpointing="block", gpus=512))][-1].endswith("--gpus 1024")


def test_a_plan_says_what_makes_it_fit(tmp_path: Path) -> None:
    seven = {**WIDE, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "vocab_size": 32_000}
    seven |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(seven))
    options = PlanSettings(hardware="h100", gpus=1)
    made = plan(tmp_path, settings={"kv_heads": 8}, options=options).training
    assert made is not None
    assert made.fits_with == "--checkpointing block --converted-only"
    fitting = plan(tmp_path, settings={"kv_heads": 8}, options=replace(options, gpus=16, checkpointing="block"))
    assert fitting.training is not None
    assert fitting.training.fits_with == ""
    assert ("  fits", "", "yes") in fitting.rows()
    assert plan(tmp_path, settings={"kv_heads": 8}).training is None
    narrow = plan(tmp_path, settings={"kv_heads": 8}, options=replace(options, memory_share=0.2)).training
    assert narrow is not None
    assert narrow.fits_with == "--checkpointing block --converted-only --offload both"
    offloaded = replace(options, memory_share=0.2, checkpointing="block", converted_only=True, offload="both")
    there = plan(tmp_path, settings={"kv_heads": 8}, options=offloaded).training
    assert there is not None
    assert there.fits_with == ""
    assert [value for name, _, value in there.rows("H100") if "of the host" in name] == ["33.8 GiB"]


WATCHED = """
import threading, time

import kvfold.train.uptrain as stage
from kvfold.train.placing import local
from kvfold.train.uptrain import UptrainSettings, uptrain

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

class Peak(threading.Thread):
    def __enter__(self):
        self.begin = self.peak = anonymous()
        self.over = False
        self.start()
        return self

    def run(self):
        while not self.over:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

    def __exit__(self, *error):
        self.over = True
        self.join()

found, place, train = {}, stage.place, stage.train

def watched_place(*args, **kwargs):
    with Peak() as watch:
        root = place(*args, **kwargs)
    found.update(begin=watch.begin, placed=watch.peak - watch.begin)
    found["own"] = sum(local(each).nbytes for each in root.parameters())
    return root

def watched_train(*args):
    with Peak() as watch:
        position = train(*args)
    found["trained"] = watch.peak - found["begin"]
    return position

stage.place, stage.train = watched_place, watched_train

def command():
    for student, out, settings in json.loads(Path(arguments[0]).read_text()):
        uptrain(student, out, UptrainSettings(**settings))

import atexit

atexit.register(lambda: print(json.dumps(found)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_a_rank_holds_its_share_and_what_is_predicted(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system
    big = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64}
    big |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096, "tie_word_embeddings": False}
    teacher = tiny_checkpoint("llama", name="big", **big)
    small = convert(tiny_checkpoint("llama", name="small"), tmp_path / "small student", "gqa", {"kv_heads": 1})
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2})
    length, rows = 64, 4
    options = {"data": str(text), "sequence_length": length, "batch_size": 2 * rows, "precision": "fp32"}
    options["tokens"] = 2 * 2 * rows * length
    jobs = [[str(small), str(tmp_path / "warm"), options], [str(student), str(tmp_path / "out"), options]]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    source, guide = Checkpoint.open(student), Checkpoint.open(teacher)
    rank = Rank(gpus=2, rows=rows, length=length, bf16=False)
    predicted = rank_memory(source.family, source.config, source.shape, guide.shape, rank)
    total = 4 * (source.shape.parameters + guide.shape.parameters)
    for said in on_ranks(WATCHED, [tmp_path / "jobs.json"]):
        found = json.loads(said.splitlines()[-1])
        assert found["own"] == pytest.approx(total / 2, rel=0.01)
        assert found["placed"] < 0.6 * total, "no rank holds a whole model while it is read"
        assert found["trained"] == pytest.approx(predicted.total, rel=0.15), predicted
