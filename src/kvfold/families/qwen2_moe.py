"""qwen2_moe: the layout of qwen2 with experts, and one that every token passes; some layers may have none."""

from __future__ import annotations

from kvfold.contracts.config import HEADS, WIDTH, YES_NO, Fields, whole
from kvfold.contracts.family import Json
from kvfold.families._decoder import Layout, decoder
from kvfold.families._experts import BODY, SPARSE, check_experts, experts_of, sparse

NUMBER, INNER, SHARED = 60, 1408, 5632  # experts, their width and that of the shared one, where config.json is silent


def _check(fields: Fields) -> None:
    check_experts(fields, NUMBER, chosen=4)
    if fields.get("use_sliding_window") and not fields.config.get("sliding_window", 4096):
        raise fields.refusal("use_sliding_window needs a sliding_window", got=fields.config.get("sliding_window"))


def _layout(config: Json) -> Layout:
    layers, hidden = range(config["num_hidden_layers"]), config["hidden_size"]
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    most = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if window and not layer % 2 and layer < most else "full_attention" for layer in layers
    ]
    shared = 3 * hidden * config.get("shared_expert_intermediate_size", SHARED) + hidden
    return Layout(
        biases="qkv" if config.get("qkv_bias", True) else "",
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        kinds=("full_attention", "sliding_attention") if window else ("full_attention",),
        mlps=sparse(config, experts_of(config, NUMBER), config.get("moe_intermediate_size", INNER), shared),
    )


FAMILY = decoder(
    "qwen2_moe",
    "Qwen1.5-MoE, Qwen2-57B-A14B (experts, which stay as they are)",
    "qwen2_moe",
    examples=("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen2-57B-A14B"),
    rules={
        **SPARSE,
        "num_key_value_heads": HEADS.or_null,
        "shared_expert_intermediate_size": WIDTH,
        **dict.fromkeys(("qkv_bias", "use_sliding_window"), YES_NO),
        "sliding_window": whole(0, (1 << 31) - 1).or_null,  # transformers writes 0 for none
        "max_window_layers": whole(0, 1 << 20),
    },
    check=_check,
    layout=_layout,
    tiny={
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    body=BODY,
)
