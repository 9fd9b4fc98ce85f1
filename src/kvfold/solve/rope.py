"""Rotary positions as complex numbers (RoFormer, arXiv 2104.09864, equation 13).

Two coordinates of a head that rotate together are one complex number z, a plane; position m rotates it by
e^{i m theta}. A logit is the real part of `sum_p q_p conj(k_p) e^{i (m - n) theta_p}`. So no logit changes under

    k_p <- c_p k_p,   q_p <- q_p / conj(c_p)       for any complex c_p, one for each plane p of a head.

No larger family of maps has this property: a map that mixes planes does not commute with the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvfold.contracts.site import Rope
from kvfold.errors import SettingError

SCALINGS = ("default", "dynamic", "linear", "llama3", "yarn")
"""Kinds of RoPE scaling whose frequencies are known from the config alone."""


def pairs(rope: Rope) -> tuple[slice, slice]:
    """The coordinates of a head that are the real and the imaginary parts of its planes, in the config's layout."""
    if rope.half_split:
        return slice(0, rope.dims // 2), slice(rope.dims // 2, rope.dims)
    return slice(0, rope.dims, 2), slice(1, rope.dims, 2)


def to_planes(rows_HED: Tensor, rope: Rope) -> Tensor:
    """The rotated rows of head weights as complex planes, `(H, P, D)` with P = dims / 2."""
    real, imaginary = pairs(rope)
    return torch.complex(rows_HED[:, real].contiguous(), rows_HED[:, imaginary].contiguous())


def put_planes(rows_HED: Tensor, planes_HPD: Tensor, rope: Rope) -> None:
    """Write complex planes back into the rotated rows of head weights, in place."""
    real, imaginary = pairs(rope)
    rows_HED[:, real], rows_HED[:, imaginary] = planes_HPD.real, planes_HPD.imag


def rotate(heads_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, half_split: bool = True) -> Tensor:
    """Rotate heads by the angles of their tokens, coordinate by coordinate; with `-sin_TE`, the transpose of that.

    Coordinates behind the last rotated one stay as they are.
    """
    turned, rest = heads_BHTE[..., : cos_TE.shape[-1]], heads_BHTE[..., cos_TE.shape[-1] :]
    if half_split:
        real, imaginary = turned.chunk(2, dim=-1)
        across = torch.cat([-imaginary, real], dim=-1)
    else:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([turned * cos_TE + across * sin_TE, rest], dim=-1)


def frequencies(rope: Rope) -> tuple[Tensor, float]:
    """The angle per position of each plane, `theta_P` in radians, and the factor that the model applies to q and to k.

    They equal those of transformers for every scaling that does not depend on the length of the text (and `dynamic` up
    to the model's positions). Raises SettingError for others.
    """
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta_P = rope.theta ** -(torch.arange(0, rope.dims, 2, dtype=torch.float64) / rope.dims)
    if kind in ("default", "dynamic"):
        return theta_P, 1.0
    if kind == "linear":
        return theta_P / float(scaling["factor"]), 1.0
    if kind == "llama3":
        turns_P = float(scaling["original_max_position_embeddings"]) * theta_P / (2 * math.pi)
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        whole_P = ((turns_P - low) / (high - low)).clamp(0, 1)
        return theta_P * (whole_P + (1 - whole_P) / float(scaling["factor"])), 1.0
    if kind == "yarn":
        return _yarn(theta_P, rope, scaling)
    raise SettingError(f"RoPE scaling {kind!r} changes with the length of the text", allowed=", ".join(SCALINGS))


def _yarn(theta_P: Tensor, rope: Rope, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, equations 18 to 22): slow planes are interpolated, fast ones stay as they are."""
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])

    def plane(turns: float) -> float:
        """The plane, counted in halves of `dims`, that makes this many turns within the original positions."""
        return rope.dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = plane(scaling.get("beta_fast") or 32), plane(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    slow_P = ((torch.arange(rope.dims // 2, dtype=torch.float64) - first) / max(last - first, 1e-3)).clamp(0, 1)

    def stretched(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    both = scaling.get("mscale"), scaling.get("mscale_all_dim")
    on_heads = stretched(both[0]) / stretched(both[1]) if both[0] and both[1] else stretched(1.0)
    given = scaling.get("attention_factor")
    return theta_P * (1 - slow_P + slow_P / factor), on_heads if given is None else float(given)
