"""What the encoder-decoders share.

transformers builds most of these architectures with as many key/value heads as query heads and ignores
`num_key_value_heads`. A student with fewer has a model type of kvfold's own (`kvfold.contracts.runtimes.PAIRS`), and so
has a T5Gemma whose attentions differ from one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from kvfold.contracts.config import (
    ACTIVATION,
    LAYERS,
    SHARE,
    VOCABULARY,
    WIDTH,
    YES_NO,
    Fields,
    Rule,
    Rules,
    check_parts,
    check_tokens,
    decimal,
    only,
)
from kvfold.contracts.config import HEADS as COUNT
from kvfold.contracts.family import Body, Json
from kvfold.contracts.runtimes import ENCODER_DECODERS, HEADS, PAIRS, read, stock_type
from kvfold.contracts.runtimes import architectures as architectures_of
from kvfold.contracts.runtimes import fields as fields_of
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.families._decoder import TENSORS, dtype_of

END = "ForConditionalGeneration"

architectures = partial(architectures_of, ENCODER_DECODERS, END)
fields = partial(fields_of, runtimes=ENCODER_DECODERS, end=END)

PAIRED: Rules = {
    "is_encoder_decoder": only(True, "true: an encoder alone caches nothing"),
    **PAIRS.rules,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(None, "absent: the rotation is a part's, or none")),
    **dict.fromkeys(("sliding_window", "layer_types"), Rule(None, "absent: windows are a part's, or none")),
    "per_layer_config": Rule(None, f"absent: {HEADS} may be a list"),
}
"""The fields of every encoder-decoder."""

PARTS = ("encoder", "decoder")

STACKS: Rules = {
    **PAIRED,
    "d_model": WIDTH.needed,
    "vocab_size": VOCABULARY.needed,
    **{f"{part}_layers": LAYERS.needed for part in PARTS},
    **{f"{part}_attention_heads": COUNT.needed for part in PARTS},
    **{f"{part}_ffn_dim": WIDTH.needed for part in PARTS},
    "activation_function": ACTIVATION,
    "init_std": decimal(0, 1e3),
    **{f"{part}_layerdrop": SHARE for part in PARTS},
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), SHARE),
    **dict.fromkeys(("scale_embedding", "is_decoder"), YES_NO),
}
"""The fields of a BART and of a Whisper."""

ATTENTIONS = {
    "encoder": "model.encoder.layers.{layer}.self_attn",
    "self": "model.decoder.layers.{layer}.self_attn",
    "cross": "model.decoder.layers.{layer}.encoder_attn",
}
NAMES = {**TENSORS, "o": "out_proj.weight", "o_bias": "out_proj.bias"}
"""Where both keep their attentions, and the tensors of these."""

BODY = Body(
    layers="model.decoder.layers",
    norm="",
    mlp={"up": "fc1", "act": "activation_fn", "down": "fc2"},
    crossing=("encoder_attn_layer_norm",),
)

_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}


def check_stacks(fields: Fields) -> None:
    """Check what depends on several of `STACKS`: two names of one field, heads that divide the width."""
    for alias, name in _ALIASES.items():
        fields.check_alias(alias, name)
    for part in PARTS:
        fields.check_divides(f"{part}_attention_heads", "d_model")
    check_parts(fields)
    check_tokens(fields, fields.config["vocab_size"])


def decoder_sites(config: Json, own: Attention, cross: Attention, layers: int) -> dict[Site, Attention]:
    """The attentions of the decoder with the caches that config.json states, from what they are without."""
    alone = {
        site: each for layer in range(layers) for site, each in ((Site(layer), own), (Site(layer, "cross"), cross))
    }
    return read(config, alone, ENCODER_DECODERS)


def paired_shape(
    config: Json,
    family: str,
    sites: Mapping[Site, Attention],
    *,
    width: int,
    vocab: int,
    positions: int,
    embeddings: int,
    encoder: int,
    decoder: int,
    encoder_positions: int | None = None,
) -> Shape:
    """The shape of a model of these attentions; `encoder` and `decoder` count their parameters outside of those.

    The norms of a branch of cross-attention belong to its attention.

    `embeddings` counts those of both, and of the output projection.
    """
    read = encoder + sum(each.parameters for site, each in sites.items() if site.kind == "encoder")
    written = decoder + sum(each.parameters + each.beside for site, each in sites.items() if site.kind != "encoder")
    return Shape(
        family=family,
        model_type=stock_type(config),
        sites=sites,
        hidden_size=width,
        vocab_size=vocab,
        num_layers=sum(site.kind == "self" for site in sites),
        parameters=embeddings + read + written,
        dtype=dtype_of(config),
        max_positions=positions,
        encoder_parameters=read,
        encoder_positions=encoder_positions,
    )


def stacked_shape(
    config: Json,
    family: str,
    biases: str,
    *,
    encoder: int,
    decoder: int,
    positions: int,
    encoder_positions: int | None = None,
) -> Shape:
    """The shape of a model with the fields `STACKS`; `encoder` and `decoder` count parameters outside of their layers.

    The MLPs have no gate and two biases; layers have two LayerNorms,
    and the branch of cross-attention one.
    """
    hidden, vocab = config["d_model"], config["vocab_size"]
    layers, heads, inner = (
        {part: config[f"{part}_{name}"] for part in PARTS} for name in ("layers", "attention_heads", "ffn_dim")
    )
    alone = {part: Attention(hidden, n, n, hidden // n, biases=frozenset(biases)) for part, n in heads.items()}
    sites = {Site(layer, "encoder"): alone["encoder"] for layer in range(layers["encoder"])}
    sites |= decoder_sites(config, alone["decoder"], replace(alone["decoder"], beside=2 * hidden), layers["decoder"])
    forward = {part: 2 * hidden * width + width + hidden for part, width in inner.items()}
    return paired_shape(
        config,
        family,
        sites,
        width=hidden,
        vocab=vocab,
        positions=positions,
        embeddings=vocab * hidden,
        encoder=layers["encoder"] * (forward["encoder"] + 4 * hidden) + encoder,
        decoder=layers["decoder"] * (forward["decoder"] + 4 * hidden) + decoder,
        encoder_positions=encoder_positions,
    )
