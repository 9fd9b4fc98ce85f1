"""What an engine must be told of a model beyond its weights, and what none of them can be told."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvfold.contracts.site import Attention, Rope
from kvfold.disk.checkpoint import Checkpoint
from kvfold.predict.engines import refusal, rope_kind


def check(source: Checkpoint, engine: str) -> None:
    """Raise UnsupportedModel when an engine has no place for what config.json says: what a plan says of it too."""
    found = refusal(engine, source.config, source.shape)
    if found is not None:
        raise found.error(engine, source.path)


def common_attention(source: Checkpoint) -> Attention:
    """The one shape that every layer's attention has, windows and key/value heads aside."""
    return next(iter(source.shape.sites.values()))


def kv_heads(source: Checkpoint) -> list[int]:
    """Key/value heads of each layer."""
    return [attention.num_key_value_heads for attention in source.shape.sites.values()]


def window(source: Checkpoint) -> int | None:
    """Tokens up to which full attention computes what the model's sliding window does; None without a window."""
    return min((each.window for each in source.shape.sites.values() if each.window is not None), default=None)


def frequency_factors(rope: Rope | None) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, `(dims / 2,)`; None when nothing scales them.

    `llama3` stretches long wavelengths only (Llama 3.1; transformers' `_compute_llama3_parameters`).
    """
    if rope is None or rope_kind(rope) == "default":
        return None
    scaling = rope.scaling or {}
    if rope_kind(rope) == "linear":
        return np.full(rope.dims // 2, scaling["factor"], dtype=np.float32)
    assert rope_kind(rope) == "llama3", "`check` comes first"
    wavelength = 2 * math.pi * rope.theta ** (np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    return factors.astype(np.float32)
