"""Fused heads against a textbook of loops, their constraint against its closed form, and what is handed over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvfold.attention.fused_heads import FusedHeads

HEADS, WIDTH, INPUTS = 4, 3, 5
GROUPS = [[0, 3], [1, 2]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(bias: bool = True) -> tuple[FusedHeads, nn.Linear]:
    """Fused heads of random weights, and the map of the heads as they are."""
    plain = nn.Linear(INPUTS, HEADS * WIDTH, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(plain.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed))
    twin = nn.Linear(INPUTS, HEADS * WIDTH, bias=bias)
    twin.load_state_dict(plain.state_dict())
    return FusedHeads(plain, WIDTH), twin


def weighted(heads: FusedHeads, seed: int = 7) -> Tensor:
    """Give the heads random weights, `omega_GGE`."""
    omega_GGE = drawn(HEADS, HEADS, WIDTH, seed=seed)
    with torch.no_grad():
        heads.fusion.copy_(omega_GGE.flatten())
    return omega_GGE


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("narrow", [False, True])
def test_the_identity_changes_no_bit(bias: bool, narrow: bool) -> None:
    heads, plain = fused(bias)
    x_BTD = drawn(2, 7, INPUTS, seed=3)
    for groups in ([list(range(HEADS))], GROUPS):
        heads.join(groups)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            assert torch.equal(heads(x_BTD), plain(x_BTD))


def test_heads_are_weighted_sums_of_their_group() -> None:
    heads, plain = fused()
    heads.join(GROUPS)
    omega_GGE, x_D = weighted(heads), drawn(INPUTS, seed=3)
    own_GE = plain(x_D).view(HEADS, WIDTH)
    for group in GROUPS:
        for head in group:
            expected_E = sum(omega_GGE[head, other] * own_GE[other] for other in group)
            torch.testing.assert_close(heads(x_D).view(HEADS, WIDTH)[head], expected_E)


def test_the_spread_is_the_fusion_loss_of_pairs_over_that_of_the_identity() -> None:
    heads, _ = fused()
    heads.join(GROUPS)
    assert heads.spread().item() == 1
    omega_GGE = weighted(heads)
    pairs = sum((omega_GGE[a, other] - omega_GGE[b, other]).square().mean() / 2 for a, b in GROUPS for other in (a, b))
    at_identity = len(GROUPS)  # of a pair: 1/2 (1 + 1)
    torch.testing.assert_close(heads.spread(), pairs / at_identity)
    for first, second in GROUPS:
        omega_GGE[second] = omega_GGE[first]
    with torch.no_grad():
        heads.fusion.copy_(omega_GGE.flatten())
    assert heads.spread().item() == pytest.approx(0, abs=1e-7)


def test_distances_are_those_of_the_weights_of_two_heads() -> None:
    heads, _ = fused()
    omega_GGE = weighted(heads)  # before the search, all heads share one group
    expected_GG = torch.stack([((row - omega_GGE) ** 2).mean((1, 2)) for row in omega_GGE])
    torch.testing.assert_close(heads.distances(), expected_GG.double())


def test_the_constraint_descends_for_weights_and_ascends_for_its_multiplier() -> None:
    heads, _ = fused()
    weighted(heads)
    with torch.no_grad():
        heads.multiplier.fill_(3.0)
    excess = heads.spread().detach() - 0.25
    term = heads.constraint(0.25)
    assert term.item() == pytest.approx(3 * float(excess), rel=1e-6)
    term.backward()
    assert heads.multiplier.grad is not None
    assert heads.fusion.grad is not None
    torch.testing.assert_close(heads.multiplier.grad, -excess.view(1))
    (alone,) = torch.autograd.grad(3 * heads.spread(), heads.fusion)
    torch.testing.assert_close(heads.fusion.grad, alone)
    assert heads.constraint(1e9).item() == 0, "a threshold that is kept"


def test_one_head_stands_for_the_mean_of_its_group() -> None:
    heads, _ = fused()
    heads.join(GROUPS)
    weighted(heads)
    x_TD = drawn(6, INPUTS, seed=3)
    before_TGE = heads(x_TD).detach().view(6, HEADS, WIDTH)
    heads.hand_over()
    after_TGE = heads(x_TD).detach().view(6, HEADS, WIDTH)
    for group in GROUPS:
        assert heads.groups()[GROUPS.index(group)] == group
        for head in group:
            torch.testing.assert_close(after_TGE[:, head], before_TGE[:, group].mean(1), rtol=1e-5, atol=1e-6)
    rows = heads.weight.view(HEADS, WIDTH, -1)
    assert torch.equal(heads(x_TD).view(6, HEADS, WIDTH)[:, 3], after_TGE[:, 0])
    plain_TE = x_TD @ rows[0].T + heads.bias.view(HEADS, WIDTH)[0]
    torch.testing.assert_close(after_TGE[:, 0], plain_TE.detach(), rtol=1e-5, atol=1e-6)
