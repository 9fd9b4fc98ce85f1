"""gemma3_text: gemma2 with q and k normed head by head in place of the caps, and a full layer after five with a window.

Full layers and those with a window are rotated with bases of their own (Gemma 3, arXiv 2503.19786).
"""

from __future__ import annotations

from kvfold.contracts.config import Fields, Rule, whole
from kvfold.contracts.family import Json
from kvfold.families._decoder import Layout, decoder
from kvfold.families._layer_types import check_rotations, check_window, rotations_of, types_of, windows_of
from kvfold.families.gemma2 import AFTER, GEMMA

_ROPE = {"rope_type": "default"}


def types(config: Json) -> list[str]:
    """The type of each layer."""
    return types_of(config, config.get("sliding_window_pattern", 6))


def check(fields: Fields) -> None:
    """Refuse fields that contradict each other, with UnsupportedModel."""
    fields.check_divides("num_attention_heads", "hidden_size")
    check_rotations(fields)
    check_window(fields, types(fields.config))


def layout(config: Json) -> Layout:
    """The layers of a config.json."""
    found = types(config)
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        norms="pre_rope",
        norm_offset=1.0,
        **windows_of(config, found, 4096),
        **rotations_of(config, found, 1e6, 1e4, older="rope_local_base_freq"),
        head_dim=256,
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        vectors=4,
    )


RULES = {
    **GEMMA,
    "attn_logit_softcapping": Rule(None, "null: transformers ignores it in this architecture"),
    "sliding_window_pattern": whole(1, 2048),
}
TINY = {
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "rope_parameters": {
        "full_attention": {**_ROPE, "rope_theta": 1e6},
        "sliding_attention": {**_ROPE, "rope_theta": 1e4},
    },
}

FAMILY = decoder(
    "gemma3_text",
    "Gemma 3, text (q and k normed by head, two rotations, a window on five of six layers)",
    "gemma3_text",
    rules=RULES,
    check=check,
    layout=layout,
    ties=True,
    tiny=TINY,
    body=AFTER,
)
