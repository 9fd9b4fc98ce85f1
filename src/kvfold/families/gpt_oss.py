"""gpt_oss: experts, biases everywhere, a window on every other layer, and sinks: a logit more for each query head.

A sink takes a part of a head's attention and adds nothing (gpt-oss, arXiv 2508.10925, section 2.2). It belongs to its
query head and stays as it is. Published checkpoints hold experts in MXFP4, which is refused.
"""

from __future__ import annotations

from typing import Any

from kvfold.contracts.config import HEADS, WIDTH, YES_NO, Fields, Rule, decimal
from kvfold.contracts.family import Body, Json
from kvfold.families._decoder import Layout, decoder
from kvfold.families._experts import RULES, check_experts, experts_of
from kvfold.families._layer_types import WINDOW, check_window, types_of, windows_of

NUMBER = 128  # of experts where config.json is silent

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The rotation where config.json is silent."""


def _check(fields: Fields) -> None:
    check_experts(fields, NUMBER, chosen=4)
    check_window(fields, types_of(fields.config, 2))


def _layout(config: Json) -> Layout:
    hidden, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    silent = not config.get("rope_parameters") and not config.get("rope_scaling")
    each = 3 * hidden * inner + 2 * inner + hidden + hidden + 1  # an expert with its biases, and its row of the router
    return Layout(
        biases="qkvo" if config.get("attention_bias", True) else "",
        **windows_of(config, types_of(config, 2), 128),
        rotations=[{"rope_parameters": YARN}] * layers if silent else None,
        theta=150_000.0,
        head_dim=64,
        sinks=True,
        mlps=[experts_of(config, NUMBER) * each] * layers,
    )


FAMILY = decoder(
    "gpt_oss",
    "gpt-oss (sinks, which follow their query heads; experts, which stay as they are)",
    "gpt_oss",
    examples=("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
    rules={
        **RULES,
        "sliding_window": WINDOW,
        "attention_bias": YES_NO,
        **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), decimal(0, 1e6)),
        **{"num_key_value_heads": HEADS.needed, "head_dim": WIDTH},
        "rope_parameters": Rule(dict[str, Any], "a mapping").or_null,
    },
    check=_check,
    layout=_layout,
    tiny={"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    body=Body(),
)
