"""Rows in which a span of text is repeated after a distance: only attention that far back predicts the repetition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.errors import DataError

SPAN = 16  # tokens of a copied span: long enough to be unlike anything else, short enough for a window of 256


def copy_rows(ids_N: Tensor, distance: int, *, trials: int, seed: int, special: Sequence[int] = ()) -> Tensor:
    """Rows `[span, distance tokens of text, span]`: `ids_BT`, one row a trial.

    The span's tokens are distinct and drawn by their frequency in the text, so that each is one the model knows; the
    spans of a seed are the same at every distance. Raises DataError when the text is too short.
    """
    counts_V = torch.bincount(ids_N).double()
    counts_V[[token for token in special if token < len(counts_V)]] = 0
    if int((counts_V > 0).sum()) < SPAN or len(ids_N) < distance:
        raise DataError(
            "the text is too short to probe copying",
            got=f"{len(ids_N):,} tokens, {int((counts_V > 0).sum()):,} of them distinct",
            allowed=f"at least {distance:,} tokens, and {SPAN} distinct ones",
        )
    generator = torch.Generator().manual_seed(seed)
    spans_BS = torch.multinomial(counts_V.expand(trials, -1), SPAN, generator=generator)
    starts_B = torch.randint(len(ids_N) - distance + 1, (trials,), generator=generator)
    between_BT = ids_N[starts_B[:, None] + torch.arange(distance)]
    return torch.cat([spans_BS, between_BT, spans_BS], dim=1)
