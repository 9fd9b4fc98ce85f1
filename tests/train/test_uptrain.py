"""The training loop against a hand-written one; continuing after any kind of end; what goes wrong; pre-training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvfold import hf, methods
from kvfold.contracts.stages import Learner, Stage
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import DataError, Interrupted, KvfoldError, OutputError, SettingError, TrainingError
from kvfold.families import all_families
from kvfold.methods import gqa
from kvfold.progress import Silent
from kvfold.settings import decode
from kvfold.text.tokens import token_file
from kvfold.train.loop import Work, parameter_groups, train
from kvfold.train.losses import Head, hidden_states, token_losses
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.settings import rate
from kvfold.train.stages import parse_loss, parse_stages
from kvfold.train.state import State
from kvfold.train.uptrain import UptrainSettings, uptrain
from plug import Plug

STEPS = 6
SMALL: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "tokens": STEPS * 64, "log_every": 1}


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def student(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return convert(tiny_checkpoint("llama", dtype="bfloat16"), tmp_path / "student", "gqa", {"kv_heads": 1})


def _settings(text: Path, **changes: Any) -> UptrainSettings:
    return UptrainSettings(data=str(text), **{**SMALL, **changes})


def _weights(path: Path) -> dict[str, bytes]:
    return {
        name: value.contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in load_file(path / "model.safetensors").items()
    }


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]


def _losses(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in _log(path) if "loss" in line]


# --- schedules, losses, loop ---------------------------------------------------------------------------------------


def test_schedules_in_closed_form() -> None:
    cosine = UptrainSettings(data="t", tokens=1, warmup=0.1, final_rate=0.2)
    rates = [rate(cosine, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    for step in range(10, 100):
        assert rates[step] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2)
    wsd = dataclasses.replace(cosine, schedule="wsd", decay=0.25, final_rate=0.0)
    rates = [rate(wsd, step, 100) for step in range(100)]
    assert rates[10:76] == [1.0] * 66
    for step in range(75, 100):
        assert rates[step] == pytest.approx(1 - math.sqrt((step - 75) / 25))
    flat = dataclasses.replace(wsd, warmup=0.0, decay=0.0)
    assert [rate(flat, step, 7) for step in range(7)] == [1.0] * 7


def test_the_loop_is_a_hand_written_loop_to_the_bit(student: Path, text: Path, tmp_path: Path) -> None:
    settings = _settings(text, loss="ce", precision="fp32", learning_rate=3e-3, clip=0.5)
    out = uptrain(student, tmp_path / "out", settings)
    model = hf.load(student).train()
    tokens = token_file(text, student)
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    losses = []
    for step in range(STEPS):
        ids = tokens.batch(step, seed=0, batch_size=4, length=16)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2  # 2% of 6 steps: no warmup
        optimizer.zero_grad()
        loss, _ = token_losses(hidden_states(model, ids[:, :-1]), Head.of(model), ids[:, 1:], {"ce": 1.0})
        loss.backward()
        nn.utils.clip_grad_norm_([*decaying, *others], 0.5)  # the norm is a sum in this order
        optimizer.step()
        losses.append(loss.item())
    assert [loss for _, loss in _losses(out)] == losses
    for name, parameter in model.state_dict().items():
        assert torch.equal(load_file(out / "model.safetensors")[name], parameter.bfloat16()), name


def test_the_loss_is_the_models_own(student: Path, text: Path, tmp_path: Path) -> None:
    out = uptrain(student, tmp_path / "out", _settings(text, loss="ce", precision="fp32", tokens=64))
    model, ids = (
        hf.load(student, attention="eager"),
        token_file(text, student).batch(0, seed=0, batch_size=4, length=16),
    )
    logits = model(input_ids=ids[:, :-1]).logits
    right = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert _losses(out) == [(1, pytest.approx(right, rel=1e-5))]


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(student: Path, text: Path, tmp_path: Path) -> None:
    whole = uptrain(student, tmp_path / "whole", _settings(text, precision="fp32", loss="kl+0.5ce"), teacher=None)
    parts = uptrain(student, tmp_path / "parts", _settings(text, precision="fp32", loss="kl+0.5ce", micro_batch=1))
    for one, other in zip(_log(whole)[:-1], _log(parts)[:-1], strict=True):
        for key in ("loss", "kl", "ce", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


@pytest.mark.slow
def test_training_brings_the_student_nearer_to_its_teacher(student: Path, text: Path, tmp_path: Path) -> None:
    for loss in ("kl", "ce", "attention"):
        settings = _settings(text, loss=loss, tokens=40 * 64, learning_rate=3e-3)
        losses = [value for _, value in _losses(uptrain(student, tmp_path / loss, settings))]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), loss


def test_the_trained_checkpoint(student: Path, text: Path, tmp_path: Path) -> None:
    out = uptrain(student, tmp_path / "out", _settings(text))
    made, source = Checkpoint.open(out), Checkpoint.open(student)
    assert made.config == source.config
    assert {name: made.spec(name) for name in made.names()} == {name: source.spec(name) for name in source.names()}
    assert made.tokenizer_hash == source.tokenizer_hash
    assert made.root_hash() == Checkpoint.open(tmp_path / "teacher").hash()
    assert made.lineage is not None
    assert made.lineage["hash"] == made.hash()
    step = made.lineage["steps"][-1]
    assert (step["stage"], step["tokens"], step["seed"], step["source"]) == ("uptrain", 384, 0, source.hash())
    assert step["settings"]["loss"] == "kl+0.3ce", "the default was written out"
    assert [line["step"] for line in _log(out)] == [*range(1, STEPS + 1), STEPS]
    assert _log(out)[-1]["done"] is True
    assert {path.name for path in out.iterdir()} - {path.name for path in student.iterdir()} == {"train.jsonl"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_frozen_parameters_stay_and_are_saved(student: Path, text: Path, tmp_path: Path) -> None:
    out = uptrain(student, tmp_path / "out", _settings(text, trainable=("k", "v"), learning_rate=1e-2))
    before, after = _weights(student), _weights(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "k_proj" in name or "v_proj" in name}
    with pytest.raises(SettingError, match=r"no role 'w'.*k, o, q, v"):
        uptrain(student, tmp_path / "other", _settings(text, trainable=("w",)))


# --- stages --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_what_was_converted_is_trained(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("qwen2")
    shared = convert(teacher, tmp_path / "shared", "cla", {"layout": "0,0,2,3"})
    out = uptrain(shared, tmp_path / "out", _settings(text, converted_only=True, learning_rate=1e-2))
    before, after = _weights(shared), _weights(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "layers.0.self_attn" in name or "layers.1.self_attn" in name}
    settings = _settings(text, converted_only=True, trainable=("q", "k"), loss="ce", learning_rate=1e-2)
    after = _weights(uptrain(shared, tmp_path / "some", settings))
    named = {f"model.layers.{n}.self_attn.{role}_proj.weight" for n, role in ((0, "q"), (0, "k"), (1, "q"))}
    assert {name for name in before if before[name] != after[name]} == named
    with pytest.raises(SettingError, match="the model has no converted attention"):
        uptrain(teacher, tmp_path / "none", _settings(text, converted_only=True, loss="ce"))


def test_formulas_and_stages_are_read() -> None:
    assert parse_loss("kl+0.5ce") == {"kl": 1.0, "ce": 0.5}
    assert parse_loss(" .5*attention + ce ") == {"attention": 0.5, "ce": 1.0}
    assert [(stage.share, dict(stage.losses)) for stage in parse_stages("attention:0.1,kl+2ce:.9")] == [
        (0.1, {"attention": 1.0}),
        (0.9, {"kl": 1.0, "ce": 2.0}),
    ]


@pytest.mark.slow
def test_stages_follow_each_other_with_their_shares(student: Path, text: Path, tmp_path: Path) -> None:
    settings = _settings(text, stages="attention:0.34,kl:0.66", attention_inputs="teacher")
    lines = _log(uptrain(student, tmp_path / "out", settings))[:-1]
    assert [line["stage"] for line in lines] == ["attention"] * 2 + ["kl"] * 4
    assert "kl" not in lines[0]
    assert "attention" not in lines[2]


@pytest.mark.slow
def test_a_method_has_its_own_stages_rates_and_ends(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (
        Stage("first", 0.5, {"attention": 1.0}, trainable=("k", "v"), finish="halve"),
        Stage("second", 0.5, {"kl": 1.0}, rates={"q": 0.0}, scheduled=True),
    )
    ended: list[str] = []
    shares: list[float] = []

    class Toy(gqa.GQA):
        def stages(self, config: gqa.Config) -> tuple[Stage, ...]:
            return stages

        def end(self, finish: str, student: Learner, config: gqa.Config) -> None:
            ended.append(f"{finish} {config.kv_heads}")
            with torch.no_grad():
                student.model.get_submodule("model.norm").weight.mul_(0.5)  # type: ignore[operator]

        def during(self, stage: str, student: Learner, share: float, config: gqa.Config) -> torch.Tensor:
            shares.append(share)
            return 0.1 * share * student.model.get_submodule("model.embed_tokens").weight.square().sum()  # type: ignore[operator]

    monkeypatch.setitem(methods._PLUGINS, "toy", Toy())
    teacher = tiny_checkpoint("llama")
    student = convert(teacher, tmp_path / "toys", "toy", {"kv_heads": 2})
    settings = _settings(text, learning_rate=1e-3)

    whole = uptrain(student, tmp_path / "whole", settings)
    assert ended == ["halve 2"]
    assert [line["stage"] for line in _log(whole)[:-1]] == ["first"] * 3 + ["second"] * 3
    before, after = load_file(student / "model.safetensors"), load_file(whole / "model.safetensors")
    assert after["model.norm.weight"].mean() == pytest.approx(0.5 * before["model.norm.weight"].mean().item(), rel=0.02)
    assert all(torch.equal(before[name], after[name]) for name in before if "q_proj" in name), "a rate of 0"
    assert not any(torch.equal(before[name], after[name]) for name in before if "o_proj" in name)
    assert shares == [0, 1 / 3, 2 / 3]
    penalties = [line.get("penalty") for line in _log(whole)[:-1]]
    assert penalties[:4] == [None, None, None, 0]
    assert penalties[4] == pytest.approx(0.1 * before["model.embed_tokens.weight"].square().sum().item() / 3, rel=0.05)
    assert penalties[5] > 1.5 * penalties[4]

    with pytest.raises(RuntimeError, match="pulled the plug"):
        uptrain(student, tmp_path / "cut", dataclasses.replace(settings, checkpoint_steps=1), progress=Plug(5))
    cut = uptrain(student, tmp_path / "cut", settings)
    assert _weights(cut) == _weights(whole), "an end is passed again, and the weights come from the state"
    step = json.loads((cut / "kvfold.json").read_text())["steps"][-1]
    assert step["settings"]["stages"] == "attention:0.5,kl:0.5"


# --- continuing ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_broke_off_ends_as_if_it_had_not(student: Path, text: Path, tmp_path: Path) -> None:
    settings = _settings(text, loss="kl+ce", learning_rate=3e-3, checkpoint_steps=2)
    whole = uptrain(student, tmp_path / "whole", settings)
    for steps in (1, 3, 3):  # before the first state, after the second step's, after the fourth's
        with pytest.raises(RuntimeError, match="pulled the plug"):
            uptrain(student, tmp_path / "cut", settings, progress=Plug(steps))
    done = State(tmp_path / "cut.partial").position()
    assert done is not None
    assert done.step == 4
    assert not (tmp_path / "cut").exists()
    cut = uptrain(student, tmp_path / "cut", settings)
    assert _weights(cut) == _weights(whole)
    assert _losses(cut) == _losses(whole)
    assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_step(student: Path, text: Path, tmp_path: Path, kind: signal.Signals) -> None:
    settings, before = _settings(text), signal.getsignal(kind)
    with pytest.raises(Interrupted, match=r"stopped at step 3.*the same command continues") as caught:
        uptrain(student, tmp_path / "out", settings, progress=Plug(3, lambda: os.kill(os.getpid(), kind)))
    assert caught.value.exit_code == 130
    assert signal.getsignal(kind) is before
    again = uptrain(student, tmp_path / "out", settings)
    assert _weights(again) == _weights(uptrain(student, tmp_path / "whole", settings))


KILLED = """
import os, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)

