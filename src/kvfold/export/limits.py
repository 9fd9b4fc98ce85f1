"""What an engine must be told of a model beyond its weights, and what none of them can be told."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvfold.checkpoint import Checkpoint
from kvfold.errors import UnsupportedModel
from kvfold.shape import Attention, Rope

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def common_attention(source: Checkpoint, engine: str) -> Attention:
    """The one shape that every layer's attention has, windows and key/value heads aside.

    Raises UnsupportedModel when the engine has no place for what config.json says.
    """
    config, model_type = source.config, source.shape.model_type
    first = next(iter(source.shape.sites.values()))

    def refuse(what: str, got: object, allowed: object) -> UnsupportedModel:
        return UnsupportedModel(f"cannot be exported to {engine}: {what}", where=source.path, got=got, allowed=allowed)

    if model_type not in ARCHITECTURES:
        raise refuse("its architecture is not known here", model_type, ", ".join(ARCHITECTURES))
    if source.shape.owners:
        raise refuse(
            "its layers share keys and values",
            f"{len(source.shape.owners)} owners",
            "keys and values of its own for each layer",
        )
    other = next((each for each in source.shape.sites.values() if each.kept is not None), None)
    if other is not None:
        kept = " and ".join(other.cached)
        raise refuse("the engine keeps keys and values of heads", kept, "a student of gqa, or transformers with kvfold")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise refuse("the engine gates its MLP with silu", activation, "silu")
    if first.rope is None or first.rope.dims != first.head_dim:
        raise refuse("the engine rotates whole heads", config.get("rope_parameters"), f"{first.head_dim} dimensions")
    frequency_factors(first.rope)
    return first


def kv_heads(source: Checkpoint) -> list[int]:
    """Key/value heads of each layer."""
    return [attention.num_key_value_heads for attention in source.shape.sites.values()]


def window(source: Checkpoint) -> int | None:
    """Tokens up to which full attention computes what the model's sliding window does; None without a window."""
    return min((each.window for each in source.shape.sites.values() if each.window is not None), default=None)


def frequency_factors(rope: Rope | None) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, `(dims / 2,)`; None when nothing scales them.

    `llama3` stretches long wavelengths only (Llama 3.1; transformers' `_compute_llama3_parameters`).
    Raises UnsupportedModel for scalings that depend on the length of the text or that scale the logits too.
    """
    if rope is None:
        return None
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return np.full(rope.dims // 2, scaling["factor"], dtype=np.float32)
    if kind != "llama3":
        raise UnsupportedModel(f"RoPE scaling {kind!r} cannot be exported", allowed="default, linear, llama3")
    wavelength = 2 * math.pi * rope.theta ** (np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    return factors.astype(np.float32)
