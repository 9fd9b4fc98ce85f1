"""Packed tensors against the modules of transformers that read them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPTNeoXConfig, Phi3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention

HEADS = {"hidden_size": 32, "num_attention_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
NEOX = GPTNeoXAttention(GPTNeoXConfig(**HEADS, rope_parameters=ROPE)).query_key_value
PHI3 = Phi3Attention(Phi3Config(**HEADS, num_key_value_heads=2, pad_token_id=0), layer_idx=0).qkv_proj
GPT2 = GPT2Attention(GPT2Config(n_embd=32, n_head=4, attn_implementation="eager")).c_attn
GROUPED = Attention(32, 4, 2, 8)
CASES = [
    (NEOX, Packed("weight", blocks=None), Attention(32, 4, 4, 8)),
    (PHI3, Packed("weight"), GROUPED),
    (GPT2, Packed("weight", in_out=True), Attention(32, 4, 4, 8)),
    (torch.nn.Linear(32, 64), Packed("weight", blocks=None), GROUPED),
]


def read(packed: Packed, output_BTN: Tensor, attention: Attention) -> dict[str, Tensor]:
    """Queries, keys and values in the output of a fused map, as these models cut them."""
    groups, width, readers = attention.num_key_value_heads, attention.head_dim, attention.query_group
    if packed.blocks == 1:
        wide = attention.num_attention_heads * width
        ends = [0, wide, wide + groups * width, wide + 2 * groups * width]
        return {role: output_BTN[..., ends[n] : ends[n + 1]] for n, role in enumerate("qkv")}
    blocks = output_BTN.view(*output_BTN.shape[:2], groups, (readers + 2) * width)
    cuts = {"q": slice(readers * width), "k": slice(-2 * width, -width), "v": slice(-width, None)}
    return {role: blocks[..., cut].flatten(2) for role, cut in cuts.items()}


@pytest.mark.parametrize(("module", "packed", "attention"), CASES, ids=["gpt_neox", "phi3", "gpt2", "grouped"])
def test_roles_are_what_the_model_makes_of_the_tensor(
    module: torch.nn.Module, packed: Packed, attention: Attention
) -> None:
    weight = module.weight.detach().normal_()  # type: ignore[operator, union-attr]
    bias = torch.randn(weight.shape[1 if packed.in_out else 0])
    if module.bias is not None:
        module.bias.data = bias  # type: ignore[union-attr]
    x_BTD = torch.randn(2, 5, 32)
    expected = read(packed, module(x_BTD), attention)
    roles = {role: packed.part(weight, role, attention) for role in "qkv"}
    biases = {role: packed.part(bias, f"{role}_bias", attention) for role in "qkv"}
    for role in "qkv":
        found = x_BTD @ roles[role].T + (biases[role] if module.bias is not None else 0)
        torch.testing.assert_close(found, expected[role])
    assert packed.form({role: tuple(each.shape) for role, each in roles.items()}) == tuple(weight.shape)
    assert torch.equal(packed.whole(roles, attention), weight)
    assert torch.equal(packed.whole(biases, attention), bias)
