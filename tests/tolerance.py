"""How far two ways of computing the same thing may part, out of the arithmetic and not out of what was seen.

A sum of n products in a dtype is rounded n times, each time by at most eps/2 of it; another order of the sum (another
instruction set, library, number of threads, a cache instead of a whole text) rounds otherwise. The roundings are
independent, so they grow as the square root of their number: n numbers, in s sums that follow each other, part by about
`eps / 2 * sqrt(2 * n * s)` of the largest number. Six times that bounds every one of a million entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TERMS = 128  # of the longest sum in a tiny model, that of its MLP; the width is 64 or less
SUMS = 64  # one after the other: up to eight layers, of eight sums each
SIGMAS = 6


def allowed(
    expected: Tensor,
    *,
    terms: int = TERMS,
    sums: int = SUMS,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> float:
    """The largest difference of two results.

    `dtype` is what they were computed in, by default that of `expected`. `scale` is the largest number that is summed,
    where these cancel; by default the largest of `expected`.
    """
    eps = torch.finfo(dtype or expected.dtype).eps
    largest = float(expected[expected.isfinite()].abs().max()) if scale is None else scale
    return SIGMAS * eps / 2 * math.sqrt(2 * terms * sums) * largest


def assert_same(
    found: Tensor,
    expected: Tensor,
    *,
    terms: int = TERMS,
    sums: int = SUMS,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> None:
    """Assert that two ways of computing one thing agree, as far as the arithmetic can."""
    bound = allowed(expected.detach(), terms=terms, sums=sums, dtype=dtype, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
