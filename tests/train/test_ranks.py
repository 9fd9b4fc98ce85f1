"""Training on two ranks: every kind of student as one process trains it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import Interrupted
from kvfold.families import all_families
from kvfold.progress import Silent
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.state import State
from kvfold.train.uptrain import UptrainSettings, uptrain
from processes import on_ranks, start_ranks

pytestmark = pytest.mark.usefixtures("alone")

STEPS = 4
EIGHT = {"sequence_length": 16, "batch_size": 4, "tokens": 8 * 64, "log_every": 1, "precision": "fp32"}  # steps
ELITE = {"rope_chunks": 1, "latent_dim": 12, "samples": 200}
APART_EARLY = {"kv_heads": 2, "value_heads": 1, "servable": False, "search": 0.0, "fusion": 0.9, "fusion_rate": 10}
DECOUPLED = {
    "model_type": "kvfold_llama",
    "architectures": ["KvfoldLlamaForCausalLM"],
    "num_key_value_heads": 2,
    "value_heads": [[0, 1, 1, 0], None, [0, 1, 2, 3], [0, 0, 0, 0]],
}
CROSSED = {"kv_heads": "self=2,cross=1"}
TIED = {"tie_word_embeddings": True}
APART = {"stages": "attention:0.5,kl:0.5", "attention_inputs": "teacher"}
STUDENTS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    # source and its changes, method and its settings, settings of the training
    "grouped": ("llama", {}, "gqa", {"kv_heads": 1}, {}),
    "two copies": ("llama", {}, "gqa", {"kv_heads": 1}, {"replicas": 2}),
    "attention apart": ("llama", {}, "gqa", {"kv_heads": 1}, APART),
    "tied and frozen": ("qwen2", TIED, "gqa", {"kv_heads": 1}, {"converted_only": True, "micro_batch": 1}),
    "checkpointed": ("llama", {}, "gqa", {"kv_heads": 1}, {"checkpointing": "block", "loss": "kl"}),
    "two levels": ("llama", {}, "gqa", {"kv_heads": 1}, {"levels": 2, "tokens": 2 * STEPS * 64}),
    "lora": ("gpt_neox", {}, "gqa", {"kv_heads": 1}, {"lora": 2}),
    "shared layers": ("qwen2", {}, "cla", {"layout": "0,0,2,3"}, {"checkpointing": "selective"}),
    "latent": ("llama", {}, "elitekv", ELITE, {}),
    "state": ("llama", {}, "supra", {"preset": "hybrid", "window": 4, "sinks": 2, "keep_layers": 1}, {}),
    "compiled": ("llama", {}, "gqa", {"kv_heads": 1}, {"compile": True}),
    "fused": ("qwen2", {}, "dha", {"kv_heads": 2, "search": 0.25, "fusion": 0.5}, {}),
    "fused apart": (
        "llama",
        {},
        "dha",
        {**APART_EARLY, "tolerance": 1.0},
        {"learning_rate": 3e-3, "schedule": "constant"},
    ),
    "decoupled": ("llama", DECOUPLED, "identity", {}, {"checkpointing": "selective"}),
    "fading": ("t5", {}, "fido", {"cross_every": 2, "fade": 0.5}, {}),
    "experts": ("qwen3_moe", {}, "gqa", {"kv_heads": 1}, {"optimizer": "adamw"}),
    "t5": ("t5", {}, "gqa", CROSSED, {"checkpointing": "block"}),
    "t5 latent": ("t5", {}, "crosslatent", {"cross_latent_dim": 12}, {"data": "pairs"}),
    "bart": ("bart", {}, "gqa", CROSSED, {"data": "pairs", "loss": "kl+ce"}),
    "t5gemma": ("t5gemma", {}, "gqa", CROSSED, {}),
}
TRAIN = """
from functools import partialmethod

from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.uptrain import UptrainSettings, uptrain

torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # which needs no compiler

def command():
    for student, out, settings in json.loads(Path(arguments[0]).read_text()):
        if isinstance(student, dict):
            pretrain(student, out, PretrainSettings(**settings))
        else:
            uptrain(student, out, UptrainSettings(**settings))
