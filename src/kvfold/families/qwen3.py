"""qwen3: the layout of llama, with q and k RMS-normed head by head before they are rotated, and qwen2's windows.

One weight of a head's width norms all query heads of a layer, another all key heads: `norm(k_h) = w * k_h / rms(k_h)`.
The norm does not commute with sums of heads, so a pooled head is not the mean of the normed ones.
"""

from __future__ import annotations

from kvfold.contracts.config import WIDTH, YES_NO
from kvfold.families._decoder import Layout, decoder
from kvfold.families._windows import RULES, upper_windows

FAMILY = decoder(
    "qwen3",
    "Qwen3 (q and k normed before RoPE)",
    "qwen3",
    examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
    rules={**RULES, "head_dim": WIDTH, "attention_bias": YES_NO},
    layout=lambda config: Layout(
        biases="qkvo" if config.get("attention_bias") else "", norms="pre_rope", head_dim=128, **upper_windows(config)
    ),
)
