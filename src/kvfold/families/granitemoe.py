"""granitemoe: the layout of granite, whose embeddings, logits and residuals have factors, with experts."""

from __future__ import annotations

from functools import partial

from kvfold.contracts.config import YES_NO, Rule
from kvfold.contracts.family import Body, Json
from kvfold.contracts.stacked import Stacked
from kvfold.families._decoder import FACTOR, Layout, decoder
from kvfold.families._experts import RULES, check_experts, experts_of, routed

NUMBER = 8  # of experts where config.json is silent

_BLOCK = "block_sparse_moe"


def _layout(config: Json) -> Layout:
    each = routed(config, experts_of(config, NUMBER), config["intermediate_size"])
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        scale=float(config.get("attention_multiplier", 1.0)),
        mlps=[each] * config["num_hidden_layers"],
    )


FAMILY = decoder(
    "granitemoe",
    "Granite 3 MoE (experts, which stay as they are; factors of embeddings, logits and residuals)",
    "granitemoe",
    examples=("ibm-granite/granite-3.1-1b-a400m-base", "ibm-granite/granite-3.1-3b-a800m-base"),
    rules={
        **RULES,
        "attention_bias": YES_NO,
        **dict.fromkeys(
            ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), FACTOR
        ),
        "sliding_window": Rule(None, "null: this architecture has no windows"),
    },
    check=partial(check_experts, default=NUMBER, chosen=2),
    layout=_layout,
    tiny={
        "intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    body=Body(
        residual="residual_multiplier",
        stacked={
            f"{_BLOCK}.experts.gate_up_proj": Stacked((f"{_BLOCK}.input_linear.weight",)),
            f"{_BLOCK}.experts.down_proj": Stacked((f"{_BLOCK}.output_linear.weight",)),
            f"{_BLOCK}.router.weight": Stacked((f"{_BLOCK}.router.layer.weight",)),
        },
    ),
)
