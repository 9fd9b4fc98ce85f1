"""fido: cross-attention in some decoder layers alone, against stock layers that are given no encoder output."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples import paired, read
from kvfold import hf, methods
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import Shape
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.methods.fido import Config, kept_layers
from kvfold.predict.plan import plan
from kvfold.train.stages import learner
from kvfold.train.uptrain import UptrainSettings, uptrain
from plug import Plug
from tolerance import assert_same

Make = Callable[..., Path]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7


def shape_of(layers: int) -> Shape:
    family = all_families()["t5"]
    return family.shape({**family.tiny(), "num_decoder_layers": layers})


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        found = model(**read(model, ids_BT.flip(1)), decoder_input_ids=ids_BT).logits
    assert isinstance(found, Tensor)
    return found


def unread(model: Any, layers: set[int]) -> Any:
    """A stock model whose layers with these numbers are given no encoder output, as FiDO's authors give none."""

    def hide(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature(layer.forward).bind(*args, **kwargs)
        bound.arguments["encoder_hidden_states"] = None
        return bound.args, bound.kwargs

    decoder = model.get_decoder()
    for number, layer in enumerate(decoder.block if hasattr(decoder, "block") else decoder.layers):
        if number in layers:
            layer.register_forward_pre_hook(hide, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("layers", "every", "kept"),
    [(24, 6, [5, 11, 17, 23]), (24, 4, [3, 7, 11, 15, 19, 23]), (7, 3, [2, 5]), (6, 6, [5]), (3, 1, [0, 1, 2])],
)
def test_the_layers_that_keep_it_are_those_of_flaxformer(layers: int, every: int, kept: list[int]) -> None:
    """`architectures/fido/fido_architecture.py`: of 24 layers with a period of 6, its docstring names 5, 11, 17, 23."""
    assert kept_layers(Config(cross_every=every), shape_of(layers)) == kept


@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "m2m_100", "whisper"])
def test_a_student_is_the_source_whose_other_layers_read_no_input(
    name: str, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    family, changes = paired().get(name, (name, {}))
    source = tiny_checkpoint(family, tokenizer=False, dtype="float64", **changes)
    student = convert(source, tmp_path / "student", "fido", {"cross_layers": "1,2"})
    ids_BT = ids(2, 12)
    expected = logits(unread(hf.load(source, dtype="float64"), {0, 3}), ids_BT)
    assert_same(logits(hf.load(student, dtype="float64"), ids_BT), expected, dtype=torch.float64)
    left, whole = load_file(student / "model.safetensors"), load_file(source / "model.safetensors")
    assert all(torch.equal(tensor, whole[key]) for key, tensor in left.items())
    inside = Checkpoint.open(source).family.body.layers
    assert {int(key.removeprefix(inside).split(".")[1]) for key in whole.keys() - left.keys()} == {0, 3}


@pytest.mark.parametrize("family", ["t5", "t5gemma"])
def test_heads_and_a_latent_come_on_top(family: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tokenizer=False, dtype="float64")
    sparse = convert(source, tmp_path / "sparse", "fido", {"cross_every": 2})
    shared = convert(sparse, tmp_path / "shared", "gqa", {"kv_heads": 2})
    latent = convert(shared, tmp_path / "latent", "crosslatent", {})
    models = [hf.load(each, dtype="float64") for each in (shared, latent)]
    assert_same(*(logits(model, ids(2, 6)) for model in models), dtype=torch.float64)
    for model, folder, elements in zip(models, (shared, latent), (2 * 2 * 2 * 8, 32), strict=True):
        spec, cache = grouped_cache(Checkpoint.open(folder).shape), hf.new_cache(model, "growing", 6)
        hf.read(model, ids(2, 6), cache, hf.encode(model, ids(2, 9)))
        assert spec.bytes_per_encoder_token(8) == 8 * elements
        assert hf.live_cache_bytes(cache) == spec.bytes(6, batch=2, itemsize=8, encoder_tokens=9)


def test_auto_keeps_the_layers_whose_removal_costs_most(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5")
    lines = [f"{'abcdefgh'[:4]} {number}\tijkl {number}" for number in range(10, 40)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    options = ConvertSettings(calibration=str(tmp_path / "pairs.tsv"), repair=())
    student = convert(source, tmp_path / "s", "fido", {"cross_every": 2, "cross_layers": "auto"}, options=options)
    step = json.loads((student / "kvfold.json").read_text())["steps"][-1]
    tokenizer = hf.load_tokenizer(source)
    given, wanted = (tokenizer([line.split("\t")[n] for line in lines], return_tensors="pt").input_ids for n in (0, 1))
    end = torch.full((30, 1), tokenizer.eos_token_id)
    inputs = {"input_ids": torch.cat([given, end], 1), "decoder_input_ids": torch.cat([0 * end, wanted], 1)}
    with torch.inference_mode():
        p_BTV = hf.load(source)(**inputs).logits.log_softmax(-1)
        for layer in range(4):
            q_BTV = unread(hf.load(source), {layer})(**inputs).logits.log_softmax(-1)
            kl = float((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean())
            assert step["found"]["kl"][str(layer)] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    costs = {int(layer): kl for layer, kl in step["found"]["kl"].items()}
    dearest = sorted(sorted(costs, key=lambda layer: costs[layer])[2:])
    assert [site.layer for site in Checkpoint.open(student).shape.crossed] == dearest
    assert step["settings"]["cross_layers"] == ",".join(map(str, dearest))


@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100", "t5gemma"])
def test_a_gate_leads_from_the_teacher_to_the_student(name: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    family, changes = paired().get(name, (name, {}))
    source = tiny_checkpoint(family, tokenizer=False, **changes)
    fading: Any = hf.load(convert(source, tmp_path / "fading", "fido", {"cross_every": 2, "fade": 0.5}))
    removed = hf.load(convert(source, tmp_path / "removed", "fido", {"cross_every": 2}))
    teacher, ids_BT, found = hf.load(source), ids(2, 9), []
    student = learner(Checkpoint.open(tmp_path / "fading"), fading)
    method, config = methods.get("fido"), Config(cross_every=2, fade=0.5)
    for share in (0.0, 0.5, 1.0):
        assert method.during("fade", student, share, config) is None
        found.append(logits(fading, ids_BT))
    assert torch.equal(found[0], logits(teacher, ids_BT))
    assert not torch.equal(found[1], found[0])
    assert torch.equal(found[2], logits(removed, ids_BT)) or name == "bart"
    method.end("", student, config)
    assert torch.equal(logits(fading, ids_BT), logits(removed, ids_BT))
    assert {key for key, _ in fading.named_parameters()} == {key for key, _ in removed.named_parameters()}


@pytest.mark.usefixtures("alone")
def test_uptraining_fades_and_removes_the_branches(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5")
    fading = convert(source, tmp_path / "fading", "fido", {"cross_every": 2, "fade": 0.5})
    settings = UptrainSettings(data=str(text), tokens=4 * 32, sequence_length=16, batch_size=2, log_every=1)
    trained = Checkpoint.open(uptrain(fading, tmp_path / "trained", settings))
    removed = Checkpoint.open(convert(source, tmp_path / "removed", "fido", {"cross_every": 2}))
    assert trained.shape == removed.shape
    assert set(trained.names()) == set(removed.names())
    hf.load(trained.path)  # strictly
    lines = [json.loads(line) for line in (trained.path / "train.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if "stage" in line] == ["fade"] * 2 + ["sparse"] * 2
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6), "the first step's student is the teacher"
    assert lines[2]["kl"] > 1e-6
    for steps in (1, 2):  # in the fading, and behind it
        with pytest.raises(RuntimeError, match="pulled the plug"):
            uptrain(fading, tmp_path / "cut", replace(settings, checkpoint_steps=1), progress=Plug(steps))
    cut = load_file(uptrain(fading, tmp_path / "cut", settings) / "model.safetensors")
    whole = load_file(trained.path / "model.safetensors")
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in cut)


def test_repair_stands_in_for_what_is_gone(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5")
    (tmp_path / "text.txt").write_text(TEXT * 8)
    options = {"calibration": str(tmp_path / "text.txt"), "effort": "quick", "calibration_tokens": 4000}
    found = []
    for number, repair in enumerate(((), ("o",), ("o", "down"))):
        made = ConvertSettings(**options, repair=repair)
        found.append(convert(source, tmp_path / str(number), "fido", {"cross_every": 4}, options=made))
    expected = logits(hf.load(source), ids(8, 30) % 90)
    lost = [float((logits(hf.load(each), ids(8, 30) % 90) - expected).square().mean()) for each in found]
    assert lost[2] < lost[1] < lost[0]


def test_what_it_refuses(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tiny_checkpoint("t5", tokenizer=False)
    latent = convert(source, tmp_path / "latent", "crosslatent", {})
    with pytest.raises(SettingError, match=r"share a latent.*convert with fido first"):
        convert(latent, tmp_path / "out", "fido", {"cross_every": 2})
    fading = convert(source, tmp_path / "fading", "fido", {"cross_every": 2, "fade": 0.1})
    with pytest.raises(SettingError, match="fade already"):
        convert(fading, tmp_path / "out", "fido", {"cross_every": 4})
    sparse = convert(source, tmp_path / "sparse", "fido", {"cross_every": 2})
    with pytest.raises(SettingError, match=r"layer without cross-attention.*allowed: layers 1, 3"):
        convert(sparse, tmp_path / "out", "fido", {"cross_layers": "0,1"})
    with pytest.raises(SettingError, match="no cross-attention"):
        convert(tiny_checkpoint(name="llama", tokenizer=False), tmp_path / "out", "fido", {"cross_every": 2})


@pytest.mark.parametrize("layers", [[], [3, 1], [1, 4], [1, 1]])
def test_a_config_that_names_other_layers_is_refused(layers: list[int]) -> None:
    family = all_families()["t5"]
    ours = {"model_type": "kvfold_t5", "architectures": ["KvfoldT5ForConditionalGeneration"]}
    with pytest.raises(UnsupportedModel, match=r"cross_attention_layers.*allowed: 0 to 3"):
        family.shape({**family.tiny(), **ours, "cross_attention_layers": layers})


def test_engines_know_no_such_layers(tiny_checkpoint: Make) -> None:
    planned = plan(tiny_checkpoint("t5", tokenizer=False), "fido", {"cross_every": 2})
    assert [each.name for each in planned.engines if each.loads] == ["transformers"]
    assert planned.after.cache_bytes_per_encoder_token * 2 == planned.before.cache_bytes_per_encoder_token
