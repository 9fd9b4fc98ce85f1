"""What the decoder families share: q, k, v and o apart, half-split rotation, RMS norms, a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvfold.errors import UnsupportedModel
from kvfold.families import Json
from kvfold.shape import Attention, Rope, Shape, Site

TENSORS = {
    **{role: f"{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"{role}_proj.bias" for role in "qkvo"},
}


def number(config: Json, name: str) -> int:
    """A positive whole number that config.json must state."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {name} must be a positive whole number", got=repr(value))
    return value


def decoder_shape(
    config: Json, family: str, *, biases: frozenset[str], mlp_biases: bool, windows: Sequence[int | None]
) -> Shape:
    """Shape of a decoder of this layout: rotary, RMS-normed, with a gated MLP."""
    hidden, heads, layers = (
        number(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if heads % kv_heads:
        raise UnsupportedModel(f"config.json: {kv_heads} key/value heads do not divide {heads} query heads")
    if config.get("per_layer_config"):
        raise UnsupportedModel("config.json: per_layer_config is not supported by this family")
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rotated = int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))
    rope = Rope(rotated, theta, scaling=dict(parameters) or None)
    sites = {
        Site(layer): Attention(hidden, heads, kv_heads, head_dim, biases, rope=rope, window=windows[layer])
        for layer in range(layers)
    }
    vocab, mlp = number(config, "vocab_size"), number(config, "intermediate_size")
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings", False) else 2)
    per_layer = 3 * hidden * mlp + 2 * hidden + (2 * mlp + hidden if mlp_biases else 0)
    attention = sum(site.parameters for site in sites.values())
    return Shape(
        family=family,
        model_type=str(config["model_type"]),
        sites=sites,
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=layers,
        parameters=embeddings + hidden + layers * per_layer + attention,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        max_positions=int(config.get("max_position_embeddings") or 2048),
    )


def heads_field(shape: Shape) -> dict[str, Any]:
    """`num_key_value_heads`, which must be the same in every layer for the source's own architecture."""
    counts = {attention.num_key_value_heads for attention in shape.sites.values()}
    if len(counts) != 1:
        raise UnsupportedModel(f"{shape.model_type} has one num_key_value_heads for all layers", got=sorted(counts))
    return {"num_key_value_heads": counts.pop()}


def tiny_decoder(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    """A config.json of this layout with a few thousand parameters."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        **changes,
    }
