"""stablelm: the layout of llama with LayerNorms, a part of each head rotated, and optionally a parallel residual."""

from __future__ import annotations

from kvfold.contracts.config import EPSILON, HEADS, SHARE, YES_NO, only
from kvfold.contracts.family import Json
from kvfold.families._decoder import Layout, check_head_dim, decoder


def _layout(config: Json) -> Layout:
    return Layout(
        biases="qkv" if config.get("use_qkv_bias") else "",
        rotated=0.25,
        vectors=2 if config.get("use_parallel_residual") else 4,
        last=2,
    )


FAMILY = decoder(
    "stablelm",
    "StableLM 3B, StableLM 2 1.6B (LayerNorms, part of each head rotated)",
    "stablelm",
    examples=("stabilityai/stablelm-3b-4e1t", "stabilityai/stablelm-2-1_6b"),
    rules={
        "num_key_value_heads": HEADS.needed,
        "layer_norm_eps": EPSILON,
        "qk_layernorm": only(False, "false: norms with weights for each head are not known here"),
        **dict.fromkeys(("use_qkv_bias", "use_parallel_residual"), YES_NO),
        "hidden_dropout": SHARE,
    },
    check=check_head_dim,
    layout=_layout,
    tiny={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
)
