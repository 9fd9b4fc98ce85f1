"""What the encoder-decoders share: how config.json says the key/value heads of self- and of cross-attention.

transformers builds most of these architectures with as many key/value heads as query heads and ignores
`num_key_value_heads` without a word. A student with fewer is of a model type of ours (`kvfold_t5`, `kvfold_bart`), and
so is a T5Gemma whose attentions do not all have the one number that its own config can say: `num_key_value_heads` for
self-attention and `cross_num_key_value_heads` for cross-attention, each one number or a list with one for each decoder
layer. So is one whose decoder layers share a latent of the encoder's output: `cross_latent_dim`, its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvfold.contracts.config import WIDTH, Rule, Rules, only
from kvfold.contracts.family import Json, own_type
from kvfold.contracts.runtimes import with_encoder_latent
from kvfold.contracts.site import Attention, Kind, Shape, Site
from kvfold.errors import UnsupportedModel
from kvfold.families._decoder import number

HEADS: Mapping[Kind, str] = {"self": "num_key_value_heads", "cross": "cross_num_key_value_heads"}
"""What a student's config.json calls the key/value heads of each kind."""

LATENT = "cross_latent_dim"
"""What it calls the width of the latent that all cross-attentions read; none: each has keys and values of its own."""

CLASSES = {"t5": "T5", "mt5": "MT5", "bart": "Bart", "mbart": "MBart", "t5gemma": "T5Gemma"}
"""Stock model types whose attention takes any number of key/value heads, and what transformers' classes begin with."""

_COUNTS = Rule(int | list[int], "a positive whole number").or_null

PAIRED: Rules = {
    "is_encoder_decoder": only(True, "true: an encoder alone caches nothing"),
    **dict.fromkeys(HEADS.values(), _COUNTS),
    LATENT: WIDTH.or_null,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(None, "absent: the rotation is a part's, or none")),
    **dict.fromkeys(("sliding_window", "layer_types"), Rule(None, "absent: windows are a part's, or none")),
    "per_layer_config": Rule(None, f"absent: {HEADS['self']} may be a list"),
}
"""What the fields of every encoder-decoder may be."""


def architectures(*model_types: str) -> dict[str, str]:
    """The classes of stock model types, and of those of ours that go with them."""
    end = "ForConditionalGeneration"
    return {
        **{each: f"{CLASSES[each]}{end}" for each in model_types},
        **{own_type(each): f"Kvfold{CLASSES[each]}{end}" for each in model_types},
    }


def kv_heads(config: Json, kind: Kind, alone: Attention, layers: int) -> list[int]:
    """Key/value heads of each decoder layer, those of `alone` where config.json names none.

    Raises UnsupportedModel where the architecture has no such number.
    """
    said, heads = _said(config, HEADS[kind]), alone.num_attention_heads
    found = said if isinstance(said, list) else [alone.num_key_value_heads if said is None else said] * layers
    if len(found) != layers:
        raise UnsupportedModel(f"config.json: {HEADS[kind]} has {len(found)} numbers for {layers} decoder layers")
    for count in found:
        if heads % number({HEADS[kind]: count}, HEADS[kind]):
            raise UnsupportedModel(f"config.json: {count} key/value heads do not divide {heads} query heads")
        if count > alone.num_key_value_heads:
            raise UnsupportedModel(
                f"config.json: {HEADS[kind]} cannot be more than the decoder's",
                got=count,
                allowed=alone.num_key_value_heads,
            )
    return list(found)


def decoder_sites(config: Json, own: Attention, cross: Attention, layers: int) -> dict[Site, Attention]:
    """The attentions of the decoder with what config.json says of their caches, from what they are without."""
    narrow = latent(config, cross.input_width)
    counts = {kind: kv_heads(config, kind, own, layers) for kind in HEADS}
    found = {}
    for layer in range(layers):
        found[Site(layer)] = replace(own, num_key_value_heads=counts["self"][layer])
        crossed = replace(cross, num_key_value_heads=counts["cross"][layer])
        found[Site(layer, "cross")] = crossed if narrow is None else with_encoder_latent(crossed, narrow, layer)
    return found


def parameters(sites: Mapping[Site, Attention]) -> tuple[int, int]:
    """Parameters of the encoder's attentions, and of the decoder's."""
    encoder = sum(each.parameters for site, each in sites.items() if site.kind == "encoder")
    return encoder, sum(each.parameters for each in sites.values()) - encoder


def latent(config: Json, hidden: int) -> int | None:
    """The width of the latent that all cross-attentions read, if they do. Raises UnsupportedModel for a wider one."""
    if _said(config, LATENT) is None:
        return None
    if number(config, LATENT) > hidden:
        raise UnsupportedModel(f"config.json: {LATENT} is wider than the model", got=config[LATENT], allowed=hidden)
    return number(config, LATENT)


def _said(config: Json, name: str) -> Any:
    """What only a model type of ours can say, None where it does not. Raises UnsupportedModel for a stock one."""
    said = config.get(name)
    if said is not None and config["model_type"] in CLASSES:
        raise UnsupportedModel(
            f"config.json: {name}, and transformers ignores it in {config['model_type']}",
            next=f"is its model_type {own_type(config['model_type'])}?",
        )
    return said


def fields(shape: Shape) -> dict[str, Any]:
    """What config.json says of a student: the stock architecture where nothing is shared, else ours with what is."""
    if shape.sites[Site(0, "cross")].kept is None and all(each.query_group == 1 for each in shape.sites.values()):
        return stock_fields(shape)
    return own_fields(shape)


def stock_fields(shape: Shape) -> dict[str, Any]:
    """The stock architecture."""
    name = f"{CLASSES[shape.model_type]}ForConditionalGeneration"
    return {"model_type": shape.model_type, "architectures": [name]}


def own_fields(shape: Shape) -> dict[str, Any]:
    """Ours, with the key/value heads of each attention and the width of a latent."""
    kept = shape.sites[Site(0, "cross")].kept
    counts: dict[str, list[int]] = {
        name: [shape.sites[Site(layer, kind)].num_key_value_heads for layer in range(shape.num_layers)]
        for kind, name in HEADS.items()
    }
    return {
        "model_type": own_type(shape.model_type),
        "architectures": [f"Kvfold{CLASSES[shape.model_type]}ForConditionalGeneration"],
        **{name: found[0] if len(set(found)) == 1 else found for name, found in counts.items()},
        **({} if kept is None else {LATENT: kept["latent"]}),
    }
