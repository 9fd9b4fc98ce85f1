"""Heads behind a norm over all of them: what is taken in comes out again, and heads that are alike lose nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve.normed_heads import absorb, merge_normed, restore, share_normed
from kvfold.solve.shared_heads import Moments
from kvfold.solve.shared_layers import Reader

HEADS, WIDTH, HIDDEN = 4, 6, 10
SITE = Attention(HIDDEN, HEADS, HEADS, WIDTH, norms="all_heads", rope=Rope(WIDTH, 100.0))


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def roles_of(attention: Attention, seed: int = 0) -> Roles:
    forms = attention.roles()
    roles = {role: drawn(*form, seed=seed + n) for n, (role, form) in enumerate(forms.items())}
    return {role: 1 + 0.3 * tensor if role.endswith("norm") else tensor for role, tensor in roles.items()}


def normed(rows_NM: Tensor, weight_M: Tensor) -> Tensor:
    """RMS norm over all heads at once."""
    return rows_NM / rows_NM.square().mean(-1, keepdim=True).sqrt() * weight_M


def moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    return x_ND.T @ x_ND / len(x_ND), x_ND.mean(0)


@pytest.mark.parametrize("biases", ["", "qkv"])
@pytest.mark.parametrize("dims", [WIDTH, 4])
def test_what_is_absorbed_is_restored(biases: str, dims: int) -> None:
    attention = replace(SITE, biases=frozenset(biases), rope=Rope(dims, 100.0))
    roles, seen = roles_of(attention), moments(drawn(50, HIDDEN, seed=9) + 0.5)
    new = absorb(roles, attention, *seen)
    assert new.keys() == roles.keys() - {"q_norm", "k_norm"}
    for role in "qk":
        restore(new, role, roles, attention, *seen)
    for role, tensor in roles.items():
        torch.testing.assert_close(new[role], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["fit", "align"])
def test_merged_heads_that_are_alike_are_normed_as_before(how: str) -> None:
    roles, x_ND = roles_of(SITE), drawn(50, HIDDEN, seed=9)
    for role in ("k", "k_norm", "v"):
        heads = roles[role].view(2, 2, WIDTH, -1)
        heads[:, 1] = heads[:, 0]
    gram_DD, mean_D = moments(x_ND)
    queries_HEE = torch.stack([torch.eye(WIDTH, dtype=torch.float64)] * HEADS)
    new, lost = merge_normed(SITE, roles, 2, Moments(gram_DD, mean_D, queries_HEE, gram_DD, mean_D), how)  # type: ignore[arg-type]
    assert max(lost) < 1e-12
    before, after = (normed(x_ND @ each["k"].T, each["k_norm"]).view(50, -1, WIDTH) for each in (roles, new))
    torch.testing.assert_close(after.repeat_interleave(2, 1), before, rtol=1e-9, atol=1e-9)
    before, after = (normed(x_ND @ each["q"].T, each["q_norm"]) for each in (roles, new))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_layers_that_are_alike_share_without_loss() -> None:
    """Also where one norms its keys with other weights, and its queries meet that."""
    x_ND = drawn(50, HIDDEN, seed=9)
    gram_DD, mean_D = moments(x_ND)
    owner = roles_of(SITE)
    other = {**owner, "k": 3 * owner["k"], "q": drawn(HEADS * WIDTH, HIDDEN, seed=40)}
    queries_HEE = torch.stack([torch.eye(WIDTH, dtype=torch.float64)] * HEADS)
    shared = share_normed([Reader(SITE, each, gram_DD, mean_D, gram_DD, queries_HEE) for each in (owner, other)])
    assert shared.lost < 1e-12
    keys = [normed(x_ND @ each["k"].T, each["k_norm"]) for each in (owner, shared.roles[0])]
    torch.testing.assert_close(keys[1], keys[0], rtol=1e-9, atol=1e-9)
    for new, old in zip(shared.roles, (owner, other), strict=True):
        before, after = (normed(x_ND @ each["q"].T, each["q_norm"]) for each in (old, new))
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert "k_norm" not in shared.roles[1]
