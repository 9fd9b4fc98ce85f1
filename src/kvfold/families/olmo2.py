"""olmo2: the layout of llama with q and k RMS-normed over all heads at once, and norms behind attention and MLP.

`norm(k) = w * k / rms(k)` has one weight for each coordinate of all heads (G E), and one mean square: a head's length
counts against the others'. Nothing is normed before attention and MLP; what they add to the residual stream is.
"""

from __future__ import annotations

from kvfold.contracts.config import YES_NO
from kvfold.families._decoder import AFTER, Layout, decoder

FAMILY = decoder(
    "olmo2",
    "OLMo 2 (q and k normed over all heads, norms behind attention and MLP)",
    "olmo2",
    examples=("allenai/OLMo-2-0425-1B", "allenai/OLMo-2-1124-7B"),
    rules={"attention_bias": YES_NO},
    layout=lambda config: Layout(biases="qkvo" if config.get("attention_bias") else "", norms="all_heads"),
    body=AFTER,
)
