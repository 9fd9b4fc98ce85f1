"""qwen2: the layout of llama with biases on q, k and v, and a sliding window on the upper layers when asked for."""

from __future__ import annotations

from kvfold.families._decoder import Layout, decoder
from kvfold.families._windows import RULES, upper_windows

FAMILY = decoder(
    "qwen2",
    "Qwen2 and Qwen2.5 (biases on q, k and v)",
    "qwen2",
    examples=("Qwen/Qwen1.5-7B", "Qwen/Qwen2.5-7B"),
    rules=RULES,
    layout=lambda config: Layout(biases="qkv", **upper_windows(config)),
)
