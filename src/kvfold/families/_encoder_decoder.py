"""What the encoder-decoders share.

transformers builds most of these architectures with as many key/value heads as query heads and ignores
`num_key_value_heads`. A student with fewer has a model type of kvfold's own (`kvfold.contracts.runtimes.PAIRS`), and so
has a T5Gemma whose attentions differ from one another.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from kvfold.contracts.family import Json
from kvfold.contracts.runtimes import ENCODER_DECODERS, HEADS, PAIRS, read, stock_type
from kvfold.contracts.runtimes import architectures as architectures_of
from kvfold.contracts.runtimes import fields as fields_of
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.families._decoder import dtype_of

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

    `embeddings` counts those of both, and of the output projection.
    """
    read = encoder + sum(each.parameters for site, each in sites.items() if site.kind == "encoder")
    written = decoder + sum(each.parameters for site, each in sites.items() if site.kind != "encoder")
    return Shape(
        family=family,
        model_type=stock_type(config),
        sites=sites,
        hidden_size=width,
        vocab_size=vocab,
        num_layers=sum(site.kind == "cross" for site in sites),
        parameters=embeddings + read + written,
        dtype=dtype_of(config),
        max_positions=positions,
        encoder_parameters=read,
        encoder_positions=encoder_positions,
    )
