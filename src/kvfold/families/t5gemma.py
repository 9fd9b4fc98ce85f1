"""t5gemma: encoder-decoders made of Gemma 2 (Zhang et al. 2025, arXiv 2504.06225).

Encoder and decoder are Gemmas with configs of their own (`encoder`, `decoder`), and may differ in width and depth.
Self-attention is rotated, and every other layer has a sliding window; cross-attention is not rotated and has no window.
Logits `z` are scaled by `query_pre_attn_scalar^-1/2` and capped: `c tanh(z / c)`. The output of `o` is normed before it
joins the residual stream.

`decoder.num_key_value_heads` is one number for self- and cross-attention of all layers. A student whose attentions
differ is a `kvfold_t5gemma`. T5Gemma 2, which attends to both texts at once, is another architecture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvfold.contracts.config import (
    ACTIVATION,
    HEADS,
    POSITIONS,
    SHARE,
    TEXTS,
    VOCABULARY,
    WIDTH,
    YES_NO,
    Fields,
    Rules,
    check_common,
    check_parts,
    check_rope,
    check_tokens,
    decimal,
)
from kvfold.contracts.family import Body, Family, Json
from kvfold.contracts.runtimes import ENCODER_DECODERS, fields
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.families._decoder import GATED, MODEL, TENSORS, check_layers, rope_of
from kvfold.families._encoder_decoder import END, PAIRED, architectures, decoder_sites, paired_shape

STATED = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0}
"""The defaults of a part."""

KINDS = ("sliding_attention", "full_attention")

VOCAB = 256_000  # the default of the whole

_WHOLE: Rules = {
    **PAIRED,
    "vocab_size": VOCABULARY,
    "initializer_range": decimal(0, 1),
    **dict.fromkeys(("dropout_rate", "classifier_dropout_rate", "attention_dropout"), SHARE),
}
_PART: Rules = {
    **MODEL,
    "num_key_value_heads": HEADS.needed,
    "head_dim": WIDTH,
    "query_pre_attn_scalar": WIDTH,
    "sliding_window": POSITIONS.or_null,
    "attn_logit_softcapping": decimal(1e-6, 1e6).or_null,
    "final_logit_softcapping": decimal(1e-6, 1e6).or_null,
    "hidden_activation": ACTIVATION,
    "dropout_rate": SHARE,
    **dict.fromkeys(("attention_bias", "is_decoder"), YES_NO),
    "layer_types": TEXTS.or_null,
}


def _check(fields: Fields) -> None:
    fields.check(_WHOLE)
    check_parts(fields, expected=("encoder", "decoder"))
    for name in ("encoder", "decoder"):
        part = fields.inside(name)
        check_common(part)
        part.check(_PART)
        check_parts(part)
        check_tokens(part, part.config["vocab_size"])
        part.check_divides("num_attention_heads", "hidden_size")
        part.check_divides("num_key_value_heads", "num_attention_heads")
        check_layers(part, "layer_types", KINDS)
        check_rope(part, part.config.get("head_dim", STATED["head_dim"]))
        if part.config.get("sliding_window", 1) is None and None in _windows({**STATED, **part.config}):
            raise part.refusal("sliding_window must be a positive whole number", got=None)
    vocabulary = fields.config["decoder"]["vocab_size"]
    check_tokens(fields, vocabulary)
    if (other := fields.config["encoder"]["vocab_size"]) != vocabulary:
        raise fields.refusal("encoder and decoder have different vocabularies", got=f"{other} and {vocabulary}")
    if fields.config.get("vocab_size", VOCAB) != vocabulary:
        raise fields.refusal(
            "vocab_size is not the decoder's", got=fields.config.get("vocab_size", VOCAB), allowed=vocabulary
        )


def _shape(config: Json) -> Shape:
    encoder, decoder = ({**STATED, **config[name]} for name in ("encoder", "decoder"))
    hidden, vocab, read = decoder["hidden_size"], decoder["vocab_size"], encoder["hidden_size"]
    sites = {
        Site(layer, "encoder"): replace(_attention(encoder), window=window)
        for layer, window in enumerate(_windows(encoder))
    }
    own, windows = _attention(decoder), _windows(decoder)
    cross = replace(own, rope=None, encoder_size=None if read == hidden else read, beside=2 * hidden)
    sites |= decoder_sites(config, own, cross, len(windows))
    sites |= {Site(layer): replace(sites[Site(layer)], window=window) for layer, window in enumerate(windows)}
    return paired_shape(
        config,
        "t5gemma",
        sites,
        width=hidden,
        vocab=vocab,
        positions=min(int(part.get("max_position_embeddings") or 8192) for part in (encoder, decoder)),
        embeddings=vocab * hidden if config.get("tie_word_embeddings") is False else 0,
        encoder=_outside(encoder, norms=4),
        decoder=_outside(decoder, norms=4),
    )


def _attention(part: Json) -> Attention:
    """A self-attention of a part, without its window."""
    heads, groups, width = (part[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    return Attention(
        part["hidden_size"],
        heads,
        groups,
        width,
        biases=frozenset("qkvo") if part.get("attention_bias") else frozenset(),
        rope=replace(rope_of(part, width), dims=width),  # whole heads
        scale=part["query_pre_attn_scalar"] ** -0.5,
        softcap=part["attn_logit_softcapping"],
        norm_offset=1.0,
    )


def _windows(part: Json) -> list[int | None]:
    """The window of each layer: every other one has one where `layer_types` is absent."""
    kinds = part.get("layer_types") or [KINDS[layer % 2] for layer in range(part["num_hidden_layers"])]
    return [part["sliding_window"] if kind == KINDS[0] else None for kind in kinds]


def _outside(part: Json, norms: int) -> int:
    """Parameters of a part besides its attentions: embedding, gated MLPs, norms of each layer and the last."""
    hidden, inner, layers, vocab = (
        part[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    return int(vocab * hidden + layers * (3 * hidden * inner + norms * hidden) + hidden)


def _fields(shape: Shape) -> dict[str, Any]:
    """One number of key/value heads for all attentions of the decoder, or a kvfold architecture that has several."""
    decoder = [attention for site, attention in shape.sites.items() if site.kind != "encoder"]
    counts = {attention.num_key_value_heads for attention in decoder}
    whole = not shape.layer_sparse and not any(each.kept for each in decoder)
    ours, stock = ENCODER_DECODERS
    return {
        **fields(shape, (stock if whole and len(counts) == 1 else ours,), END),
        "decoder.num_key_value_heads": max(counts),
    }


def _tiny_part() -> dict[str, Any]:
    return {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


FAMILY = Family(
    name="t5gemma",
    architectures=architectures("t5gemma"),
    about="T5Gemma (soft caps, windows): decoder self- and cross-attention, the encoder as it is",
    examples=("google/t5gemma-2b-2b-ul2",),
    attention={
        "encoder": "model.encoder.layers.{layer}.self_attn",
        "self": "model.decoder.layers.{layer}.self_attn",
        "cross": "model.decoder.layers.{layer}.cross_attn",
    },
    tensors=TENSORS,
    check=_check,
    shape=_shape,
    fields=_fields,
    tiny=lambda: {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "encoder": _tiny_part(),
        "decoder": _tiny_part(),
        "vocab_size": 96,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    },
    body=Body(
        "",
        "model.decoder.layers",
        mlp=GATED,
        after={
            **{kind: f"post_{kind}_attn_layernorm" for kind in ("self", "cross")},
            "mlp": "post_feedforward_layernorm",
        },
        crossing=("pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
    ),
    encoder_decoder=True,
)
