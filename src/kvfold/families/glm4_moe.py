"""glm4_moe: experts behind a few dense layers, a part of each head rotated, and optionally norms of q and k.

The layers behind the last, which draft further tokens (multi-token prediction), read keys and values of their own that
are not folded: a student leaves them out, as transformers does when it loads the model.
"""

from __future__ import annotations

from functools import partial

from kvfold.contracts.config import HEADS, WIDTH, YES_NO, Rule, decimal, whole
from kvfold.contracts.family import Json
from kvfold.families._decoder import Layout, decoder
from kvfold.families._experts import BODY, RULES, check_experts, experts_of, routed

NUMBER, INNER, DENSE, DRAFTS = 128, 1408, 1, 1  # where config.json is silent

_DRAFTS = ("num_nextn_predict_layers", "num_mtp_layers")


def _layout(config: Json) -> Layout:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    inner, dense = config.get("moe_intermediate_size", INNER), config.get("first_k_dense_replace", DENSE)
    sparse = routed(config, experts_of(config, NUMBER), inner) + 3 * hidden * inner * config.get("n_shared_experts", 1)
    return Layout(
        biases="qkv" if config.get("attention_bias") else "",
        norms="pre_rope" if config.get("use_qk_norm") else "none",
        rotated=0.5,
        mlps=[3 * hidden * config["intermediate_size"] if layer < dense else sparse for layer in range(layers)],
    )


def _drafting(config: Json) -> tuple[str, ...]:
    """Prefixes of the tensors of layers that draft."""
    first, more = config["num_hidden_layers"], next((config[name] for name in _DRAFTS if name in config), DRAFTS)
    return tuple(f"model.layers.{first + each}." for each in range(more))


FAMILY = decoder(
    "glm4_moe",
    "GLM-4.5, GLM-4.6 (experts, which stay as they are; part of each head rotated)",
    "glm4_moe",
    examples=("zai-org/GLM-4.5-Air", "zai-org/GLM-4.5", "zai-org/GLM-4.6"),
    rules={
        **RULES,
        "num_key_value_heads": HEADS.needed,
        "head_dim": WIDTH,
        "moe_intermediate_size": WIDTH,
        "n_shared_experts": whole(1, 1 << 16),
        "first_k_dense_replace": whole(0, 2048),
        **dict.fromkeys(("n_group", "topk_group"), whole(1, 1 << 16)),
        **dict.fromkeys(("use_qk_norm", "attention_bias"), YES_NO),
        **dict.fromkeys(_DRAFTS, whole(0, 16)),
        "routed_scaling_factor": decimal(0, 1e6),
        "sliding_window": Rule(None, "null: this architecture has no windows"),
    },
    check=partial(check_experts, default=NUMBER, chosen=8),
    layout=_layout,
    tiny={
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    body=BODY,
    dropped=_drafting,
)
