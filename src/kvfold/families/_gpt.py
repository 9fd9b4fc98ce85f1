"""What the configs of GPT-2 and its kin have in common: fields with names of their own, and the width of the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.contracts.config import (
    ACTIVATION,
    EPSILON,
    HEADS,
    LAYERS,
    POSITIONS,
    SHARE,
    WIDTH,
    Fields,
    Rule,
    Rules,
    only,
)
from kvfold.contracts.family import Body, Json
from kvfold.families._decoder import Layout

IGNORED = Rule(None, "absent: transformers ignores it in this architecture")

NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
"""The usual names of fields, and those of this architecture."""

RULES: Rules = {
    "n_embd": WIDTH.needed,
    "n_head": HEADS.needed,
    "n_layer": LAYERS.needed,
    **dict.fromkeys(("n_positions", "n_ctx"), POSITIONS),
    "n_inner": WIDTH.or_null,
    "activation_function": ACTIVATION,
    "layer_norm_epsilon": EPSILON,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), SHARE),
    "add_cross_attention": only(False, "false: cross-attention is not known here"),
    **dict.fromkeys(("head_dim", "rope_parameters", "rope_scaling", "rope_theta"), IGNORED),
}

TINY: Mapping[str, Any] = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 4,
    "n_positions": 256,
    "n_inner": 48,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}

BODY = Body("transformer.wte", "transformer.h", "transformer.ln_f")


def gpt_usual(config: Json) -> dict[str, Any]:
    """A config.json with these fields under their usual names too, and what transformers takes for those it lacks."""
    found = {**{name: config[own] for name, own in NAMES.items() if own in config}, **config}
    found["intermediate_size"] = config.get("n_inner") or 4 * config["n_embd"]
    return found


def gpt_layout(config: Json) -> Layout:
    """Learned positions, LayerNorms before attention and MLP, and biases everywhere: that of all but GPT-J."""
    return Layout(
        biases="qkvo",
        rotations=[None] * config["n_layer"],
        gated=False,
        mlp_biases=True,
        vectors=4,
        last=2,
        positions=config.get("n_positions", 1024),
    )


def check_gpt(fields: Fields) -> None:
    """Refuse another value under the usual name of a field, and heads that do not divide the width."""
    for name, own in NAMES.items():
        fields.check_alias(name, own)
    fields.check_divides("n_head", "n_embd")
