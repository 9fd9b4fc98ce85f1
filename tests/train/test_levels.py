"""Two levels of depth: the operators against their formulas, the run against its parts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import CORE
from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import steps_since_root
from kvfold.errors import Interrupted, SettingError
from kvfold.train import loop
from kvfold.train.depth import half_config, half_depth
from kvfold.train.levels import LEVELS, put_back
from kvfold.train.settings import UptrainSettings
from kvfold.train.uptrain import uptrain

Make = Callable[..., Path]
UNLIKE = ("smollm3",)  # families of CORE whose layers differ in twos
pytestmark = pytest.mark.usefixtures("alone")


def settings_of(text: Path, **more: Any) -> UptrainSettings:
    given = {"tokens": 256, "sequence_length": 16, "batch_size": 2, "loss": "kl+0.3ce", "precision": "fp32", **more}
    return UptrainSettings(data=str(text), **given)


def test_layers_merge_with_their_neighbours_by_the_mean(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", num_hidden_layers=4))
    half = Checkpoint.open(half_depth(source, tmp_path / "half"))
    assert half.shape.num_layers == 2
    assert [each for each in half.names() if ".1.mlp.up" in each] == ["model.layers.1.mlp.up_proj.weight"]
    for name in half.names():
        number = name.split(".")[2] if name.startswith("model.layers.") else None
        pair = (
            [name] if number is None else [name.replace(f".{number}.", f".{2 * int(number) + k}.", 1) for k in (0, 1)]
        )
        want = torch.stack([source.read(each).double() for each in pair]).mean(0)
        torch.testing.assert_close(half.read(name).double(), want, rtol=1e-6, atol=1e-7)
    assert half_depth(source, tmp_path / "half") == tmp_path / "half"  # complete


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE)
def test_a_half_loads_in_the_architecture_of_the_whole(family: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint(family))
    layers = source.shape.num_layers
    if source.family.encoder_decoder or not source.family.body.mlp or layers % 2 or family in UNLIKE:
        with pytest.raises(SettingError):
            half_depth(source, tmp_path / "half")
        return
    half = half_depth(source, tmp_path / "half")
    assert Checkpoint.open(half).shape.num_layers == layers // 2
    logits_BTV = hf.load(half)(torch.arange(6)[None]).logits
    assert bool(torch.isfinite(logits_BTV).all())


def test_the_half_is_put_back_by_its_share(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama"))
    half = Checkpoint.open(half_depth(source, tmp_path / "half"))
    made = dict(put_back(source, half, 0.25))
    name = "model.layers.1.self_attn.q_proj.weight"
    want = 0.75 * source.read(name).double() + 0.25 * half.read(name.replace(".1.", ".0.")).double()
    torch.testing.assert_close(made[name].double(), want, rtol=1e-6, atol=1e-7)
    assert set(made) == set(source.names())


def test_two_levels_are_the_half_trained_put_back_and_the_rest(
    tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama", num_attention_heads=4, num_key_value_heads=4)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2})
    asked = settings_of(text, levels=2, level_share=0.25)
    made = Checkpoint.open(uptrain(student, tmp_path / "made", asked, teacher=teacher))

    source = Checkpoint.open(student)
    half = half_depth(source, tmp_path / "half")
    trained = Checkpoint.open(uptrain(half, tmp_path / "trained", settings_of(text, tokens=64), teacher=teacher))
    start = hf.load(student)
    start.load_state_dict(dict(put_back(source, trained, 0.25)), strict=False)
    start.save_pretrained(tmp_path / "start")  # type: ignore[operator]
    for each in student.glob("tokenizer*"):
        (tmp_path / "start" / each.name).write_bytes(each.read_bytes())
    rest = uptrain(tmp_path / "start", tmp_path / "rest", settings_of(text, tokens=192), teacher=teacher)
    want = Checkpoint.open(rest)
    for name in made.names():
        torch.testing.assert_close(made.read(name), want.read(name), rtol=1e-5, atol=1e-6)

    step = steps_since_root(made)[-1]
    whole, small, guide = (each.shape.parameters for each in (source, trained, Checkpoint.open(teacher)))
    assert step["tokens"] == 256
    assert step["flops"] == 64 * (6 * small + 2 * guide) + 192 * (6 * whole + 2 * guide)
    assert not (tmp_path / "made" / LEVELS).exists()
    assert [each["stage"] for each in steps_since_root(made)] == ["convert", "uptrain"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_stopped_run_continues_on_either_level(
    steps: int, tiny_checkpoint: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the lower level (steps 1 and 3 of 4) and in the whole student (step 2 of 4)."""
    teacher = tiny_checkpoint("llama")
    asked = settings_of(text, levels=2, loss="ce")
    want = Checkpoint.open(uptrain(teacher, tmp_path / "want", asked)).hash()
    taken, step = [0], loop._Run.step

    def counted(run: Any) -> Any:
        taken[0] += 1
        found = step(run)
        if taken[0] == steps:
            run.asked = {**run.asked, "stop": True}
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "step", counted)
        with pytest.raises(Interrupted):
            uptrain(teacher, tmp_path / "out", asked)
    assert Checkpoint.open(uptrain(teacher, tmp_path / "out", asked)).hash() == want


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"num_hidden_layers": 3}, {}, "an odd number of layers"),
        ({}, {"loss": "ce+attention"}, "levels trains every parameter with kl and ce"),
        ({}, {"trainable": ("q",)}, "levels trains every parameter"),
    ],
)
def test_what_has_no_half_is_refused(
    changes: dict[str, Any], given: dict[str, Any], words: str, tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    student = tiny_checkpoint("llama", **changes)
    with pytest.raises(SettingError, match=words):
        uptrain(
            student, tmp_path / "out", replace(settings_of(text, levels=2), **{"loss": "ce", **given}), teacher=student
        )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("given", [{"levels": 3}, {"level_share": 0.0}, {"interpolation": 1.5}])
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    from kvfold.settings import decode

    with pytest.raises(SettingError):
        decode(UptrainSettings, {"data": "text", "tokens": 1, **given}, "uptrain")


def test_experts_and_encoder_decoders_have_no_half(tiny_checkpoint: Make) -> None:
    for family in ("mixtral", "t5"):
        with pytest.raises(SettingError, match=r"experts|decoder"):
            half_config(Checkpoint.open(tiny_checkpoint(family, name=family)))
