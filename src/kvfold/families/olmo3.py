"""olmo3: olmo2 with a window on three of four layers, which are also rotated differently from the full ones."""

from __future__ import annotations

from kvfold.contracts.config import YES_NO, Fields
from kvfold.contracts.family import Json
from kvfold.families._decoder import AFTER, Layout, decoder
from kvfold.families._layer_types import WINDOW, check_rotations, check_window, rotations_of, types_of, windows_of

EVERY, THETA = 4, 500_000.0

_ROPE = {"rope_type": "default", "rope_theta": THETA}


def _check(fields: Fields) -> None:
    check_rotations(fields)
    check_window(fields, types_of(fields.config, EVERY))


def _layout(config: Json) -> Layout:
    types = types_of(config, EVERY)
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        norms="all_heads",
        **windows_of(config, types, 4096),
        **rotations_of(config, types, THETA, THETA),
    )


FAMILY = decoder(
    "olmo3",
    "OLMo 3 (olmo2, with a window on three of four layers)",
    "olmo3",
    examples=("allenai/Olmo-3-7B-Instruct", "allenai/Olmo-3-32B-Think"),
    rules={"attention_bias": YES_NO, "sliding_window": WINDOW},
    check=_check,
    layout=_layout,
    tiny={
        "sliding_window": 6,
        "rope_parameters": {"full_attention": {**_ROPE, "rope_theta": 1e4}, "sliding_attention": {**_ROPE}},
    },
    body=AFTER,
)
