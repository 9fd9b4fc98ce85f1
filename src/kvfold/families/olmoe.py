"""olmoe: the layout of llama with experts, and q and k RMS-normed over all heads at once, as in olmo2."""

from __future__ import annotations

from kvfold.contracts.config import WIDTH, YES_NO, Fields, Rule, decimal
from kvfold.contracts.family import Json
from kvfold.contracts.runtimes import LINEAR
from kvfold.families._decoder import Layout, check_head_dim, decoder
from kvfold.families._experts import BODY, RULES, check_experts, experts_of, routed

NUMBER = 64  # of experts where config.json is silent


def _check(fields: Fields) -> None:
    check_experts(fields, NUMBER, chosen=8)
    check_head_dim(fields)
    if fields.config["model_type"] == LINEAR.model_type("olmoe") and fields.get("clip_qkv") is not None:
        raise fields.refusal("clip_qkv is not null, and linear attention clips nothing", got=fields.get("clip_qkv"))


def _layout(config: Json) -> Layout:
    each = routed(config, experts_of(config, NUMBER), config["intermediate_size"])
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        norms="all_heads",
        mlps=[each] * config["num_hidden_layers"],
    )


FAMILY = decoder(
    "olmoe",
    "OLMoE (experts, which stay as they are; q and k normed over all heads)",
    "olmoe",
    examples=("allenai/OLMoE-1B-7B-0924",),
    rules={
        **RULES,
        "attention_bias": YES_NO,
        "head_dim": WIDTH,
        "clip_qkv": decimal(1e-6, 1e6).or_null,
        "sliding_window": Rule(None, "null: this architecture has no windows"),
    },
    check=_check,
    layout=_layout,
    tiny={"intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    body=BODY,
)
