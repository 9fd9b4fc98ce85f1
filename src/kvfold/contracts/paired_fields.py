"""Fields of config.json that say what the decoder of an encoder-decoder caches: heads by kind, layers, a latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import pydantic

from kvfold.contracts.config import WIDTH, Rule, Rules
from kvfold.contracts.site import Attention, Kind, Shape, Site
from kvfold.contracts.stock import HEADS
from kvfold.contracts.student_site import with_encoder_latent
from kvfold.errors import UnsupportedModel

Json = Mapping[str, Any]
Sites = dict[Site, Attention]
COUNT = Annotated[int, pydantic.Field(ge=1)]

_BY_KIND: Mapping[Kind, str] = {"self": HEADS, "cross": f"cross_{HEADS}"}
ENCODER_LATENT = "cross_latent_dim"
"""The width of the latent that all cross-attentions read; without it each has keys and values of its own."""
CROSSING, FADING = "cross_attention_layers", "fading_cross_attention_layers"
"""The decoder layers with cross-attention, by default all, and those whose cross-attention a gate multiplies."""

_WHISPER: Mapping[Kind, str] = {**_BY_KIND, "self": f"self_{HEADS}"}
"""transformers' WhisperConfig reads `num_key_value_heads` as the encoder's heads, also behind `decoder_`."""


def _names(model_type: str) -> Mapping[Kind, str]:
    """The fields that have the key/value heads of each kind."""
    return _WHISPER if model_type.endswith("whisper") else _BY_KIND


def heads_by_kind(shape: Shape) -> dict[str, Any]:
    """Key/value heads of each kind, one number or one for each of its layers, and what else the decoder caches."""
    found: dict[str, Any] = {}
    for kind, name in _names(shape.model_type).items():
        counts = [each.num_key_value_heads for site, each in sorted(shape.sites.items()) if site.kind == kind]
        found[name] = counts[0] if len(set(counts)) == 1 else counts
    kept = shape.sites[shape.crossed[0]].kept
    if kept is not None:
        found[ENCODER_LATENT] = kept["latent"]
    if len(shape.crossed) < shape.num_layers:
        found[CROSSING] = [site.layer for site in shape.crossed]
    if fading := [site.layer for site in shape.crossed if shape.sites[site].fades]:
        found[FADING] = fading
    return found


def read_kinds(config: Json, sites: Sites) -> Sites:
    """The inverse: the sites of a decoder with what these fields say. Raises UnsupportedModel."""
    found = _read_crossing(config, sites)
    for kind, name in _names(str(config["model_type"])).items():
        stated, those = config.get(name), [site for site in found if site.kind == kind]
        counts = stated if isinstance(stated, list) else [stated] * len(those)
        if len(counts) != len(those):
            raise UnsupportedModel(f"config.json: {name} has {len(counts)} numbers for {len(those)} decoder layers")
        for site, count in zip(those, counts, strict=True):
            have = sites[site].num_key_value_heads
            if count is not None and count > have:
                raise UnsupportedModel(
                    f"config.json: {name} cannot be more than the decoder's", got=count, allowed=have
                )
            found[site] = replace(found[site], num_key_value_heads=count or have)
    width = config.get(ENCODER_LATENT)
    if width is None:
        return found
    first, *_ = crossed = [site for site in found if site.kind == "cross"]
    for site in crossed:
        if width > found[site].input_width:
            raise UnsupportedModel(
                f"config.json: {ENCODER_LATENT} is wider than the model", got=width, allowed=found[site].input_width
            )
        found[site] = with_encoder_latent(found[site], width, None if site == first else first.layer)
    return found


def _read_crossing(config: Json, sites: Sites) -> Sites:
    """The sites without the cross-attentions that a student does not have; those that fade are marked."""
    layers = sum(site.kind == "cross" for site in sites)
    for name in (CROSSING, FADING):
        stated = config.get(name)
        if stated is not None and not (stated and stated == sorted({each for each in stated if 0 <= each < layers})):
            raise UnsupportedModel(
                f"config.json: {name} must name layers in ascending order", got=stated, allowed=f"0 to {layers - 1}"
            )
    kept, fading = config.get(CROSSING), config.get(FADING) or ()
    return {
        site: replace(each, fades=True) if site.kind == "cross" and site.layer in fading else each
        for site, each in sites.items()
        if site.kind != "cross" or kept is None or site.layer in kept
    }


KINDS: Rules = {
    **dict.fromkeys(
        (*_BY_KIND.values(), _WHISPER["self"]),
        Rule(COUNT | list[COUNT], "a positive whole number").or_null,
    ),
    ENCODER_LATENT: WIDTH.or_null,
    **dict.fromkeys((CROSSING, FADING), Rule(list[int], "a list of layers").or_null),
}
"""The fields, each with its rule."""
