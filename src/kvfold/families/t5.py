"""t5: encoder-decoders with relative position biases and no rotation: T5, T5.1.1, Flan-T5 and mT5.

Every decoder layer attends twice: to what it wrote so far (`self`, cached per decoder token) and to the encoder's
output (`cross`, cached per encoder token). The encoder reads its input once and caches nothing: its sites are listed as
`encoder`, and no method folds them. Logits are not scaled. Nothing comes between a key and its query but a bias of
their distance, a number for each head: its table lies in the first layer of each stack and serves all layers, so heads
of a self-attention must keep their places; those of a cross-attention need not.

transformers builds every T5 with as many key/value heads as query heads and ignores `num_key_value_heads` without a
word. A student with fewer is `kvfold_t5`: `num_key_value_heads` for self-attention and `cross_num_key_value_heads` for
cross-attention, each one number or a list with one for each decoder layer. So is one whose decoder layers share a
latent of the encoder's output: `cross_latent_dim`, its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvfold.errors import UnsupportedModel
from kvfold.families import Family, Json, own_type, stock_type
from kvfold.families._decoder import number
from kvfold.shape import Attention, Kind, Shape, Site, with_encoder_latent

CLASSES = {"t5": "T5", "mt5": "MT5"}
"""Stock model types of this layout, and what transformers' classes for them begin with."""

HEADS: Mapping[Kind, str] = {"self": "num_key_value_heads", "cross": "cross_num_key_value_heads"}
"""What a student's config.json calls the key/value heads of each kind."""

LATENT = "cross_latent_dim"
"""What it calls the width of the latent that all cross-attentions read; none: each has keys and values of its own."""

POSITIONS = 1 << 15  # distances have no end, and all beyond `relative_attention_max_distance` look alike
BIAS = "relative_attention_bias"  # (buckets, H): the role that only the first self-attention of a stack has


def _shape(config: Json) -> Shape:
    hidden, width, heads, layers, inner, vocab = (
        number(config, name) for name in ("d_model", "d_kv", "num_heads", "num_layers", "d_ff", "vocab_size")
    )
    decoders = number(config, "num_decoder_layers") if config.get("num_decoder_layers") is not None else layers
    alone = Attention(hidden, heads, heads, width, scale=1.0, permutable=False)
    table = {BIAS: (int(config.get("relative_attention_num_buckets") or 32), heads)}
    sites = {Site(layer, "encoder"): replace(alone, extra={} if layer else table) for layer in range(layers)}
    counts = {kind: _kv_heads(config, HEADS[kind], heads, decoders) for kind in HEADS}
    latent = _latent(config, hidden)
    for layer in range(decoders):
        own, crossed = (counts[kind][layer] for kind in HEADS)
        sites[Site(layer)] = replace(alone, num_key_value_heads=own, extra={} if layer else table)
        cross = replace(alone, num_key_value_heads=crossed, permutable=True)
        sites[Site(layer, "cross")] = cross if latent is None else with_encoder_latent(cross, latent, layer)
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated-")
    forward = (3 if gated else 2) * hidden * inner
    encoder = sum(each.parameters for site, each in sites.items() if site.kind == "encoder")
    encoder += layers * (forward + 2 * hidden) + hidden
    decoder = sum(each.parameters for site, each in sites.items() if site.kind != "encoder")
    decoder += decoders * (forward + 3 * hidden) + hidden
    return Shape(
        family="t5",
        model_type=stock_type(config),
        sites=sites,
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=decoders,
        parameters=vocab * hidden * (2 if config.get("tie_word_embeddings") is False else 1) + encoder + decoder,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        max_positions=POSITIONS,
        encoder_parameters=encoder,
    )


def _kv_heads(config: Json, name: str, heads: int, layers: int) -> list[int]:
    """Key/value heads of each decoder layer. Raises UnsupportedModel where the architecture has no such number."""
    said = _said(config, name)
    if said is None:
        return [heads] * layers
    found = said if isinstance(said, list) else [said] * layers
    if len(found) != layers:
        raise UnsupportedModel(f"config.json: {name} has {len(found)} numbers for {layers} decoder layers")
    for kv_heads in found:
        if number({name: kv_heads}, name) > heads or heads % kv_heads:
            raise UnsupportedModel(f"config.json: {kv_heads} key/value heads do not divide {heads} query heads")
    return list(found)


def _said(config: Json, name: str) -> Any:
    """What only a model type of ours can say, None where it does not. Raises UnsupportedModel for a stock one."""
    said = config.get(name)
    if said is not None and config["model_type"] in CLASSES:
        raise UnsupportedModel(
            f"config.json: {name}, and transformers ignores it in {config['model_type']}",
            next=f"is its model_type {own_type(config['model_type'])}?",
        )
    return said


def _latent(config: Json, hidden: int) -> int | None:
    """The width of the latent that all cross-attentions read, if they do. Raises UnsupportedModel for a wider one."""
    if _said(config, LATENT) is None:
        return None
    if number(config, LATENT) > hidden:
        raise UnsupportedModel(f"config.json: {LATENT} is wider than the model", got=config[LATENT], allowed=hidden)
    return number(config, LATENT)


def _fields(shape: Shape) -> dict[str, Any]:
    """What config.json says of a student: the stock architecture where nothing is shared, else ours with what is."""
    counts: dict[str, list[int]] = {
        name: [shape.sites[Site(layer, kind)].num_key_value_heads for layer in range(shape.num_layers)]
        for kind, name in HEADS.items()
    }
    name = f"{CLASSES[shape.model_type]}ForConditionalGeneration"
    kept = shape.sites[Site(0, "cross")].kept
    if kept is None and all(attention.query_group == 1 for attention in shape.sites.values()):
        return {"model_type": shape.model_type, "architectures": [name]}
    return {
        "model_type": own_type(shape.model_type),
        "architectures": [f"Kvfold{name}"],
        **{name: found[0] if len(set(found)) == 1 else found for name, found in counts.items()},
        **({} if kept is None else {LATENT: kept["latent"]}),
    }


FAMILY = Family(
    name="t5",
    model_types=(*CLASSES, *map(own_type, CLASSES)),
    about="T5, T5.1.1, Flan-T5, mT5: decoder self- and cross-attention, the encoder as it is",
    attention={
        "encoder": "encoder.block.{layer}.layer.0.SelfAttention",
        "self": "decoder.block.{layer}.layer.0.SelfAttention",
        "cross": "decoder.block.{layer}.layer.1.EncDecAttention",
    },
    tensors={**{role: f"{role}.weight" for role in "qkvo"}, "v_bias": "v.bias"},
    shape=_shape,
    fields=_fields,
    tiny=lambda: {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 4,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "float32",
    },
    encoder_decoder=True,
)
