"""Layers that group value heads apart from key heads, against a stock model in which every head is written out."""

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
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.contracts.cache import cached_by
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export.exporting import export
from kvfold.export.serve_check import serve_check
from kvfold.families import all_families, family_of
from kvfold.predict.plan import plan
from tolerance import assert_same

KEYS = (2, 4, 1, 2)
VALUES = ((0, 1, 1, 0), None, (0, 1, 2, 3), (1, 0, 1, 0))  # of each query head; None: that of its key head
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}),
    **{name: (name, {}) for name in ("qwen3", "phi", "gemma2", "gpt_oss")},
}


@pytest.fixture
def saved(layered_checkpoint: Callable[..., Path]) -> Path:
    """A llama with such layers."""
    return layered_checkpoint("llama", KEYS, None, VALUES)


def written_out(folder: Path) -> Any:
    """The stock model of four key/value heads in which each head of the checkpoint stands as often as it is read."""
    source = Checkpoint.open(folder)
    ours = ("per_layer_config", "value_heads")
    config = {name: value for name, value in source.config.items() if name not in ours}
    config |= {"model_type": source.shape.model_type, "num_key_value_heads": 4}
    model, tensors = hf.build(config, seed=1, attention="eager").eval(), load_file(folder / "model.safetensors")
    for site, attention in source.shape.sites.items():
        key_heads = [head // attention.query_group for head in range(4)]
        read = {"k": key_heads, "v": attention.value_heads or key_heads}
        roles = source.roles(site).roles
        for role in attention.head_roles:
            roles[role] = roles[role].unflatten(0, (-1, attention.head_dim))[list(read[role[0]])].flatten(0, 1)
        whole = replace(attention, num_key_value_heads=4, value_heads=None)
        for name, held in source.family.stored(site, whole).items():
            tensors[name] = source.family.joined(whole, {role: roles[role] for role in held})
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    model.tie_weights()
    return model


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, 90, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
@torch.inference_mode()
def test_logits_are_those_of_the_heads_written_out(name: str, layered_checkpoint: Callable[..., Path]) -> None:
    family, changes = SOURCES[name]
    saved = layered_checkpoint(family, KEYS, None, VALUES, **changes)
    stock, found = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = _ids(2, 20)
    expected = written_out(saved)(ids).logits
    for model in (stock.eval(), hf.load(saved)):
        assert_same(model(ids).logits, expected)


@torch.inference_mode()
def test_a_static_cache_has_other_widths_of_keys_and_values(saved: Path) -> None:
    model, ids = hf.load(saved), _ids(2, 9)
    whole = model(ids).logits
    cache = hf.new_cache(model, "static", 12)
    hf.read(model, ids[:, :6], cache)
    for token in range(6, 9):
        assert_same(hf.read(model, ids[:, token : token + 1], cache), whole[:, token])
    shape = Checkpoint.open(saved).shape
    assert hf.live_cache_bytes(cache) == 2 * 12 * 4 * sum(each.cached_elements for each in shape.sites.values())


def test_a_plan_counts_keys_and_values_apart(saved: Path) -> None:
    made = plan(saved, "identity")
    assert made.before.kv_heads == "1 to 4 of keys, 2 to 4 of values"
    assert made.before.cache_bytes_per_token == 4 * 8 * (2 + 2 + 4 + 4 + 1 + 4 + 2 + 2)
    assert [engine.name for engine in made.engines if engine.loads] == ["transformers"]
    assert cached_by(Checkpoint.open(saved).shape)["kv_heads"] is None


@pytest.mark.parametrize("engine", ["ctranslate2", "gguf"])
def test_other_engines_refuse_in_one_line(engine: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="reads the value head of a query's own key head.*without --no-servable"):
        export(saved, tmp_path / "out", engine)
    with pytest.raises(UnsupportedModel, match="reads the value head of a query's own key head.*without --no-servable"):
        serve_check(saved, {"gguf": "vllm"}.get(engine, engine))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gqa", "dha"])
def test_no_method_converts_such_layers_again(method: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="layer 0 groups its value heads apart from its key heads"):
        convert(saved, tmp_path / "student", method, {"kv_heads": 1})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([[0, 1, 1, 0]], "value_heads of 1 layers"),
        ([[0, 1], None, None, None], "of layer 0.*a value head for each of 4 query heads"),
        ([None, [0, 2, 2, 0], None, None], "of layer 1"),
        ([None, [0, 1, 1, 1], None, None], "of layer 1.*each read by as many"),
        ([None, [-1, 0, 0, -1], None, None], "of layer 1"),
    ],
)
def test_a_config_that_groups_values_unevenly_is_refused(values: Any, match: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text()) | {"value_heads": values}
    with pytest.raises(UnsupportedModel, match=match):
        family_of(config).shape(config)


def test_value_heads_go_neither_with_shared_layers_nor_with_every_architecture(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match="value_heads does not go with kv_source_layers"):
        family_of(config).shape(config | {"per_layer_config": None, "kv_source_layers": [0, 0, 2, 2]})
    stablelm = {
        **all_families()["stablelm"].tiny(),
        "model_type": "kvfold_stablelm",
        "value_heads": config["value_heads"],
    }
    with pytest.raises(UnsupportedModel, match="value_heads does not go with kvfold_stablelm"):
        family_of(stablelm).shape(stablelm)
