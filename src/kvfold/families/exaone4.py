"""exaone4: norms behind attention and MLP, q and k normed head by head, and no rotation in layers without a window.

A model whose `sliding_window` is null has no windows, and rotates all layers.
"""

from __future__ import annotations

from kvfold.contracts.config import HEADS, Fields, Rule
from kvfold.contracts.family import Json
from kvfold.families._decoder import AFTER, Layout, decoder
from kvfold.families._layer_types import FULL, WINDOW, check_window, types_of, windows_of

EVERY = 4


def _check(fields: Fields) -> None:
    every, silent = fields.config.get("sliding_window_pattern", EVERY), not fields.config.get("layer_types")
    if silent and (not isinstance(every, int) or every < 1 or fields.config.get("sliding_window", 1) is None):
        raise fields.refusal(
            "layer_types must be given, unless every sliding_window_pattern-th layer is full", got=every
        )
    check_window(fields, _types(fields.config))


def _types(config: Json) -> list[str]:
    return types_of(config, config.get("sliding_window_pattern", EVERY))


def _layout(config: Json) -> Layout:
    types, whole = _types(config), config.get("sliding_window", 1) is None
    return Layout(
        norms="pre_rope",
        **windows_of(config, types, 4096),
        rotations=[None if kind == FULL and not whole else {} for kind in types],
    )


FAMILY = decoder(
    "exaone4",
    "EXAONE 4.0 (norms behind attention and MLP, no rotation in full layers)",
    "exaone4",
    examples=("LGAI-EXAONE/EXAONE-4.0-1.2B", "LGAI-EXAONE/EXAONE-4.0-32B"),
    rules={
        "num_key_value_heads": HEADS.needed,
        "sliding_window": WINDOW,
        "sliding_window_pattern": Rule(int | str, "a whole number, or letters L and G").or_null,
    },
    check=_check,
    layout=_layout,
    heads_first=True,
    tiny={"sliding_window": 6},
    body=AFTER,
)
