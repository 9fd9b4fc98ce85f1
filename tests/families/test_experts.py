"""Experts stay as they are: on disk one tensor for each, in the model one for all. Sinks stay with their queries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold import hf
from kvfold.contracts.stacked import Stacked
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import KvfoldError, UnsupportedModel
from kvfold.families import all_families, family_of

SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "gpt_oss")


def test_a_stacked_parameter_is_cut_and_joined() -> None:
    gate_up = Stacked(("{expert}.gate", "{expert}.up"))
    whole = torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    apart = gate_up.apart(whole)
    assert torch.equal(apart["1.up"], whole[1, 2:])
    assert {name: tuple(each.shape) for name, each in apart.items()} == gate_up.forms((3, 4, 5))
    assert torch.equal(gate_up.whole(apart.__getitem__, 3), whole)
    renamed = Stacked(("other",))
    assert torch.equal(renamed.apart(whole)["other"], whole)
    assert torch.equal(renamed.whole({"other": whole}.__getitem__, 3), whole)


@pytest.mark.slow
@pytest.mark.parametrize("family", SPARSE)
def test_layers_are_those_of_the_model_and_experts_are_copied(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    student = convert(source, tmp_path / "student", "gqa", {"kv_heads": 2, "init": "mean"})
    before, after = (load_file(folder / "model.safetensors") for folder in (source, student))
    folded = {name for name in before if ".k_" in name or ".v_" in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - folded)
    model: Any = hf.load(student)
    with hf.Layers(Checkpoint.open(student)) as layers:
        for name, parameter in layers.open(1).module("").named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"model.layers.1.{name}"))


@pytest.mark.parametrize("role", ["gate", "down"])
def test_experts_are_not_repaired(role: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=(role,))
    with pytest.raises(KvfoldError, match=f"the MLP of family mixtral has no {role}"):
        convert(tiny_checkpoint("mixtral"), tmp_path / "student", "gqa", {"kv_heads": 2}, options=options)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is more than there are (got 5); allowed: 1 to 4"),
        ("mixtral", {"num_experts": 8}, "num_experts and num_local_experts are names of one number and differ"),
        ("olmoe", {"clip_qkv": 0.0}, "clip_qkv must be a number"),
        ("olmoe", {"clip_qkv": 8.0, "model_type": "kvfold_linear_olmoe"}, "clip_qkv is not null, and linear attention"),
        ("olmoe", {"head_dim": 16}, "head_dim is not that of this architecture (got 16); allowed: 8"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 0}, "use_sliding_window needs a sliding_window"),
        ("granitemoe", {"sliding_window": 6}, "sliding_window must be null"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window must be a positive whole number"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "the weights are quantised (mxfp4)"),
        ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.rope_theta is not a type of layer"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping must be null"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false or null"),
        ("gemma3", {"num_key_value_heads": 2}, "num_key_value_heads must be absent: it is the text part's"),
        ("gemma3", {"vision_config": {"model_type": "other"}}, "vision_config.model_type is not a vision model"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm must be false"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "layer_types must be given"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(family: str, changes: dict[str, Any], line: str) -> None:
    config = all_families()[family].tiny() | changes
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config).shape(config)
    assert line in str(caught.value)


def test_drafting_layers_are_left_out(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Their tensors are not of the model that transformers builds."""
    source = tiny_checkpoint("glm4_moe")
    file = source / "model.safetensors"
    tensors = load_file(file)
    more = {name.replace(".3.", ".4."): each.clone() for name, each in tensors.items() if ".layers.3." in name}
    save_file(tensors | more, file, metadata={"format": "pt"})
    student = convert(source, tmp_path / "student", "gqa", {"kv_heads": 2, "init": "mean"})
    assert load_file(student / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("old", [True, False])
def test_names_and_images_of_a_gemma3_stay(old: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Under the names of either version of transformers."""
    source = tiny_checkpoint("gemma3")
    file = source / "model.safetensors"
    tensors = load_file(file)
    assert "language_model.model.norm.weight" in tensors
    if not old:
        tensors = {all_families()["gemma3"].canonical(name): each for name, each in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    student = convert(source, tmp_path / "student", "gqa", {"kv_heads": 1, "init": "mean"})
    after = load_file(student / "model.safetensors")
    assert tensors.keys() == after.keys()
    seen = [name for name in tensors if "vision_tower" in name or "multi_modal_projector" in name]
    assert len(seen) > 20
    assert all(torch.equal(tensors[name], after[name]) for name in seen)
    config = Checkpoint.open(student).config
    assert config["text_config"]["num_key_value_heads"] == 1
    model: Any = hf.load(student)
    assert model.model.language_model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
