"""gemma2: norms before and behind attention and MLP, soft caps of logits, and a window on every other layer.

Logits `z` are scaled by `query_pre_attn_scalar^-1/2` and capped: `c tanh(z / c)` (Gemma 2, arXiv 2408.00118). Norms
multiply by `1 + w`, and embeddings by the root of the width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from kvfold.contracts.config import ACTIVATION, HEADS, WIDTH, YES_NO, Fields, Rule, Rules, decimal
from kvfold.contracts.family import Json
from kvfold.families._decoder import BODY, Layout, decoder
from kvfold.families._layer_types import WINDOW, check_window, types_of, windows_of

CAUSAL = Rule(Literal[False] | None, "false or null: kvfold folds decoders")

CAP = decimal(1e-6, 1e6).or_null

GEMMA: Rules = {
    "num_key_value_heads": HEADS.needed,
    "head_dim": WIDTH,
    "hidden_activation": ACTIVATION,
    "query_pre_attn_scalar": WIDTH,
    "sliding_window": WINDOW,
    "final_logit_softcapping": CAP,
    "attention_bias": YES_NO,
    "use_bidirectional_attention": CAUSAL,
}
"""The fields of Gemma 2 and of Gemma 3."""

AFTER = replace(BODY, after={"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"})


def _check(fields: Fields) -> None:
    fields.check_divides("num_attention_heads", "hidden_size")
    check_window(fields, types_of(fields.config, 2))


def _layout(config: Json) -> Layout:
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        norm_offset=1.0,
        **windows_of(config, types_of(config, 2), 4096),
        head_dim=256,
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        softcap=config.get("attn_logit_softcapping", 50.0),
        vectors=4,
    )


FAMILY = decoder(
    "gemma2",
    "Gemma 2 (soft caps, norms behind attention and MLP, a window on every other layer)",
    "gemma2",
    rules={**GEMMA, "attn_logit_softcapping": CAP},
    check=_check,
    layout=_layout,
    ties=True,
    tiny={
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    body=AFTER,
)
