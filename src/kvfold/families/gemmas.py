"""gemma2 and gemma3_text: norms before and behind attention and MLP, which multiply by `1 + w`, and scaled embeddings.

Gemma 2 caps logits `z` softly, `c tanh(z / c)`, and has a window on every other layer (arXiv 2408.00118). Gemma 3 norms
q and k head by head instead, and has a full layer after five with a window; the two are rotated with bases of their own
(arXiv 2503.19786). Logits are scaled by `query_pre_attn_scalar^-1/2`.
"""

from __future__ import annotations

from typing import Any, Literal

from kvfold.contracts.config import ACTIVATION, HEADS, WIDTH, YES_NO, Fields, Rule, Rules, decimal, whole
from kvfold.contracts.family import Json
from kvfold.families._decoder import AFTER, Layout, decoder
from kvfold.families._layer_types import WINDOW, check_rotations, check_window, rotations_of, types_of, windows_of

CAP = decimal(1e-6, 1e6).or_null

RULES: Rules = {
    "num_key_value_heads": HEADS.needed,
    "head_dim": WIDTH,
    "hidden_activation": ACTIVATION,
    "query_pre_attn_scalar": WIDTH,
    "sliding_window": WINDOW,
    "final_logit_softcapping": CAP,
    "attention_bias": YES_NO,
    "use_bidirectional_attention": Rule(Literal[False] | None, "false or null: encoders cache nothing"),
}
GEMMA2: Rules = {**RULES, "attn_logit_softcapping": CAP}
GEMMA3: Rules = {
    **RULES,
    "attn_logit_softcapping": Rule(None, "null: transformers ignores it in this architecture"),
    "sliding_window_pattern": whole(1, 2048),
}


def _layout(config: Json, types: list[str], **facts: Any) -> Layout:
    """What the layers of both have in common."""
    return Layout(
        biases="qkvo" if config.get("attention_bias") else "",
        norm_offset=1.0,
        **windows_of(config, types, 4096),
        head_dim=256,
        scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        vectors=4,
        **facts,
    )


def _gemma2(config: Json) -> Layout:
    return _layout(config, types_of(config, 2), softcap=config.get("attn_logit_softcapping", 50.0))


def _check_gemma2(fields: Fields) -> None:
    fields.check_divides("num_attention_heads", "hidden_size")
    check_window(fields, types_of(fields.config, 2))


def _types(config: Json) -> list[str]:
    return types_of(config, config.get("sliding_window_pattern", 6))


def _gemma3(config: Json) -> Layout:
    types = _types(config)
    rotations = rotations_of(config, types, 1e6, 1e4, older="rope_local_base_freq")
    return _layout(config, types, norms="pre_rope", **rotations)


def _check_gemma3(fields: Fields) -> None:
    fields.check_divides("num_attention_heads", "hidden_size")
    check_rotations(fields)
    check_window(fields, _types(fields.config))


_ROPE = {"rope_type": "default"}
_BASES = {"full_attention": {**_ROPE, "rope_theta": 1e6}, "sliding_attention": {**_ROPE, "rope_theta": 1e4}}

FAMILIES = (
    decoder(
        "gemma2",
        "Gemma 2 (soft caps, norms behind attention and MLP, a window on every other layer)",
        "gemma2",
        examples=("google/gemma-2-2b", "google/gemma-2-9b", "google/gemma-2-27b"),
        rules=GEMMA2,
        check=_check_gemma2,
        layout=_gemma2,
        ties=True,
        tiny={
            **{"query_pre_attn_scalar": 16, "sliding_window": 6},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        },
        body=AFTER,
    ),
    decoder(
        "gemma3_text",
        "Gemma 3, text (q and k normed by head, two rotations, a window on five of six layers)",
        "gemma3_text",
        examples=("google/gemma-3-270m", "google/gemma-3-1b-it"),
        rules=GEMMA3,
        check=_check_gemma3,
        layout=_gemma3,
        heads_first=True,
        ties=True,
        tiny={
            **{"query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 2},
            "rope_parameters": _BASES,
        },
        body=AFTER,
    ),
)
