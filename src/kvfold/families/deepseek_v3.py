"""deepseek_v3: multi-head latent attention without experts, the stock class in which students of `mla` are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvfold.contracts.config import LAYERS, WIDTH, YES_NO, Fields, Rules, decimal, only, whole
from kvfold.contracts.family import Json
from kvfold.errors import UnsupportedModel
from kvfold.families._decoder import TENSORS, Layout, decoder

_RULES: Rules = {
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), WIDTH.needed),
    "q_lora_rank": replace(WIDTH.or_null, required=True),
    "rope_interleave": only(True, "true"),
    "attention_bias": YES_NO,
    "first_k_dense_replace": LAYERS.needed,
    "num_nextn_predict_layers": whole(0, 0),
    "num_mtp_layers": whole(0, 0),
    **dict.fromkeys(("moe_intermediate_size", "n_shared_experts", "n_routed_experts"), WIDTH),
    **dict.fromkeys(("n_group", "topk_group", "num_experts_per_tok", "pretraining_tp"), whole(0, 1 << 20).or_null),
    "routed_scaling_factor": decimal(0, 1e6),
    "norm_topk_prob": YES_NO.or_null,
    "output_router_logits": only(False, "false"),
}
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "rms_norm_eps", "attention_dropout", "tie_word_embeddings"),
    *("initializer_range", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
)
"""Fields that have the same meaning in the config.json of every source."""

_ENDS = ("bos_token_id", "eos_token_id")
"""Fields whose null is no default."""

_SILENT: Mapping[str, Json] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"bos_token_id": None, "eos_token_id": None},
    "internlm3": {"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    "helium": {"rms_norm_eps": 1e-8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    "ernie4_5": {
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    },
}
"""Defaults of absent fields, by source, where this architecture has others."""


def _check(fields: Fields) -> None:
    heads, layers = fields.config["num_attention_heads"], fields.config["num_hidden_layers"]
    if fields.get("num_key_value_heads", heads) != heads:
        got = fields.config["num_key_value_heads"]
        raise fields.refusal("num_key_value_heads is not that of this architecture", got=got, allowed=heads)
    if fields.get("head_dim", fields.config["qk_rope_head_dim"]) != fields.config["qk_rope_head_dim"]:
        raise fields.refusal("head_dim must be qk_rope_head_dim", got=fields.config["head_dim"])
    if fields.config["first_k_dense_replace"] < layers:
        got = fields.config["first_k_dense_replace"]
        raise fields.refusal("first_k_dense_replace: layers with experts are not read", got=got, allowed=layers)
    if fields.config["qk_nope_head_dim"] % 2:
        raise fields.refusal("qk_nope_head_dim must be even", got=fields.config["qk_nope_head_dim"])


def _adopt(config: Json) -> dict[str, Any]:
    """The fields of a source that a student keeps. Raises UnsupportedModel for biases of the MLP."""
    for name in ("mlp_bias", "use_bias"):
        if config.get(name):
            raise UnsupportedModel(
                f"{name}: stock deepseek_v3 has no biases in its MLP", got=True, next="choose elitekv"
            )
    silent = {"max_position_embeddings": 2048, **_SILENT[config["model_type"]]}
    stated = {name: config[name] for name in _SAME if name in config}
    return silent | {name: value for name, value in stated.items() if value is not None or name in _ENDS}


FAMILY = decoder(
    "deepseek_v3",
    "DeepSeek-V3 without experts (students of mla)",
    "deepseek_v3",
    rules=_RULES,
    check=_check,
    layout=lambda config: Layout(head_dim=config["qk_rope_head_dim"], half_split=False),
    tiny={
        **{"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"head_dim": 4, "attention_bias": True, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0},
    },
    tensors={
        **TENSORS,
        "q_down": "q_a_proj.weight",
        "q_down_bias": "q_a_proj.bias",
        "q_down_norm": "q_a_layernorm.weight",
        "q_up": "q_b_proj.weight",
        "kv_down": "kv_a_proj_with_mqa.weight",
        "kv_down_bias": "kv_a_proj_with_mqa.bias",
        "kv_norm": "kv_a_layernorm.weight",
        "kv_up": "kv_b_proj.weight",
    },
    adopt=_adopt,
)
