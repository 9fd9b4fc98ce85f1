"""Span corruption, T5's objective (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4).

Of a row of T tokens, `n = round(0.15 T)` are noise, in `m = round(n / 3)` spans. Noise and the other tokens are each
divided into m parts (all divisions are equally likely) and alternate; noise comes second. A sentinel replaces each span
in the input, and the target holds the spans after their sentinels:

    a b c d e f g h  ->  a b <0> e f <1> </s>,    <0> c d <1> g h </s>

The input has `T - n + m + 1` tokens, the target `n + m + 1`: of a row of 568 tokens, 512 and 114.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.contracts.effort import CORRUPTED

DENSITY, SPAN = CORRUPTED, 3.0  # T5's values: the share of noise in a row, and the mean length of a span
Ids = NDArray[np.int64]


def noise_counts(tokens: int, density: float = DENSITY, span: float = SPAN) -> tuple[int, int]:
    """The number of noise tokens in a row, at least 1 and at most T - 1, and the number of spans."""
    noise = min(max(round(tokens * density), 1), tokens - 1)
    return noise, min(max(round(noise / span), 1), tokens - noise)


def noise_mask(tokens: int, generator: np.random.Generator, density: float = DENSITY, span: float = SPAN) -> Any:
    """The noise mask of a row, `(T,)`. It begins without noise and ends with noise."""
    noise, spans = noise_counts(tokens, density, span)
    lengths = np.empty(2 * spans, dtype=np.int64)
    lengths[0::2] = _parts(tokens - noise, spans, generator)
    lengths[1::2] = _parts(noise, spans, generator)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _parts(items: int, parts: int, generator: np.random.Generator) -> Ids:
    """The lengths of a random division into non-empty parts; all divisions are equally likely."""
    cuts = np.sort(generator.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def corrupted(ids_N: Ids, noise_N: Any, sentinels: Sequence[int], end: int) -> tuple[Ids, Ids]:
    """Input and target of a row: the input replaces each span of noise by a sentinel, the target all other spans."""
    return _replaced(ids_N, noise_N, sentinels, end), _replaced(ids_N, ~noise_N, sentinels, end)


def _replaced(ids_N: Ids, hidden_N: Any, sentinels: Sequence[int], end: int) -> Ids:
    """A row with a sentinel in place of each hidden span, and the end token."""
    first_N = hidden_N & ~np.concatenate([[False], hidden_N[:-1]])
    marked_N = np.where(first_N, np.asarray(sentinels)[np.maximum(first_N.cumsum() - 1, 0)], ids_N)
    return np.append(marked_N[first_N | ~hidden_N], end)


def row_tokens(inputs: int) -> int:
    """The length of the longest row whose input, with sentinels and end token, has at most `inputs` tokens."""

    def input_tokens(tokens: int) -> int:
        noise, spans = noise_counts(tokens)
        return tokens - noise + spans + 1

    tokens = max(inputs, 2)
    while input_tokens(tokens + 1) <= inputs:
        tokens += 1
    return tokens
