"""The sliding windows of the Qwens: on the upper layers, when `use_sliding_window` asks for them."""

from __future__ import annotations

from typing import Any

from kvfold.contracts.config import HEADS, POSITIONS, YES_NO, Rules, whole
from kvfold.contracts.family import Json

RULES: Rules = {
    "num_key_value_heads": HEADS.needed,
    "use_sliding_window": YES_NO,
    "sliding_window": POSITIONS.or_null,
    "max_window_layers": whole(0, 1 << 20),
}


def upper_windows(config: Json) -> dict[str, Any]:
    """The window of each layer, none below `max_window_layers`, and the kinds of layers: fields of a `Layout`."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first, layers = int(config.get("max_window_layers", 28)), range(config["num_hidden_layers"])
    kinds = config.get("layer_types") or ["sliding_attention" if n >= first else "full_attention" for n in layers]
    return {
        "windows": [window if kind == "sliding_attention" else None for kind in kinds],
        "kinds": ("full_attention",) if window is None else ("full_attention", "sliding_attention"),
    }