"""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()][:-1]


@pytest.mark.slow
def test_every_kind_of_student_trains_on_two_ranks_as_on_one(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{'abc ' * (1 + n % 3)}\t{'de ' * (1 + n % 5)}\n" for n in range(24)))
    jobs = []
    for name, (family, changes, method, folded, options) in STUDENTS.items():
        teacher = tiny_checkpoint(family, name=f"{name} teacher", **changes)
        student = convert(teacher, tmp_path / f"{name} student", method, folded)
        settings = {
            "data": str(text),
            "sequence_length": 16,
            "batch_size": 4,
            "tokens": STEPS * 64,
            "log_every": 1,
            "precision": "fp32",
            "dropout": 0.0,
            **options,
        }
        settings["data"] = str({"pairs": pairs}.get(settings["data"], text))
        plain = {**settings, "replicas": 1, "checkpointing": "none", "compile": False}
        uptrain(student, tmp_path / f"{name} one", UptrainSettings(**plain))
        jobs.append([str(student), str(tmp_path / f"{name} two"), settings])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    on_ranks(TRAIN, [tmp_path / "jobs.json"])
    for name in STUDENTS:
        one, two = _lines(tmp_path / f"{name} one"), _lines(tmp_path / f"{name} two")
        assert len(one) == len(two) == STEPS
        for ours, theirs in zip(one, two, strict=True):
            assert theirs["stage"] == ours["stage"], (name, ours["step"])
            for key in ("loss", "lr"):
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5), (name, ours["step"], key)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3), (name, ours["step"])
        there = {path.name for path in (tmp_path / f"{name} two").iterdir()}
        assert there == {path.name for path in (tmp_path / f"{name} one").iterdir()}, "no file of a rank is left"


@pytest.mark.slow
def test_four_ranks_train_as_one(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Twenty steps of a model sharded over four ranks, and of two copies that are each sharded over two."""
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 1})
    options = {"data": str(text), "sequence_length": 16, "batch_size": 8, "tokens": 20 * 128, "log_every": 1}
    options |= {"precision": "fp32", "learning_rate": 3e-3}
    uptrain(student, tmp_path / "one", UptrainSettings(**options))
    jobs = [[str(student), str(tmp_path / f"{copies}"), {**options, "replicas": copies}] for copies in (1, 2)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    on_ranks(TRAIN, [tmp_path / "jobs.json"], world=4)
    losses = [[line["loss"] for line in _lines(tmp_path / name)] for name in ("one", "1", "2")]
    assert len(losses[0]) == 20
    assert losses[0][-1] < losses[0][0] - 0.01, "it learns"
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=1e-5)


FRESH: dict[str, dict[str, Any]] = {  # config.json of what is pre-trained
    "llama": {**all_families()["llama"].tiny(), "vocab_size": 300},
    "tied": {**all_families()["qwen2"].tiny(), "vocab_size": 300, "tie_word_embeddings": True},
    "t5": {**all_families()["t5"].tiny(), "vocab_size": 400, "dropout_rate": 0.0},
}


@pytest.mark.slow
def test_a_model_is_pretrained_on_two_ranks_as_on_one(text: Path, tmp_path: Path) -> None:
    """From the same random weights, to the same losses; what is written is a whole checkpoint with its tokenizer."""
    options = {"data": str(text), "sequence_length": 16, "batch_size": 4, "tokens": STEPS * 64, "log_every": 1}
    options |= {"precision": "fp32"}
    jobs = [[config, str(tmp_path / f"{name} two"), options] for name, config in FRESH.items()]
    for name, config in FRESH.items():
        pretrain(config, tmp_path / f"{name} one", PretrainSettings(**options))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    on_ranks(TRAIN, [tmp_path / "jobs.json"])
    for name in FRESH:
        one, two = tmp_path / f"{name} one", tmp_path / f"{name} two"
        for ours, theirs in zip(_lines(one), _lines(two), strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5), (name, ours["step"])
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3), (name, ours["step"])
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        assert load_file(one / "model.safetensors").keys() == load_file(two / "model.safetensors").keys()
        assert Checkpoint.open(two).lineage["steps"][0]["tokens"] == STEPS * 64


