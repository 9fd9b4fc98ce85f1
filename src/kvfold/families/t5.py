"""t5: encoder-decoders with relative position biases and no rotation: T5, T5.1.1, Flan-T5, mT5 and UMT5.

A decoder layer attends to the tokens before (`self`, cached per decoder token) and to the encoder's output (`cross`,
cached per encoder token). The encoder caches nothing, and no method folds its sites (`encoder`). Logits are not scaled.
A bias of the distance, one number per head, is added to those of self-attention. Its table is in the first layer of
each stack and serves all layers, so heads of self-attention keep their places; heads of cross-attention need not. UMT5
has a table in every layer.

A student with fewer key/value heads, or with a latent of the encoder's output, is a `kvfold_t5`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from kvfold.contracts.config import (
    ACTIVATION,
    EPSILON,
    HEADS,
    LAYERS,
    SHARE,
    VOCABULARY,
    WIDTH,
    YES_NO,
    Fields,
    Rules,
    check_parts,
    check_tokens,
    decimal,
    one_of,
    whole,
)
from kvfold.contracts.family import Body, Family, Json
from kvfold.contracts.runtimes import stock_type
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.families._encoder_decoder import PAIRED, architectures, decoder_sites, fields, paired_shape

POSITIONS = 1 << 15  # texts have no limit: all distances above `relative_attention_max_distance` share a bucket
BIAS = "relative_attention_bias"  # (buckets, H): a role of the first self-attention of a stack, in UMT5 of all

BODY = Body("", "decoder.block", crossing=("layer.1.layer_norm",))

_ACTIVATIONS = get_args(ACTIVATION.kind)
_RULES: Rules = {
    **PAIRED,
    "d_model": WIDTH.needed,
    "d_kv": WIDTH.needed,
    "num_heads": HEADS.needed,
    "num_layers": LAYERS.needed,
    "num_decoder_layers": LAYERS.or_null,
    "d_ff": WIDTH.needed,
    "vocab_size": VOCABULARY.needed,
    "relative_attention_num_buckets": whole(4, 1 << 16),
    "relative_attention_max_distance": whole(2, (1 << 31) - 1),
    "feed_forward_proj": one_of(*_ACTIVATIONS, *(f"gated-{name}" for name in _ACTIVATIONS)),
    "dense_act_fn": ACTIVATION,
    "is_gated_act": YES_NO,
    "dropout_rate": SHARE,
    "classifier_dropout": SHARE,
    "layer_norm_epsilon": EPSILON,
    "initializer_factor": decimal(0, 1e6),
    "is_decoder": YES_NO,
}
_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}


def _check(fields: Fields) -> None:
    fields.check(_RULES)
    for alias, name in _ALIASES.items():
        fields.check_alias(alias, name)
    check_parts(fields)
    check_tokens(fields, fields.config["vocab_size"])
    buckets, distance = (
        fields.get(f"relative_attention_{name}", default)
        for name, default in (("num_buckets", 32), ("max_distance", 128))
    )
    if distance <= buckets // 2:
        raise fields.refusal(
            "relative_attention_max_distance must be above half of the buckets",
            got=distance,
            allowed=f"above {buckets // 2}",
        )
    if fields.get("is_gated_act", _gated(fields.config)) != _gated(fields.config):
        raise fields.refusal("is_gated_act and feed_forward_proj differ", got=fields.config["is_gated_act"])


def _gated(config: Json) -> bool:
    """Whether the MLP has a gate; the default is that of transformers."""
    silent = "relu" if stock_type(config) == "t5" else "gated-gelu"
    return str(config.get("feed_forward_proj", silent)).startswith("gated-")


def _body(config: Json) -> Body:
    inner = {"gate": "wi_0", "up": "wi_1"} if _gated(config) else {"up": "wi"}
    path, parts = "layer.2.DenseReluDense", {**inner, "act": "act", "down": "wo"}
    return replace(BODY, mlp={part: f"{path}.{name}" for part, name in parts.items()})


def _shape(config: Json) -> Shape:
    hidden, width, heads, layers, inner, vocab = (
        config[name] for name in ("d_model", "d_kv", "num_heads", "num_layers", "d_ff", "vocab_size")
    )
    decoders = config.get("num_decoder_layers") or layers
    alone = Attention(hidden, heads, heads, width, scale=1.0)
    table = {BIAS: (int(config.get("relative_attention_num_buckets") or 32), heads)}
    sites = {Site(layer, "encoder"): alone for layer in range(layers)}
    sites |= decoder_sites(config, alone, replace(alone, beside=hidden), decoders)
    biased = [site for site in sites if site.kind != "cross" and (site.layer == 0 or stock_type(config) == "umt5")]
    sites |= {site: replace(sites[site], extra=table) for site in biased}
    forward = (3 if _gated(config) else 2) * hidden * inner
    return paired_shape(
        config,
        "t5",
        sites,
        width=hidden,
        vocab=vocab,
        positions=POSITIONS,
        embeddings=vocab * hidden * (2 if config.get("tie_word_embeddings") is False else 1),
        encoder=layers * (forward + 2 * hidden) + hidden,
        decoder=decoders * (forward + 2 * hidden) + hidden,
    )


FAMILY = Family(
    name="t5",
    architectures=architectures("t5", "mt5", "umt5"),
    aliases=("T5WithLMHeadModel",),
    about="T5, T5.1.1, Flan-T5, mT5, UMT5: decoder self- and cross-attention, the encoder as it is",
    examples=("google-t5/t5-base", "google/flan-t5-base", "google/umt5-base"),
    attention={
        "encoder": "encoder.block.{layer}.layer.0.SelfAttention",
        "self": "decoder.block.{layer}.layer.0.SelfAttention",
        "cross": "decoder.block.{layer}.layer.1.EncDecAttention",
    },
    tensors={**{role: f"{role}.weight" for role in "qkvo"}, "v_bias": "v.bias"},
    check=_check,
    shape=_shape,
    fields=fields,
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
    body=BODY,
    body_of=_body,
    encoder_decoder=True,
    depth="num_decoder_layers",
)
