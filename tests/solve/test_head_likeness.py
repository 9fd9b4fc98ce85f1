"""Likeness of heads: equal heads in other coordinates, unrelated heads, and the loss of a merge that was made."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve.head_likeness import likeness
from kvfold.solve.rope import put_planes, to_planes
from kvfold.solve.shared_heads import Moments, low_rank

WIDTH, HIDDEN, TOKENS, HEADS, READERS = 8, 40, 400, 3, 2
ROPES = {"half-split": Rope(WIDTH, 100.0), "interleaved": Rope(4, 100.0, half_split=False), "none": None}


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaped(rope: Rope | None, heads: int = HEADS) -> Attention:
    return Attention(HIDDEN, READERS * heads, heads, WIDTH, rope=rope)


def roles_of(attention: Attention) -> Roles:
    return {role: drawn(*shape, seed=number) for number, (role, shape) in enumerate(attention.roles().items(), 1)}


def moments_of(attention: Attention, roles: Roles) -> Moments:
    x_ND = drawn(TOKENS, HIDDEN, seed=9) @ drawn(HIDDEN, HIDDEN, seed=10) + 1
    q_NHE = (x_ND @ roles["q"].T).view(TOKENS, -1, WIDTH)
    gram_DD, mean_D = x_ND.T @ x_ND / TOKENS, x_ND.mean(0)
    return Moments(gram_DD, mean_D, torch.einsum("nhe,nhf->hef", q_NHE, q_NHE) / TOKENS, gram_DD, mean_D)


def in_other_coordinates(attention: Attention, roles: Roles, head: int) -> None:
    """Change a head of k and v, and its readers, so that no logit and no output changes."""
    rope = attention.rope
    key_1ED = roles["k"].view(-1, WIDTH, HIDDEN)[head : head + 1]
    queries_RED = roles["q"].view(-1, WIDTH, HIDDEN)[head * READERS : (head + 1) * READERS]
    output_DRE = roles["o"].view(HIDDEN, -1, WIDTH)[:, head * READERS : (head + 1) * READERS]
    rotated = rope.dims if rope else 0
    if rope:
        turn_P1 = torch.polar(1 + torch.arange(rope.dims // 2) / 4.0, torch.arange(rope.dims // 2) + 1.0)[:, None]
        turn_P1 = turn_P1.to(torch.complex128)
        put_planes(key_1ED, turn_P1 * to_planes(key_1ED, rope), rope)
        put_planes(queries_RED, to_planes(queries_RED, rope) / turn_P1.conj(), rope)
    free_FF = drawn(WIDTH - rotated, WIDTH - rotated, seed=20)
    key_1ED[:, rotated:] = free_FF @ key_1ED[:, rotated:]
    queries_RED[:, rotated:] = torch.linalg.inv(free_FF).T @ queries_RED[:, rotated:]
    map_EE = drawn(WIDTH, WIDTH, seed=21)
    value_ED = roles["v"].view(-1, WIDTH, HIDDEN)[head]
    value_ED.copy_(map_EE @ value_ED)
    output_DRE.copy_(output_DRE @ torch.linalg.inv(map_EE))


@pytest.mark.parametrize("name", ROPES)
def test_images_of_a_head_are_the_same_and_no_coordinates_matter(name: str) -> None:
    attention = shaped(ROPES[name])
    roles = roles_of(attention)
    for role in "kv":
        heads_GED = roles[role].view(HEADS, WIDTH, HIDDEN)
        heads_GED[2] = heads_GED[0]
    before = likeness(attention, roles, moments_of(attention, roles))
    in_other_coordinates(attention, roles, 2)
    after = likeness(attention, roles, moments_of(attention, roles))
    for found in (before, after):
        assert found.keys_GG[0, 2] == pytest.approx(1, abs=1e-6)
        assert found.values_GG[2, 0] == pytest.approx(1, abs=1e-6)
        assert found.lost_GG[0, 2] < 1e-9
        assert found.lost_GG[0, 1] > 1e-3
        assert 0.01 < found.keys_GG[0, 1] < 0.9
    assert torch.allclose(before.values_GG, after.values_GG, atol=1e-6)
    assert torch.allclose(before.keys_GG, after.keys_GG, atol=1e-6)
    assert torch.allclose(before.value_rank_G, after.value_rank_G, rtol=1e-6)
    assert torch.allclose(before.key_rank_G, after.key_rank_G, rtol=1e-6)


def test_heads_of_other_inputs_have_nothing_in_common() -> None:
    attention = shaped(ROPES["half-split"])
    roles = roles_of(attention)
    for role in "kv":
        heads_GED = roles[role].view(HEADS, WIDTH, HIDDEN)
        for head in range(HEADS):
            heads_GED[head, :, : head * WIDTH] = heads_GED[head, :, (head + 1) * WIDTH :] = 0
    identity, nothing = torch.eye(HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
    moments = Moments(identity, nothing, torch.eye(WIDTH).expand(6, -1, -1).double(), identity, nothing)
    found = likeness(attention, roles, moments)
    for likeness_GG in (found.keys_GG, found.values_GG):
        assert torch.allclose(likeness_GG, torch.eye(HEADS, dtype=torch.float64), atol=1e-9)


def test_a_pair_loses_what_its_merge_loses() -> None:
    attention = shaped(ROPES["none"], heads=2)
    roles = roles_of(attention)
    moments = moments_of(attention, roles)
    output_DGRE = roles["o"].view(HIDDEN, 2, READERS, WIDTH)
    seen_GEE = torch.einsum("dgre,dgrf->gef", output_DGRE, output_DGRE)
    looks_GEE = moments.query_HEE.view(2, READERS, WIDTH, WIDTH).sum(1)
    lost = [
        low_rank(roles[role].view(2, WIDTH, HIDDEN), metric_GEE, moments.gram_DD, WIDTH).lost
        for role, metric_GEE in (("k", looks_GEE), ("v", seen_GEE))
    ]
    assert likeness(attention, roles, moments).lost_GG[0, 1] == pytest.approx(max(lost), rel=1e-9)


def test_the_effective_rank_is_the_entropy_of_the_spectrum() -> None:
    attention = shaped(None, heads=1)
    roles = roles_of(attention)
    roles["o"] = torch.cat([torch.eye(WIDTH), torch.zeros(HIDDEN - WIDTH, WIDTH)]).double().repeat(1, READERS)
    roles["v"] = torch.zeros(WIDTH, HIDDEN, dtype=torch.float64)
    roles["v"][0, 0], roles["v"][1, 1] = 2.0, 1.0  # variances 4 and 1 of 5
    identity, mean = torch.eye(HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
    found = likeness(
        attention, roles, Moments(identity, mean, torch.zeros(READERS, WIDTH, WIDTH).double(), identity, mean)
    )
    assert found.value_rank_G.item() == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), rel=1e-6)
    assert found.key_rank_G.item() == pytest.approx(1.0)  # no query looks