from kvfold import hf  # everything is imported once; each child below is a fork
from kvfold.disk import output  # everything is imported once; each child below is a fork
from kvfold.train import state  # everything is imported once; each child below is a fork
from kvfold.progress import Silent
from kvfold.train.uptrain import UptrainSettings, uptrain

student, text, out = sys.argv[1:]
settings = UptrainSettings(
    data=text, tokens=12 * 64, sequence_length=16, batch_size=4, learning_rate=3e-3, log_every=1, checkpoint_steps=2,
    stages="attention:0.25,kl+ce:0.75",
)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class At(Silent):
    def __init__(self, step):
        self.step = step

    def advance(self, amount, note=""):
        self.step -= note.startswith("loss")
        if note and self.step == 0:
            die()

def torn(save, then):
    def half(tensors, file, metadata):
        save(tensors, file, metadata)
        os.truncate(file, file.stat().st_size // 2)
        then()
    return half

def child(kind, step):
    progress = At(step)
    if kind == "slot":
        state.save_file = torn(state.save_file, die)
    elif kind == "writing":
        state.background = lambda content: True
        state.save_file = torn(state.save_file, lambda: time.sleep(600))
    elif kind == "marker":
        state.write_json = lambda path, value: die()
    elif kind == "commit":
        output.Output.commit = lambda self: die()
    uptrain(student, out, settings, progress=progress)

ENDS = [
    ("step", 1), ("step", 3), ("slot", 0), ("marker", 0), ("writing", 4), ("step", 3), ("slot", 0), ("commit", 0),
    ("", 0),
]
for kind, step in ENDS:
    pid = os.fork()
    if not pid:
        child(kind, step)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    at = state.State(Path(out + ".partial")).position()
    print(kind or "end", "killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), at and at.step)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not(student: Path, text: Path, tmp_path: Path) -> None:
    settings = _settings(text, tokens=12 * 64, learning_rate=3e-3, stages="attention:0.25,kl+ce:0.75")
    whole = uptrain(student, tmp_path / "whole", settings)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(student), str(text), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.stdout.splitlines() == [
        "step killed None",  # before the first state
        "step killed 2",
        "slot killed 2",  # half of the other slot is written
        "marker killed 2",  # all of it, and the marker not yet turned
        "writing killed 2",  # the state of step 4 is being written while step 5 is computed
        "step killed 4",
        "slot killed 4",
        "commit killed None",  # everything is written but the name
        "end 0 None",
    ], ran.stderr
    assert _weights(tmp_path / "out") == _weights(whole)
    assert _losses(tmp_path / "out") == _losses(whole)


@pytest.mark.slow
def test_an_output_knows_its_inputs(student: Path, text: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    class Listener(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    settings, out = _settings(text), tmp_path / "out"
    uptrain(student, out, settings)
    before = (out / "model.safetensors").stat().st_mtime_ns
    uptrain(student, out, dataclasses.replace(settings, log_every=2, checkpoint_minutes=1.0), progress=Listener())
    assert "is complete" in lines[-1]
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="exists"):
        uptrain(student, out, dataclasses.replace(settings, seed=1))
    uptrain(student, out, dataclasses.replace(settings, seed=1), overwrite=True)
    assert (out / "model.safetensors").stat().st_mtime_ns != before
    with pytest.raises(OutputError, match="would overwrite the student"):
        uptrain(student, student, settings, overwrite=True)


# --- what goes wrong -----------------------------------------------------------------------------------------------


def _train_on(values: list[float], folder: Path, student: Path, text: Path, *, rises: bool = False) -> None:
    """Run the loop on losses that are written down."""
    weight = nn.Parameter(torch.ones(2, 2))
    model, left = nn.Module(), iter(values)
    model.register_parameter("weight", weight)
    folder.mkdir(exist_ok=True)

    def loss(ids: Tensor, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        return weight.sum() * 0 + next(left), {}

    works = [Work("ce", len(values), loss, lambda: parameter_groups({"weight": weight}, 0.0), rises=rises)]
    train(model, works, token_file(text, student), _settings(text, tokens=64 * len(values)), folder, Silent())


def test_a_loss_that_is_no_number_stops_with_the_last_good_state(student: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan at step 3.*lower learning rate") as caught:
        _train_on([2.0, 1.9, math.nan], tmp_path / "work", student, text)
    assert "\n" not in str(caught.value)
    done = State(tmp_path / "work").position()
    assert done is not None
    assert done.step == 2
    (slot,) = (tmp_path / "work" / "state-a").iterdir()
    kept = load_file(slot)
    assert set(kept) == {"weight", *(f"weight/{key}" for key in ("step", "exp_avg", "exp_avg_sq"))}
    assert all(each.isfinite().all() for each in kept.values())


def test_a_loss_that_diverges_stops(student: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss diverged, from 2\.0\d+ to \d+\.\d+ at step \d+"):
        _train_on([2.0] * 5 + [30.0] * 40, tmp_path / "work", student, text)
    _train_on([7.0, 5.0, 9.0, 4.0, 12.0, 3.0], tmp_path / "noisy", student, text)
    _train_on([2.0] * 5 + [30.0] * 40, tmp_path / "scheduled", student, text, rises=True)
    with pytest.raises(TrainingError, match="the loss is inf at step 2"):
        _train_on([2.0, math.inf], tmp_path / "infinite", student, text, rises=True)


@pytest.mark.parametrize(("narrow", "rate"), [(256, 1e-3), (1, 2e-4)])
def test_the_default_learning_rate_is_that_of_the_width(
    student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: int, rate: float
) -> None:
    monkeypatch.setattr("kvfold.train.settings.NARROW", narrow)
    settings = _settings(text, learning_rate=None, loss="ce", schedule="constant", warmup=0.0, log_every=1)
    out = uptrain(student, tmp_path / "out", settings)
    assert {line["lr"] for line in _log(out) if "lr" in line} == {rate}
    assert json.loads((out / "kvfold.json").read_text())["steps"][-1]["settings"]["learning_rate"] == rate


def test_a_learning_rate_that_is_too_high_is_an_error(student: Path, text: Path, tmp_path: Path) -> None:
    settings = _settings(text, learning_rate=1e30, loss="ce", warmup=0.0)
    with pytest.raises(TrainingError, match="at step 2"):
        uptrain(student, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokens": None}, "needs one of tokens and alpha .*neither"),
        ({"alpha": 0.05}, "needs one of tokens and alpha .*both"),
        ({"tokens": None, "alpha": -1.0}, "alpha must be positive"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"loss": "ke"}, "loss 'ke' is not known.*did you mean 'kl'|did you mean 'ce'"),
        ({"loss": "0kl"}, "must be positive and finite .*0kl"),
        ({"loss": "kl", "stages": "kl:1"}, "exclude each other"),
        ({"stages": "kl:0.5,ce:0.4"}, "do not add up to 1 .*0.9"),
        ({"stages": "kl"}, "'kl' is not LOSS:SHARE"),
        ({"attention_inputs": "teacher"}, "attention_inputs teacher"),
        ({"micro_batch": 3}, "micro_batch must divide batch_size"),
        ({"warmup": 1.5}, "warmup must be at most 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"beta1": 1.0}, "must be less than 1"),
        ({"lora": 0}, "lora must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
    ],
)
def test_invalid_settings(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SettingError, match=what) as caught:
        UptrainSettings(**{"data": "t.txt", **SMALL, **changes})
    assert "\n" not in str(caught.value)


def test_ranks_share_a_batch_in_equal_parts() -> None:
    settings = UptrainSettings(data="t.txt", tokens=1, batch_size=8)
    assert [settings.pass_rows(world) for world in (1, 2, 8)] == [8, 4, 1]
    assert dataclasses.replace(settings, micro_batch=2).pass_rows(2) == 2
    assert dataclasses.replace(settings, micro_batch=4).pass_rows(8) == 1
    for world in (3, 16):
        with pytest.raises(SettingError, match="the ranks must share a batch in equal parts"):
            settings.pass_rows(world)
    with pytest.raises(SettingError, match=r"replicas must divide the ranks \(got 2 replicas of 1 ranks\)"):
        dataclasses.replace(settings, replicas=2).pass_rows(1)


def test_an_unknown_setting_has_a_hint() -> None:
    with pytest.raises(SettingError, match="did you mean 'learning_rate'"):
        decode(UptrainSettings, {"data": "t", "tokens": "1M", "learning_rte": 1}, "uptrain")
    assert decode(UptrainSettings, {"data": "t", "tokens": "1M"}, "uptrain").tokens == 10**6


def test_alpha_needs_the_pretraining_tokens(student: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"number is not known.*--pretraining-tokens"):
        uptrain(student, tmp_path / "out", _settings(text, tokens=None, alpha=0.1))
    out = uptrain(student, tmp_path / "out", _settings(text, tokens=None, alpha=0.1, pretraining_tokens=1280))
    assert _log(out)[-1]["tokens"] == 128


def test_bad_text_writes_nothing(
    tiny_checkpoint: Callable[..., Path], student: Path, text: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too little")
    with pytest.raises(DataError, match="shorter than one batch"):
        uptrain(student, tmp_path / "out", _settings(short))
    small = tiny_checkpoint("llama", name="small", vocab_size=96)
    with pytest.raises(DataError, match="more tokens than the model has embeddings"):
        uptrain(small, tmp_path / "out", _settings(text, loss="ce"))
    with pytest.raises(SettingError, match=r"longer than the model's positions .*1 to 256"):
        uptrain(student, tmp_path / "out", _settings(text, sequence_length=257))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_the_teacher_is_the_root_and_has_the_same_vocabulary(
    tiny_checkpoint: Callable[..., Path], student: Path, text: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    out = uptrain(student, tmp_path / "out", _settings(text))
    step = json.loads((out / "kvfold.json").read_text())["steps"][-1]
    assert step["settings"]["teacher"] == Checkpoint.open(teacher).hash()
    with pytest.raises(SettingError, match=r"is not a student.*--teacher.*--loss ce"):
        uptrain(teacher, tmp_path / "t", _settings(text, loss="kl"))
    control = uptrain(teacher, tmp_path / "control", _settings(text))
    assert "ce" in _log(control)[0], "without a teacher the default is cross-entropy"
    other = tiny_checkpoint("llama", name="other", vocab_size=264)
    with pytest.raises(SettingError, match=r"different vocabularies .*264 tokens against 260"):
        uptrain(student, tmp_path / "o", _settings(text), teacher=other)
    spelled = tiny_checkpoint("llama", name="spelled")
    tokenizer = json.loads((spelled / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (spelled / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SettingError, match=r"different vocabularies .*another tokenizer"):
        uptrain(student, tmp_path / "o", _settings(text), teacher=spelled)
    away = convert(teacher, tmp_path / "far" / "away" / "from" / "it" / "student", "gqa", {"kv_heads": 1})
    uptrain(away, tmp_path / "a", _settings(text))  # not beside it: where it was converted is remembered
    teacher.rename(tmp_path / "moved")
    with pytest.raises(KvfoldError, match=r"teacher 'teacher' is not found.*--teacher PATH"):
        uptrain(student, tmp_path / "o", _settings(text))
    uptrain(student, tmp_path / "o", _settings(text), teacher=tmp_path / "moved")


@pytest.mark.slow
def test_text_sampled_from_the_teacher(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.text import tokens as token_files

    monkeypatch.setattr(token_files, "SAMPLED", 8)
    out = uptrain(student, tmp_path / "out", UptrainSettings(**{"data": "self", **SMALL, "tokens": 128}))
    step = json.loads((out / "kvfold.json").read_text())["steps"][-1]
    assert step["settings"]["text"].startswith(f"self:{Checkpoint.open(tmp_path / 'teacher').hash()}")


# --- pre-training --------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> dict[str, Any]:
    return {**all_families()["llama"].tiny(), "vocab_size": 300, "num_hidden_layers": 2, "dtype": "bfloat16", **changes}


@pytest.mark.slow
def test_pretrain_makes_a_checkpoint_that_stock_transformers_loads(text: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(**{"data": str(text), **SMALL, "tokens": 60 * 64})
    out = pretrain(_config(tie_word_embeddings=True), tmp_path / "model", settings)
    model, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert words.decode(words("7 lazy dogs").input_ids) == "7 lazy dogs"
    assert words.eos_token_id == words.bos_token_id == model.config.eos_token_id == 0
    assert len(words) == 300
    assert model(**words("7 lazy dogs", return_tensors="pt")).logits.isfinite().all()
    losses = [loss for _, loss in _losses(out)]
    assert losses[-1] < 0.8 * losses[0]
    made = Checkpoint.open(out)
    assert made.lineage is not None
    assert made.root_hash() == made.hash()
    assert made.lineage["steps"][0]["tokens"] == 60 * 64
    assert made.lineage["tokenizer"] == made.tokenizer_hash
    assert made.lineage["root"]["parameters"] == made.shape.parameters
    again = pretrain(_config(tie_word_embeddings=True), tmp_path / "again", settings)
    assert _weights(again) == _weights(out)
    student = convert(out, tmp_path / "student", "gqa", {"kv_heads": 1})
    trained = uptrain(student, tmp_path / "trained", _settings(text, tokens=None, alpha=0.05))
    assert _log(trained)[-1]["tokens"] == 3 * 64
    assert "kl" in _log(trained)[0]


@pytest.mark.slow
def test_a_pretraining_that_broke_off_ends_as_if_it_had_not(text: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(**{"data": str(text), **SMALL, "checkpoint_steps": 2})
    whole = pretrain(_config(), tmp_path / "whole", settings)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        pretrain(_config(), tmp_path / "cut", settings, progress=Plug(3))
    assert _weights(pretrain(_config(), tmp_path / "cut", settings)) == _weights(whole)


def test_pretrain_reads_configs_and_recipes(text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    (tmp_path / "recipe.yaml").write_text(
        f"config: {json.dumps(_config())}\npretrain: {{data: {text}, tokens: 64, sequence_length: 16, batch_size: 4}}\n"
    )
    settings = PretrainSettings(**{"data": str(text), **SMALL, "tokens": 64, "log_every": 10})
    one = pretrain(tmp_path / "config.json", tmp_path / "one", settings)
    two = pretrain(tmp_path / "recipe.yaml", tmp_path / "two")
    assert _weights(one) == _weights(two)
    three = pretrain(tmp_path / "recipe.yaml", tmp_path / "three", PretrainSettings(tokens=128))
    assert _log(three)[-1]["tokens"] == 128, "a flag goes over the recipe"
    (tmp_path / "wrong.yaml").write_text("config: {}\npretrain: {tokns: 64}\n")
    with pytest.raises(SettingError, match=r"'tokns'.*did you mean 'tokens'"):
        pretrain(tmp_path / "wrong.yaml", tmp_path / "four")


def test_pretrain_refuses_before_it_writes(text: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(**{"data": str(text), **SMALL})
    for config, changes, what in (
        (_config(vocab_size=96), {}, "vocab_size is too small .*96.*at least 257"),
        (_config(), {"tokens": None}, "the number of tokens is not set"),
        (_config(), {"sequence_length": 300}, "longer than the model's positions"),
        (_config(model_type="lama"), {}, "'lama' is not supported"),
        (_config(), {"batch_size": 400}, "shorter than one batch"),
        (_config(), {"data": str(tmp_path / "none.txt")}, "no such text"),
    ):
        with pytest.raises(KvfoldError, match=what):
            pretrain(config, tmp_path / "out", dataclasses.replace(settings, **changes))
    with pytest.raises(SettingError, match="no teacher"):
        PretrainSettings(data="self", tokens=1)
    assert not list(tmp_path.glob("out*"))
