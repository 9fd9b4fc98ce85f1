"""qwen3_moe: the layout of qwen3 with experts; some layers may have none. A window is on all layers or on none."""

from __future__ import annotations

from functools import partial

from kvfold.contracts.config import HEADS, POSITIONS, WIDTH, YES_NO
from kvfold.contracts.family import Json
from kvfold.families._decoder import Layout, decoder
from kvfold.families._experts import BODY, SPARSE, check_experts, experts_of, sparse

NUMBER, INNER = 128, 768  # experts and their width, where config.json is silent


def _layout(config: Json) -> Layout:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        norms="pre_rope",
        windows=[window] * config["num_hidden_layers"],
        kinds=("full_attention" if window is None else "sliding_attention",),
        mlps=sparse(config, experts_of(config, NUMBER), config.get("moe_intermediate_size", INNER)),
    )


FAMILY = decoder(
    "qwen3_moe",
    "Qwen3-30B-A3B, Qwen3-235B-A22B (experts, which stay as they are)",
    "qwen3_moe",
    examples=("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"),
    rules={
        **SPARSE,
        "num_key_value_heads": HEADS.needed,
        "head_dim": WIDTH,
        **dict.fromkeys(("attention_bias", "use_sliding_window"), YES_NO),
        "sliding_window": POSITIONS.or_null,
    },
    check=partial(check_experts, default=NUMBER, chosen=8),
    layout=_layout,
    tiny={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    body=BODY,
)
