"""The latent's closed form against the singular value decomposition, against gradients, and on exact constructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kvfold.solve.low_rank import Block, joint, separate

D = 12


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int, width: int = D) -> Tensor:
    """Second moments of inputs whose directions differ a hundredfold in power."""
    x_ND = drawn(200, width, seed=seed) * torch.logspace(0, -1, width, dtype=torch.float64)
    x_ND = x_ND @ torch.linalg.qr(drawn(width, width, seed=seed + 1))[0]
    return x_ND.T @ x_ND / 200


def blocks(*, same: bool, seed: int = 0, rows: tuple[int, int] = (5, 8)) -> list[Block]:
    one_DD, other_DD = gram(seed), gram(seed + 50)
    return [
        Block(drawn(rows[0], D, seed=seed + 2), drawn(rows[0], rows[0], seed=seed + 3), one_DD),
        Block(drawn(rows[1], D, seed=seed + 4), drawn(rows[1], rows[1], seed=seed + 5), one_DD if same else other_DD),
    ]


def loss(given: Sequence[Block], down_RD: Tensor, ups: Sequence[Tensor]) -> Tensor:
    """By its definition, written out."""
    total = torch.zeros((), dtype=torch.float64)
    for block, up in zip(given, ups, strict=True):
        error = block.root_NN @ (block.rows_ND - up @ down_RD)
        total = total + torch.trace(error @ block.gram_DD @ error.T)
    return total


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_one_gram_is_the_whitened_svd(rank: int) -> None:
    given = blocks(same=True)
    down_RD, ups = joint(given, rank)
    values_D, vectors_DD = torch.linalg.eigh(given[0].gram_DD)
    root_DD = vectors_DD @ torch.diag(values_D.sqrt()) @ vectors_DD.T
    stacked_ND = torch.cat([block.root_NN @ block.rows_ND for block in given]) @ root_DD
    least = torch.linalg.svdvals(stacked_ND)[rank:].square().sum()
    torch.testing.assert_close(loss(given, down_RD, ups), least, rtol=1e-6, atol=1e-9)
    assert sum(block.loss(down_RD, up) for block, up in zip(given, ups, strict=True)) == pytest.approx(float(least))


def test_the_identity_everywhere_is_the_plain_svd_of_the_weights() -> None:
    one_DD = torch.eye(D, dtype=torch.float64)
    given = [Block(drawn(n, D, seed=n), torch.eye(n, dtype=torch.float64), one_DD) for n in (5, 8)]
    down_RD, ups = joint(given, 4)
    stacked_ND = torch.cat([block.rows_ND for block in given])
    left, values, right = torch.linalg.svd(stacked_ND, full_matrices=False)
    torch.testing.assert_close(torch.cat(ups) @ down_RD, left[:, :4] * values[:4] @ right[:4], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [2, 5, 9])
@pytest.mark.parametrize("seed", [0, 7])
def test_turns_only_gain_and_end_where_no_gradient_is_left(
    rank: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = blocks(same=False, seed=seed)
    losses = []
    for rounds in (0, 1, 8, 2000):
        monkeypatch.setattr("kvfold.solve.low_rank.ROUNDS", rounds)
        down_RD, ups = joint(given, rank)
        losses.append(float(loss(given, down_RD, ups)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    parameters = [each.clone().requires_grad_() for each in (down_RD, *ups)]
    loss(given, parameters[0], parameters[1:]).backward()
    sizes = [float((each.grad * each.detach()).norm()) for each in parameters if each.grad is not None]
    assert len(sizes) == 3
    assert max(sizes) < 1e-3 * float(sum(block.power() for block in given))


@pytest.mark.parametrize("make", [joint, separate])
@pytest.mark.parametrize("rows", [(5, 4), (5, 20), (0, 8)])
def test_as_much_as_there_is_to_keep_is_kept_to_the_bit(
    make: Callable[..., tuple[Tensor, list[Tensor]]], rows: tuple[int, int]
) -> None:
    given = blocks(same=True, rows=rows)
    rank = sum(rows) if make is separate else min(sum(rows), D)
    down_RD, ups = make(given, rank)
    assert down_RD.shape == (rank, D)
    for block, up_NR in zip(given, ups, strict=True):
        assert torch.equal(up_NR @ down_RD, block.rows_ND)


def test_a_latent_wider_than_needed_is_filled_with_nothing() -> None:
    given = blocks(same=True, rows=(2, 3))
    down_RD, ups = joint(given, 7)
    assert not down_RD[5:].any()
    assert all(torch.equal(up @ down_RD, block.rows_ND) for block, up in zip(given, ups, strict=True))


def test_separate_latents_do_not_mix_and_share_by_worth() -> None:
    given = blocks(same=False)
    down_RD, (k_up, v_up) = separate(given, 6)
    owners = [(bool(k_up[:, r].any()), bool(v_up[:, r].any())) for r in range(6)]
    assert all(first != second for first, second in owners)
    kept = sum(first for first, _ in owners)
    alone = []
    for number in range(7):  # every way to share 6 directions, each block at its own best
        downs = [
            joint([block], each) if each else None for block, each in zip(given, (number, 6 - number), strict=True)
        ]
        alone.append(
            sum(
                block.power() if found is None else block.loss(found[0], found[1][0])
                for block, found in zip(given, downs, strict=True)
            )
        )
    assert kept == alone.index(min(alone))
    assert float(loss(given, down_RD, [k_up, v_up])) == pytest.approx(min(alone))


def test_one_latent_for_both_loses_no_more_than_two() -> None:
    given = blocks(same=True)
    for rank in range(1, 12):
        assert loss(given, *joint(given, rank)) <= loss(given, *separate(given, rank)) * (1 + 1e-9)


def test_directions_that_never_occur_cost_nothing() -> None:
    """A teacher whose inputs lie in 6 dimensions is kept whole by a latent of 6."""
    basis_6D = drawn(6, D, seed=1)
    gram_DD = basis_6D.T @ basis_6D
    given = [Block(drawn(n, D, seed=n), torch.eye(n, dtype=torch.float64), gram_DD) for n in (5, 8)]
    down_RD, ups = joint(given, 6)
    assert float(loss(given, down_RD, ups)) < 1e-6 * sum(block.power() for block in given)
    assert bool(down_RD.isfinite().all())
