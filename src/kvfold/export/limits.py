"""Facts of a model that several engines need besides its weights."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvfold.contracts.site import Attention, Rope
from kvfold.disk.checkpoint import Checkpoint
from kvfold.predict.engines import rope_kind


def common_attention(source: Checkpoint) -> Attention:
    """The shape of every layer's attention, which differs only in windows and key/value heads."""
    return next(iter(source.shape.sites.values()))


def kv_heads(source: Checkpoint) -> list[int]:
    """Key/value heads of each layer."""
    return [attention.num_key_value_heads for attention in source.shape.sites.values()]


def window(source: Checkpoint) -> int | None:
    """Tokens up to which full attention computes what the model's sliding window does; None without a window."""
    return min((each.window for each in source.shape.sites.values() if each.window is not None), default=None)


def frequency_factors(rope: Rope | None) -> NDArray[np.float32] | None:
    """The divisor of each rotary frequency, `(dims / 2,)`; None without scaling.

    `llama3` stretches long wavelengths only (Llama 3.1; transformers' `_compute_llama3_parameters`).
    """
    if rope is None or rope_kind(rope) == "default":
        return None
    scaling = rope.scaling or {}
    if rope_kind(rope) == "linear":
        return np.full(rope.dims // 2, scaling["factor"], dtype=np.float32)
    assert rope_kind(rope) == "llama3", "`Engine.check` comes first"
    wavelength = 2 * math.pi * rope.theta ** (np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    return factors.astype(np.float32)
