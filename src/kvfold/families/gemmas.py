"""gemma2, gemma3_text and gemma3: norms before and behind attention and MLP, which multiply by `1 + w`.

Gemma 2 caps logits `z` softly, `c tanh(z / c)`, and has a window on every other layer (arXiv 2408.00118). Gemma 3 norms
q and k head by head instead, and has a full layer after five with a window; the two are rotated with bases of their own
(arXiv 2503.19786). Logits are scaled by `query_pre_attn_scalar^-1/2`.

A gemma3 is a gemma3_text with a vision model in front, under `text_config` and `vision_config`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from kvfold.contracts.config import (
    ACTIVATION,
    HEADS,
    WIDTH,
    YES_NO,
    Fields,
    Rule,
    Rules,
    check_common,
    check_parts,
    check_tokens,
    decimal,
    only,
    whole,
)
from kvfold.contracts.family import Family, Json
from kvfold.contracts.runtimes import DECODERS, architectures
from kvfold.contracts.runtimes import HEADS as HEADS_FIELD
from kvfold.contracts.runtimes import fields as fields_of
from kvfold.contracts.site import Shape
from kvfold.families._decoder import AFTER, END, TENSORS, Layout, decoder, dtype_of
from kvfold.families._layer_types import WINDOW, check_rotations, check_window, rotations_of, types_of, windows_of
from kvfold.families._siglip import SIGLIP, check_siglip, siglip_parameters

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
GEMMA2_RULES: Rules = {**RULES, "attn_logit_softcapping": CAP}
GEMMA3_RULES: Rules = {
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

GEMMA2 = decoder(
    "gemma2",
    "Gemma 2 (soft caps, norms behind attention and MLP, a window on every other layer)",
    "gemma2",
    examples=("google/gemma-2-2b", "google/gemma-2-9b", "google/gemma-2-27b"),
    rules=GEMMA2_RULES,
    check=_check_gemma2,
    layout=_gemma2,
    ties=True,
    tiny={
        **{"query_pre_attn_scalar": 16, "sliding_window": 6},
        **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    },
    body=AFTER,
)

TEXT = decoder(
    "gemma3_text",
    "Gemma 3, text (q and k normed by head, two rotations, a window on five of six layers)",
    "gemma3_text",
    examples=("google/gemma-3-270m", "google/gemma-3-1b-it"),
    rules=GEMMA3_RULES,
    check=_check_gemma3,
    layout=_gemma3,
    heads_first=True,
    ties=True,
    tiny={
        **{"query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 2},
        "rope_parameters": _BASES,
    },
    body=AFTER,
)


# --- Gemma 3 with images --------------------------------------------------------------------------------------------

STATED = {
    **{"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072},
}
"""What transformers takes for the text part where config.json is silent."""

_PARTS = ("text_config", "vision_config")
_OF_THE_TEXT = ("num_key_value_heads", "per_layer_config", "rope_parameters", "rope_scaling", "rope_theta")


def _text(config: Json) -> dict[str, Any]:
    """The text part as a config.json of its own."""
    tied = config.get("tie_word_embeddings", True)
    return {**STATED, **config["text_config"], "model_type": "gemma3_text", "tie_word_embeddings": tied}


def _check_whole(fields: Fields) -> None:
    fields.check(
        {
            "is_encoder_decoder": only(False, "false"),
            "initializer_range": decimal(0, 1).or_null,
            **dict.fromkeys(_OF_THE_TEXT, Rule(None, "absent: it is the text part's")),
            **dict.fromkeys(("boi_token_index", "eoi_token_index", "image_token_index"), whole(0, 1 << 24)),
            "mm_tokens_per_image": whole(1, 1 << 20),
        }
    )
    check_parts(fields, expected=_PARTS)
    text, vision = (fields.inside(name) for name in _PARTS)
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise text.refusal("model_type is not that of this architecture", got=text.config["model_type"])
    text = Fields(_text(fields.config), fields.where, text.part)
    check_common(text)
    TEXT.check(text)
    text.check({"final_logit_softcapping": Rule(None, "null: transformers ignores it beside images")})
    check_tokens(fields, text.config["vocab_size"])
    check_siglip(vision)


def _shape_whole(config: Json) -> Shape:
    """The shape of the text part, with the parameters of the whole."""
    text, vision = TEXT.shape(_text(config)), config["vision_config"]
    width = vision.get("hidden_size", 768)
    images = siglip_parameters(vision) + width * text.hidden_size + width
    return replace(
        text,
        family="gemma3",
        model_type="gemma3",
        parameters=text.parameters + images,
        encoder_parameters=images,
        dtype=dtype_of(config),
    )


def _fields_whole(shape: Shape) -> dict[str, Any]:
    """The fields of a student: the number of key/value heads is the text part's."""
    found = fields_of(shape, DECODERS, END)
    return {f"text_config.{name}" if name == HEADS_FIELD else name: value for name, value in found.items()}


_MODEL = "model.language_model"

WHOLE = Family(
    name="gemma3",
    architectures=architectures(DECODERS, END, "gemma3"),
    about="Gemma 3 with images (the text part; the vision model stays as it is)",
    examples=("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it"),
    attention={"self": f"{_MODEL}.layers.{{layer}}.self_attn"},
    tensors=TENSORS,
    check=_check_whole,
    shape=_shape_whole,
    fields=_fields_whole,
    tiny=lambda: {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {name: value for name, value in TEXT.tiny().items() if name not in ("architectures", "dtype")},
        "vision_config": {
            **{"model_type": SIGLIP, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False},
        },
        **{"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92},
        **{"tie_word_embeddings": True, "dtype": "float32"},
    },
    body=replace(AFTER, embedding=f"{_MODEL}.embed_tokens", layers=f"{_MODEL}.layers", norm=f"{_MODEL}.norm"),
    spellings={
        "language_model.model.": f"{_MODEL}.",
        "language_model.lm_head.": "lm_head.",
        **{f"{name}.": f"model.{name}." for name in ("vision_tower", "multi_modal_projector")},
    },
    heads_first=True,
    ties=True,
)

FAMILIES = (GEMMA2, TEXT, WHOLE)
