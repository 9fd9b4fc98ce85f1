"""mixtral: the layout of mistral with experts (Jiang et al. 2024, arXiv 2401.04088); a window on all layers or none."""

from __future__ import annotations

from functools import partial

from kvfold.contracts.config import HEADS, POSITIONS, SHARE
from kvfold.contracts.family import Body, Json
from kvfold.contracts.stacked import Stacked
from kvfold.families._decoder import Layout, decoder
from kvfold.families._experts import RULES, check_experts, experts_of, routed

NUMBER = 8  # of experts where config.json is silent

_BLOCK, _EXPERT = "block_sparse_moe", "block_sparse_moe.experts.{expert}"


def _layout(config: Json) -> Layout:
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    each = routed(config, experts_of(config, NUMBER), config["intermediate_size"])
    return Layout(windows=[window] * layers, kinds=(kind,), theta=1e6, mlps=[each] * layers)


FAMILY = decoder(
    "mixtral",
    "Mixtral (experts, which stay as they are)",
    "mixtral",
    examples=("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x22B-v0.1"),
    rules={
        **RULES,
        "num_key_value_heads": HEADS.needed,
        "router_jitter_noise": SHARE,
        "sliding_window": POSITIONS.or_null,
    },
    check=partial(check_experts, default=NUMBER, chosen=2),
    layout=_layout,
    tiny={"intermediate_size": 16, "num_local_experts": 4},
    body=Body(
        stacked={
            "mlp.gate.weight": Stacked((f"{_BLOCK}.gate.weight",)),
            "mlp.experts.gate_up_proj": Stacked((f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight")),
            "mlp.experts.down_proj": Stacked((f"{_EXPERT}.w2.weight",)),
        }
    ),
)
