"""Rotary positions as complex numbers (RoFormer, arXiv 2104.09864, equation 13).

Two coordinates of a head that rotate together are one complex number z, and position m turns it by e^{i m theta}. A
logit is the real part of `sum_p q_p conj(k_p) e^{i (m - n) theta_p}`. So every logit stays as it was under

    k_p <- c_p k_p,   q_p <- q_p / conj(c_p)       for any complex c_p, one for each plane p of a head,

and under nothing larger: a map that mixes planes does not commute with the rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.shape import Rope


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


def rotate(heads_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn the planes of half-split heads by the angles of their tokens; with `-sin_TE`, the transpose of that.

    Coordinates behind the last rotated one are left as they are.
    """
    turned, rest = heads_BHTE[..., : cos_TE.shape[-1]], heads_BHTE[..., cos_TE.shape[-1] :]
    real, imaginary = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos_TE + torch.cat([-imaginary, real], dim=-1) * sin_TE, rest], dim=-1)
