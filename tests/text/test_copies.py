"""Rows that repeat a span."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfold.errors import DataError
from kvfold.text.copies import SPAN, copy_rows


@pytest.fixture(name="ids_N")
def _ids() -> Tensor:
    return torch.randint(4, 200, (600,), generator=torch.Generator().manual_seed(1))


def test_copy_rows_are_a_span_some_text_and_the_span_again(ids_N: Tensor) -> None:
    near_BT, far_BT = (copy_rows(ids_N, distance, trials=5, seed=7) for distance in (0, 40))
    assert near_BT.shape == (5, 2 * SPAN)
    assert far_BT.shape == (5, 40 + 2 * SPAN)
    text = ids_N.tolist()
    for near, far in zip(near_BT.tolist(), far_BT.tolist(), strict=True):
        assert far[:SPAN] == far[-SPAN:] == near[:SPAN] == near[SPAN:]
        assert len(set(near)) == SPAN
        assert set(near) <= set(text)
        between = far[SPAN:-SPAN]
        assert any(text[start : start + 40] == between for start in range(len(text)))
    assert torch.equal(far_BT, copy_rows(ids_N, 40, trials=5, seed=7))
    assert not torch.equal(far_BT, copy_rows(ids_N, 40, trials=5, seed=8))


def test_spans_hold_no_special_token(ids_N: Tensor) -> None:
    special = list(range(4, 150))
    rows_BT = copy_rows(ids_N, 0, trials=20, seed=0, special=[*special, 999])
    assert int(rows_BT.min()) >= 150


@pytest.mark.parametrize(("tokens", "distance"), [(30, 40), (10, 0)])
def test_copy_refuses_a_text_that_is_too_short(ids_N: Tensor, tokens: int, distance: int) -> None:
    with pytest.raises(DataError, match="too short to probe copying"):
        copy_rows(ids_N[:tokens], distance, trials=2, seed=0)
