"""A GPT-NeoX read as a Phi computes the same logits, and its students are stock Phi."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.calibrate.decoder import CalibrationSettings, read
from kvfold.contracts.requests import QueryGram, SampledPairs
from kvfold.contracts.site import Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.rehoused import Rehoused
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.predict.plan import plan
from kvfold.solve.rope import frequencies
from kvfold.text.tokens import token_file
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]
IDS_BT = torch.arange(34).view(2, 17) + 40
OLD = {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 500, "hidden_act": "gelu_new"}
TIED = {"tie_word_embeddings": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("gpt_neox", {}),
    "old names": ("gpt_neox", {**OLD, "intermediate_size": 40}),
    "tied": ("gpt_neox", TIED),
    "no biases": ("gpt_neox", {"attention_bias": False}),
    "gptj": ("gptj", {}),
    "gptj, tied": ("gptj", {**TIED, "rotary_dim": 6, "n_inner": None}),
    "codegen": ("codegen", {"n_head": 8, "rotary_dim": 2}),
    "falcon": ("falcon", {"num_kv_heads": 2}),
    "gpt2": ("gpt2", {"n_inner": None}),
    "gpt2, tied": ("gpt2", TIED),
    "opt": ("opt", {}),
    "opt, no biases": ("opt", {"enable_bias": False, "activation_function": "gelu", **TIED}),
    "falcon, one norm": ("falcon", {"num_ln_in_parallel_attn": 1, "bias": True, **TIED}),
}


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS_BT, **more).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_view_computes_what_the_source_does(tiny_checkpoint: Make, kind: str) -> None:
    family, changes = KINDS[kind]
    source = Checkpoint.open(tiny_checkpoint(family, **changes))
    view = Rehoused(source)
    teacher = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    assert view.family.name not in (family, "rehoused")
    assert view.hash() == source.hash()
    ours = hf.build(view.config, seed=0).eval()
    missing = ours.load_state_dict({name: view.read(name) for name in view.names()}, strict=False)
    assert missing == ((["lm_head.weight"] if changes.get("tie_word_embeddings") else []), [])
    assert sum(parameter.numel() for parameter in ours.parameters()) == view.shape.parameters
    assert logits(teacher).std() > 0.1  # or the comparison would say little
    torch.testing.assert_close(logits(ours), logits(teacher), rtol=1e-5, atol=1e-5)
    mask_BT = torch.ones_like(IDS_BT)
    mask_BT[0, :6] = 0  # left padding
    where_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    padded = [logits(each, attention_mask=mask_BT, position_ids=where_BT)[0, 6:] for each in (ours, teacher)]
    torch.testing.assert_close(*padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pythia", "gpt2", "opt"])
def test_nothing_is_lost_in_float64(tiny_checkpoint: Make, kind: str) -> None:
    """Where both call kvfold's attention, whose softmax is not in float32."""
    family, changes = KINDS[kind]
    source = Checkpoint.open(tiny_checkpoint(family, dtype="float64", **changes))
    view, teacher = Rehoused(source), hf.load(source.path, dtype="float64")
    ours = hf.build(view.config, seed=0, attention=hf.ATTENTION, dtype="float64").eval()
    ours.load_state_dict({name: view.read(name) for name in view.names()})
    torch.testing.assert_close(logits(ours), logits(teacher), rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prefix", "masks"),
    [
        ("gpt2", "transformer.", {"h.{}.attn.bias": (1, 1, 8, 8)}),
        ("opt", "model.", {}),
        ("gptj", "", {"transformer.h.{}.attn.bias": (1, 1, 8, 8), "transformer.h.{}.attn.masked_bias": ()}),
        ("gpt_neox", "", {"gpt_neox.layers.{}.attention.bias": (1, 1, 8, 8)}),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_files_as_the_hub_has_them(
    tiny_checkpoint: Make, tmp_path: Path, family: str, prefix: str, masks: dict[str, Any], form: str
) -> None:
    """Saved without the head, whose prefix the names then lack, and with the masks of old releases."""
    teacher = tiny_checkpoint(family, tie_word_embeddings=family in ("gpt2", "opt"))
    expected = Checkpoint.open(convert(teacher, tmp_path / "plain", "gqa", {"kv_heads": 2}))
    tensors = {name.removeprefix(prefix): each for name, each in load_file(teacher / "model.safetensors").items()}
    tensors |= {name.format(layer): torch.ones(form) for name, form in masks.items() for layer in range(4)}
    (teacher / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, teacher / "pytorch_model.bin")
    else:
        save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint.open(teacher)
    assert len(source.buffers) == 4 * len(masks)
    assert source.family.tensor(Site(0), "q") in source.names()
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}))
    assert student.hash() == expected.hash()
    assert logits(hf.load(teacher)).isfinite().all()


@pytest.mark.parametrize("kind", ["pythia", "old names"])
def test_both_rotate_alike(tiny_checkpoint: Make, kind: str) -> None:
    source = Checkpoint.open(tiny_checkpoint("gpt_neox", **KINDS[kind][1]))
    rotary = AutoModelForCausalLM.from_pretrained(source.path).gpt_neox.rotary_emb
    for attention in (source.shape.sites[Site(1)], Rehoused(source).shape.sites[Site(1)]):
        assert attention.rope is not None
        torch.testing.assert_close(frequencies(attention.rope)[0].float(), rotary.inv_freq, rtol=1e-6, atol=0)


