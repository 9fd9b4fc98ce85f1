"""The plug-in of vLLM, beside a stand-in of vLLM's own classes; tests/export/test_serve_check.py runs the real one."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kvfold import hf
from kvfold.contracts.runtimes import IN_VLLM, LAYERS
from kvfold.families import all_families
from kvfold.hf import vllm_plugin

SOURCES = [0, 0, 2, 0]


class _Backend:
    """Stands for vLLM's TransformersForCausalLM: notes what it is given, and makes one attention for each layer."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.replaced = model, model.config, 0
        self.attention_fusers: dict[int, tuple[str, None]] = {}

    def recursive_replace(self) -> None:
        self.replaced += 1
        self.attention_fusers = {n: (f"layers.{n}.self_attn", None) for n in range(self.config.num_hidden_layers)}

    def _create_attention_instances(self, prefix: str = "") -> None:
        for path, _ in self.attention_fusers.values():
            made: Any = nn.Identity()
            made.layer_name, made.kv_sharing_target_layer_name = f"{path}.attn", None
            self.get_submodule(path).attn = made

    def get_submodule(self, path: str) -> Any:
        return self.model.get_submodule(path)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The architectures that are registered with a stand-in of vLLM."""
    registered: dict[str, str] = {}
    top, backend = types.ModuleType("vllm"), types.ModuleType("vllm.model_executor.models.transformers")
    top.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)  # type: ignore[attr-defined]
    backend.TransformersForCausalLM = _Backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", top)
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.delitem(sys.modules, "kvfold.hf.vllm_model", raising=False)
    yield registered
    sys.modules.pop("kvfold.hf.vllm_model", None)


def test_the_plug_in_registers_classes_that_exist_and_may_be_called_twice(vllm: dict[str, str]) -> None:
    for _ in range(2):
        vllm_plugin.register()
    assert set(vllm) == {"KvfoldLlamaForCausalLM", *(LAYERS.architecture(each, "ForCausalLM") for each in IN_VLLM)}
    for name, place in vllm.items():
        assert hasattr(hf.per_layer, name)
        module, _, cls = place.partition(":")
        assert issubclass(getattr(importlib.import_module(module), cls), _Backend)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_share_become_stock_layers_with_the_pool_of_their_owner(vllm: dict[str, str], family: str) -> None:
    config = all_families()[family].tiny() | {
        "model_type": f"kvfold_{family}",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "per_layer_config": {"2": {"num_key_value_heads": 1}},
        "kv_source_layers": SOURCES,
    }
    model: Any = hf.build(config, seed=0).base_model
    before = {name for name, _ in model.named_parameters()}
    made = importlib.import_module("kvfold.hf.vllm_model").Decoder(model)
    made.recursive_replace()
    assert made.replaced == 1
    attentions = [model.layers[layer].self_attn for layer in range(4)]
    stock = type(attentions[0])
    assert stock.__module__.startswith("transformers.")
    assert type(attentions[2]) is stock
    consuming = type(attentions[1])
    assert consuming is type(attentions[3]) is not stock
    assert consuming.forward is stock.forward  # whose source vLLM reads
    assert {name for name, _ in model.named_parameters()} == before
    keys = attentions[1].k_proj(torch.ones(1, 5, config["hidden_size"]))
    assert keys.shape == (1, 5, 2 * attentions[1].head_dim)
    assert not keys.any()
    assert not model._forward_pre_hooks
    made._create_attention_instances()
    targets = [each.attn.kv_sharing_target_layer_name for each in attentions]
    assert targets == [None, "layers.0.self_attn.attn", None, "layers.0.self_attn.attn"]


def test_a_model_whose_layers_share_nothing_is_left_alone(vllm: dict[str, str]) -> None:
    config = all_families()["llama"].tiny() | {
        "model_type": "kvfold_llama",
        "num_key_value_heads": 2,
        "per_layer_config": {"1": {"num_key_value_heads": 1}},
    }
    model: Any = hf.build(config, seed=0).base_model
    classes = [type(each) for each in model.modules()]
    made = importlib.import_module("kvfold.hf.vllm_model").Decoder(model)
    made.recursive_replace()
    made._create_attention_instances()
    assert [type(each) for each in model.modules() if not hasattr(each, "layer_name")] == classes
    assert {layer.self_attn.attn.kv_sharing_target_layer_name for layer in model.layers} == {None}
