"""Layers with key/value heads of their own, against a stock model in which every head is written out in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from examples import APART
from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.predict.plan import PlanSettings, plan

HEADS = (4, 2, 1, 2)
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in APART},
    "llama, biases": ("llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": (
        "llama",
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6},
    ),
    "qwen2, windows": ("qwen2", WINDOWS),
    "qwen3, windows": ("qwen3", {**WINDOWS, "attention_bias": True}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.fixture(params=SOURCES)
def saved(request: pytest.FixtureRequest, layered_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of mixed heads."""
    family, changes = SOURCES[request.param]
    return layered_checkpoint(family, HEADS, **changes)


@pytest.fixture
def config(layered_checkpoint: Callable[..., Path]) -> dict[str, Any]:
    """The config.json of a llama of mixed heads."""
    return config_of(layered_checkpoint("llama", HEADS))


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def written_out(folder: Path) -> Any:
    """The stock model of four key/value heads in which each head of the checkpoint stands as often as it is read."""
    config = config_of(folder)
    overrides = config.pop("per_layer_config")
    assert overrides == {"0": {"num_key_value_heads": 4}, "2": {"num_key_value_heads": 1}}
    config |= {"model_type": config["model_type"].removeprefix("kvfold_"), "num_key_value_heads": 4}
    model, tensors = hf.build(config, seed=1, attention="eager").eval(), load_file(folder / "model.safetensors")
    source = Checkpoint.open(folder)
    for site, attention in source.shape.sites.items():
        roles = source.roles(site).roles
        for role in attention.head_roles:  # of a norm over all heads too
            rows = roles[role].unflatten(0, (HEADS[site.layer], -1))
            roles[role] = torch.stack([rows[query // (4 // len(rows))] for query in range(4)]).flatten(0, 1)
        whole = replace(attention, num_key_value_heads=4)
        for name, held in source.family.stored(site, whole).items():
            tensors[name] = source.family.joined(whole, {role: roles[role] for role in held})
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    model.tie_weights()  # type: ignore[operator]
    return model


def _ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.inference_mode()
def test_logits_are_those_of_the_heads_written_out(saved: Path) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__.startswith("Kvfold")
    ids = _ids(2, 20)
    assert [layer.keys.shape[1] for layer in model(ids).past_key_values.layers] == list(HEADS)
    expected = written_out(saved)(ids).logits
    assert expected.std() > 0.5  # or the comparison would say little
    _close(model(ids).logits, expected)
    _close(hf.load(saved)(ids).logits, expected)


# --- modules, configs and files ------------------------------------------------------------------------------------


def test_new_layers_start_as_the_others_do(config: dict[str, Any]) -> None:
    config |= {"hidden_size": 64, "initializer_range": 0.5}
    first, again, other = (hf.build(config, seed=seed) for seed in (3, 3, 4))
    for layer in (0, 2):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert float(first.get_parameter(name).detach().std()) == pytest.approx(0.5, rel=0.15)
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_every_layer_follows_a_switch_of_attention(config: dict[str, Any]) -> None:
    model: Any = hf.build(config, seed=0)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    with hf.with_attention(model, "eager"):
        weights = model(_ids(1, 5), output_attentions=True).attentions
    assert [tuple(each.shape) for each in weights] == [(1, 4, 5, 5)] * 4


@pytest.mark.slow
@torch.inference_mode()
def test_the_body_alone_loads(saved: Path) -> None:
    body = AutoModel.from_pretrained(saved)  # what vLLM's own backend for transformers builds
    model: Any = hf.load(saved)
    _close(body(_ids(1, 7)).last_hidden_state, model.model(_ids(1, 7)).last_hidden_state)


def test_equal_layers_need_no_list(layered_checkpoint: Callable[..., Path]) -> None:
    uniform = config_of(layered_checkpoint("llama", (2, 2, 2, 2)))
    assert (uniform["model_type"], uniform["num_key_value_heads"]) == ("llama", 2)
    assert "per_layer_config" not in uniform
    model: Any = hf.build(uniform | {"model_type": "kvfold_llama"}, seed=0)
    assert not model.config.is_heterogeneous
    assert {layer.self_attn.num_key_value_groups for layer in model.model.layers} == {2}


def test_a_layer_can_differ_in_nothing_else(config: dict[str, Any]) -> None:
    config["per_layer_config"]["1"] = {"intermediate_size": 64}
    with pytest.raises(SettingError, match="can change num_key_value_heads, and not intermediate_size"):
        hf.build(config, seed=0)


# --- conversions ---------------------------------------------------------------------------------------------------


def test_identity_keeps_the_config_as_it_is(saved: Path, tmp_path: Path) -> None:
    student = convert(saved, tmp_path / "student", "identity")
    assert (student / "config.json").read_bytes() == (saved / "config.json").read_bytes()
    assert Checkpoint.open(student).hash() == Checkpoint.open(saved).hash()


@pytest.mark.slow
@torch.inference_mode()
def test_a_mixed_model_folds_back_into_a_stock_one(saved: Path, tmp_path: Path) -> None:
    planned = plan(saved, "gqa", {"kv_heads": 1}, options=PlanSettings(context=4))  # before any window is full
    student = convert(saved, tmp_path / "student", "gqa", {"kv_heads": 1})
    config = json.loads((student / "config.json").read_text())
    stock = Checkpoint.open(saved).shape.model_type
    assert (config["model_type"], config["num_key_value_heads"]) == (stock, 1)
    assert "per_layer_config" not in config
    assert (planned.before.model_type, planned.after.model_type) == (f"kvfold_{stock}", stock)
    assert (planned.before.kv_heads, planned.after.kv_heads) == ("1 to 4", "1")
    assert planned.after.cache_bytes_per_token * sum(HEADS) == planned.before.cache_bytes_per_token * 4
    model, found = AutoModelForCausalLM.from_pretrained(student, output_loading_info=True)
    assert type(model).__name__ == config["architectures"][0]
    assert not found["missing_keys"]
    assert model(_ids(1, 5)).logits.isfinite().all()


def test_a_uniform_source_unfolds_into_a_mixed_student(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What a method with heads of each layer's own will do, through the same door."""
    from kvfold import methods
    from kvfold.contracts.method import Student
    from kvfold.methods import gqa

    class Pyramid(gqa.GQA):
        """Pools as gqa does, to fewer heads the higher the layer."""

        def student(self, config: gqa.Config, shape: Any) -> Student:
            sites = {site: replace(kept, num_key_value_heads=HEADS[site.layer]) for site, kept in shape.sites.items()}
            return Student(shape.with_sites(sites))

        def fold(self, group: Any, answers: Any, config: gqa.Config) -> Any:
            (site,) = group
            return super().fold(group, answers, replace(config, kv_heads=HEADS[site.layer]))

    teacher = tiny_checkpoint("qwen2")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(methods, "_PLUGINS", {"pyramid": Pyramid()})
        student = convert(teacher, tmp_path / "student", "pyramid", {"kv_heads": 4})
        planned = plan(teacher, "pyramid", {"kv_heads": 4})
    config = json.loads((student / "config.json").read_text())
    assert config["model_type"] == planned.after.model_type == "kvfold_qwen2"
    assert config["architectures"] == ["KvfoldQwen2ForCausalLM"]
    model: Any = hf.load(student)
    pooled = load_file(teacher / "model.safetensors")["model.layers.2.self_attn.k_proj.bias"].view(4, 8).mean(0)
    _close(model.model.layers[2].self_attn.k_proj.bias, pooled)
    loads = {engine.name: engine.loads for engine in planned.engines}
    assert loads == {"transformers": True, "vLLM": True, "llama.cpp": True, "CTranslate2": True, "SGLang": False}
    assert all(engine.how and engine.checked for engine in planned.engines)
    assert hf.load_tokenizer(student)("fold")["input_ids"] == hf.load_tokenizer(teacher)("fold")["input_ids"]