def test_queries_and_keys_of_a_packed_map_are_those_of_the_view(tiny_checkpoint: Make) -> None:
    source = Checkpoint.open(tiny_checkpoint("gpt_neox"))
    requests = [QueryGram(Site(2)), SampledPairs(Site(2), 20)]
    answers = [read(each, requests, list(IDS_BT), CalibrationSettings()) for each in (source, Rehoused(source))]
    for request in requests:
        for name, expected in answers[0][request].items():
            torch.testing.assert_close(answers[1][request][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_maps_are_rounded_once_to_the_format_of_the_source(tiny_checkpoint: Make, dtype: str) -> None:
    source = Checkpoint.open(tiny_checkpoint("gpt_neox", dtype=dtype))
    view = Rehoused(source)
    packed, norm = (
        source.read(f"gpt_neox.layers.1.{name}.weight") for name in ("attention.query_key_value", "input_layernorm")
    )
    exact = packed.view(4, 3, 8, 32)[:, 1].reshape(32, 32).double() * norm.double()
    assert torch.equal(view.read("model.layers.1.self_attn.k_proj.weight"), exact.to(getattr(torch, dtype)))


@pytest.mark.slow
def test_a_student_is_a_stock_phi_of_the_source_that_was_given(
    tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("gpt_neox")
    planned = plan(teacher, "gqa", {"kv_heads": 2})
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, effort="thorough")
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}, options=options))
    assert (planned.before.model_type, planned.after.model_type) == ("gpt_neox", "phi")
    assert planned.after.parameters == student.shape.parameters == sum(student.spec(n).numel for n in student.names())
    config = json.loads((student.path / "config.json").read_text())
    assert (config["architectures"], config["num_key_value_heads"]) == (["PhiForCausalLM"], 2)
    assert student.lineage is not None
    assert student.lineage["root"]["hash"] == Checkpoint.open(teacher).hash()
    assert student.lineage["root"]["config"]["model_type"] == "gpt_neox"
    assert student.lineage["steps"][-1]["settings"]["repair"] == ["q", "o", "up", "down"]
    model, found = AutoModelForCausalLM.from_pretrained(student.path, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model), logits(hf.load(student.path)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_repair_brings_a_student_nearer(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    teacher, off = tiny_checkpoint("gpt_neox"), []
    tensors = load_file(teacher / "model.safetensors")
    sharper = {name: tensor * 3 if name.endswith("value.weight") else tensor for name, tensor in tensors.items()}
    save_file(sharper, teacher / "model.safetensors", metadata={"format": "pt"})
    read = token_file(str(text), teacher, max_tokens=2000).tokens[:1024].astype("int64")
    ids_BT = torch.from_numpy(read).view(4, 256)
    for repair in ((), ("q", "o"), ("q", "o", "up", "down")):
        options = ConvertSettings(calibration=str(text), calibration_tokens=2000, repair=repair)
        student = convert(teacher, tmp_path / "-".join(("student", *repair)), "gqa", {"kv_heads": 1}, options=options)
        with torch.inference_mode():
            found, expected = (hf.load(each)(ids_BT).logits for each in (student, teacher))
        off.append(float((found - expected).square().mean()))
    assert off[2] < 0.9 * off[1] < 0.8 * off[0], off


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("supra", {}, r"supra: phi has no classes for linear attention"),
        ("elitekv", {"rope_chunks": 1, "latent_dim": 8}, r"elitekv: phi has no classes for latent keys and values"),
    ],
)
def test_students_without_classes_are_refused_before_any_work(
    tiny_checkpoint: Make, tmp_path: Path, method: str, settings: dict[str, Any], line: str
) -> None:
    teacher = tiny_checkpoint("gpt_neox")
    for attempt in (
        lambda: plan(teacher, method, settings),
        lambda: convert(teacher, tmp_path / "student", method, settings),
    ):
        with pytest.raises((SettingError, UnsupportedModel), match=line):
            attempt()
    assert not list(tmp_path.glob("student*"))


@pytest.mark.parametrize("attempt", [plan, convert])
def test_layers_in_sequence_are_refused_with_the_reason(
    tiny_checkpoint: Make, tmp_path: Path, attempt: Callable[..., Any]
) -> None:
    teacher = tiny_checkpoint("gpt_neox", use_parallel_residual=False)
    given = (teacher,) if attempt is plan else (teacher, tmp_path / "student")
    with pytest.raises(UnsupportedModel, match=r"no field for key/value heads.*use_parallel_residual false") as told:
        attempt(*given, "gqa", {"kv_heads": 2})
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("student*"))


def test_the_source_itself_is_copied_and_trained_as_it_is(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    """The control of a student: the same tokens, in the source's own architecture."""
    teacher = tiny_checkpoint("gpt_neox", use_parallel_residual=False)
    same = Checkpoint.open(convert(teacher, tmp_path / "same", "identity"))
    assert same.hash() == Checkpoint.open(teacher).hash()
    settings = UptrainSettings(data=str(text), tokens=64, sequence_length=16, batch_size=2, loss="ce")
    trained = Checkpoint.open(uptrain(teacher, tmp_path / "trained", settings))
    assert trained.names() == Checkpoint.open(teacher).names()
    assert not torch.equal(logits(hf.load(trained.path)), logits(hf.load(teacher)))


@pytest.mark.slow
def test_a_student_learns_from_its_teacher_and_is_folded_again(
    tiny_checkpoint: Make, text: Path, tmp_path: Path
) -> None:
    """The teacher is found by the lineage, in an architecture of its own."""
    student = convert(tiny_checkpoint("gpt_neox"), tmp_path / "student", "gqa", {"kv_heads": 2})
    settings = UptrainSettings(data=str(text), tokens=64, sequence_length=16, batch_size=2, loss="kl")
    trained = uptrain(student, tmp_path / "trained", settings)
    again = Checkpoint.open(convert(trained, tmp_path / "again", "gqa", {"kv_heads": 1}))
    assert again.lineage is not None
    assert again.lineage["root"]["config"]["model_type"] == "gpt_neox"
    assert {each.num_key_value_heads for each in again.shape.sites.values()} == {1}
