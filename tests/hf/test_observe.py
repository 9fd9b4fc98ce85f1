"""What an attention is seen to do, against transformers' own model: its projections, rotation, masks and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvfold import hf
from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint

IDS_BT = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(0))
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "grouped, scaled rotation": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "biased": ("llama", {"attention_bias": True}),
    "mistral": ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def source(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    family, changes = request.param
    return Checkpoint.open(tiny_checkpoint(family, tokenizer=False, **changes))


def look(layers: hf.Layers, number: int, hidden_BTD: Tensor) -> hf.Attended:
    layer, family, site = layers.open(number), layers.source.family, Site(number)
    return hf.attend(layer, layer.owner(family.module(site)), layer.owner(family.tensor(site, "o")), hidden_BTD)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_all_that_is_seen_is_what_transformers_computes(source: Checkpoint) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    run = model(IDS_BT, output_hidden_states=True, output_attentions=True)
    cos_BTE, sin_BTE = model.model.rotary_emb(run.hidden_states[0], torch.arange(24)[None])
    layers = hf.Layers(source, attention=hf.WATCHED)
    for number, layer in enumerate(model.model.layers):
        hidden_BTD, shape, part = run.hidden_states[number], source.shape.sites[Site(number)], layer.self_attn
        seen = look(layers, number, hidden_BTD)
        x_BTD = hidden_BTD if shape.norms == "all_heads" else layer.input_layernorm(hidden_BTD)
        close(seen.input_BTD, x_BTD)
        q, k, v = (each(x_BTD) for each in (part.q_proj, part.k_proj, part.v_proj))
        if shape.norms == "all_heads":
            q, k = part.q_norm(q), part.k_norm(k)
        q, k, v = (each.view(3, 24, -1, 8) for each in (q, k, v))
        if shape.norms == "pre_rope":
            q, k = part.q_norm(q), part.k_norm(k)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos_BTE, sin_BTE)
        close(seen.query_BHTE, q)
        close(seen.key_BGSE, k)
        assert seen.scale == pytest.approx(8**-0.5)
        assert seen.cos_TE is not None
        assert seen.sin_TE is not None
        assert torch.equal(seen.cos_TE, cos_BTE[0])
        assert torch.equal(seen.sin_TE, sin_BTE[0])
        logits_BHTS = seen.scale * seen.query_BHTE @ seen.key_BGSE.repeat_interleave(shape.query_group, 1).mT
        visible_TS = torch.ones(24, 24, dtype=torch.bool).tril()
        if shape.window:
            visible_TS &= ~torch.ones(24, 24, dtype=torch.bool).tril(-shape.window)
        if seen.mask is not None:
            assert torch.equal(seen.mask.expand(3, 1, 24, 24)[:, 0], visible_TS.expand(3, 24, 24))
        else:
            assert shape.window is None
        weights_BHTS = logits_BHTS.masked_fill(~visible_TS, -torch.inf).softmax(-1)
        close(weights_BHTS, run.attentions[number])
        heads_BHTE = run.attentions[number] @ v.transpose(1, 2).repeat_interleave(shape.query_group, 1)
        close(seen.heads_BTN, heads_BHTE.transpose(1, 2).flatten(2))
        close(seen.output_BTD, part.o_proj(seen.heads_BTN))


@torch.inference_mode()
def test_looking_changes_nothing_and_computes_no_more_than_attention(source: Checkpoint) -> None:
    layers, plain = hf.Layers(source, attention=hf.WATCHED), hf.Layers(source)
    hidden_BTD = plain.embed(IDS_BT)
    layer, site = layers.open(1), Site(1)
    attention, o = layer.owner(source.family.module(site)), layer.owner(source.family.tensor(site, "o"))
    down: list[object] = []
    layer.owner(source.family.tensor(site, "down")).register_forward_hook(lambda *given: down.append(given))
    first = hf.attend(layer, attention, o, hidden_BTD)
    assert not down
    expected_BTD = plain.open(1).run(hidden_BTD)
    assert torch.equal(layer.run(hidden_BTD), expected_BTD)
    assert len(down) == 1
    again = hf.attend(layer, attention, o, hidden_BTD)
    for name, tensor in vars(first).items():
        assert tensor is None or isinstance(tensor, float) or torch.equal(tensor, getattr(again, name))
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not o._forward_pre_hooks


@torch.inference_mode()
def test_two_layers_of_two_models_are_looked_at_in_turn(tiny_checkpoint: Callable[..., Path]) -> None:
    """What one look has seen is not what another shows."""
    one, other = (Checkpoint.open(tiny_checkpoint("llama", name=f"m{n}", seed=n, tokenizer=False)) for n in (0, 1))
    pair = [hf.Layers(each, attention=hf.WATCHED) for each in (one, other)]
    hidden_BTD = pair[0].embed(IDS_BT)
    first, second = (look(layers, 0, hidden_BTD) for layers in pair)
    assert not torch.allclose(first.query_BHTE, second.query_BHTE)
    assert torch.equal(look(pair[0], 0, hidden_BTD).query_BHTE, first.query_BHTE)


def test_an_error_within_leaves_no_hooks(tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))
    layers, site = hf.Layers(source, attention=hf.WATCHED), Site(0)
    layer = layers.open(0)
    attention, o = layer.owner(source.family.module(site)), layer.owner(source.family.tensor(site, "o"))

    def broken(module: object, given: object) -> None:
        raise RuntimeError("broken")

    handle = layer.owner(source.family.tensor(site, "v")).register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        hf.attend(layer, attention, o, layers.embed(IDS_BT))
    handle.remove()
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not o._forward_pre_hooks
    assert torch.equal(layer.run(layers.embed(IDS_BT)), hf.Layers(source).open(0).run(layers.embed(IDS_BT)))