STOPPED = """
from kvfold.progress import Silent
from kvfold.train.uptrain import UptrainSettings, uptrain

class At(Silent):
    left = 4

    def advance(self, amount, note=""):
        self.left -= note.startswith("loss")
        if self.left == 0:
            os._exit(0)

def command():
    student, settings, out = arguments[0], UptrainSettings(**json.loads(arguments[1])), Path(arguments[2])
    uptrain(student, out / "whole", settings)
    uptrain(student, out / "cut", settings, progress=At())
"""


@pytest.mark.slow
def test_a_state_continues_on_as_many_ranks_bit_for_bit_and_on_others_within_rounding(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 1})
    options = {**EIGHT, "data": str(text), "checkpoint_steps": 3, "converted_only": True}
    for each in start_ranks(STOPPED, [student, json.dumps(options), tmp_path]):
        each.communicate()
    kept = {path.name: load_file(path) for path in (tmp_path / "cut.partial" / "state-a").iterdir()}
    assert len(kept) == 2, "a file of each rank"
    names = {name for each in kept.values() for name in each if "/" not in name}
    assert names == {name for name in load_file(student / "model.safetensors") if "self_attn" in name}
    shutil.copytree(tmp_path / "cut.partial", tmp_path / "one.partial")
    with pytest.raises(Interrupted):
        uptrain(student, tmp_path / "back", UptrainSettings(**options), progress=_Stop(4))
    jobs = [[str(student), str(tmp_path / name), options] for name in ("cut", "back")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    on_ranks(TRAIN, [tmp_path / "jobs.json"])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    last = _lines(tmp_path / "whole")[-1]["loss"]
    assert _lines(tmp_path / "cut")[-1]["loss"] == last
    uptrain(student, tmp_path / "one", UptrainSettings(**options))  # one rank, from the state of two
    for name in ("one", "back"):  # and two ranks, from the state of one
        assert _lines(tmp_path / name)[-1]["loss"] == pytest.approx(last, rel=1e-5)


class _Stop(Silent):
    """Stop after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, amount: float, note: str = "") -> None:
        self.left -= note.startswith("loss")
        if self.left == 0:
            raise Interrupted("pulled the plug")


BEHIND = """
import errno, time

from kvfold.progress import Silent
from kvfold.train import state
from kvfold.train.uptrain import UptrainSettings, uptrain

student, settings, ends, outs = arguments[0], UptrainSettings(**json.loads(arguments[1])), arguments[2], arguments[3:]
write, files = state.save_file, []
state.background = lambda content: True

def save_file(tensors, file, metadata):
    files.append(file)
    if ranks.current().rank == 1 and ends == "full" and len(files) == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    write(tensors, file, metadata)
    while ranks.current().rank == 1 and ends == "late" and not Path(outs[0] + ".later").exists():
        time.sleep(0.01)

state.save_file = save_file

class At(Silent):
    left = 4

    def advance(self, amount, note=""):
        self.left -= note.startswith("loss")
        if self.left == 0 and ends == "late":
            os._exit(len(files))

def command():
    for out in outs:
        uptrain(student, out, settings, progress=At())
"""


@pytest.mark.slow
def test_a_state_counts_once_every_rank_has_written_it(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Killed while one of two ranks still writes; then the disk of that rank is full; then nothing goes wrong."""
    student = convert(tiny_checkpoint("llama", num_hidden_layers=1), tmp_path / "student", "gqa", {"kv_heads": 1})
    options = {**EIGHT, "data": str(text), "checkpoint_steps": 2}
    given, cut, whole = [student, json.dumps(options)], tmp_path / "cut", tmp_path / "whole"
    state = State(tmp_path / "cut.partial")

    running = start_ranks(BEHIND, [*given, "late", cut])
    _, said = running[0].communicate()
    assert running[0].returncode == 1, said  # at step 4, after one file
    assert state.position() is None
    cut.with_name("cut.later").touch()
    running[1].communicate()
    assert state.position() is None

    running = start_ranks(BEHIND, [*given, "full", cut])
    for _, said in [each.communicate() for each in running]:
        line = said.splitlines()[-1]
        assert f"OutputError: {cut}.partial: the disk is full; free some space" in line, said
    done = state.position()
    assert done is not None
    assert done.step == 2

    on_ranks(BEHIND, [*given, "", cut, whole])
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [line["loss"] for line in _lines(cut)] == [line["loss"] for line in _lines(whole)]
    assert len(_lines(cut)) == 8
