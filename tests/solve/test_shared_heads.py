"""Merged heads against brute force: explicit samples, one singular value decomposition each, and every logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from kvfold.contracts.requests import AttentionGram, HeadKL, InputGram, QueryGram
from kvfold.contracts.site import Attention, Roles, Rope, Site
from kvfold.solve import Merge
from kvfold.solve.shared_heads import Merged, Moments, ablation_weights, aligned, low_rank, merge_site, moments_of

HOWS: tuple[Merge, ...] = get_args(Merge)
WIDTH, HIDDEN, TOKENS = 8, 12, 60
ROPES: dict[str, Rope | None] = {
    "half-split": Rope(WIDTH, 100.0),
    "interleaved": Rope(WIDTH, 100.0, half_split=False),
    "partial": Rope(6, 100.0),
    "partial, interleaved": Rope(4, 100.0, half_split=False),
    "no rotation": None,
}


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def samples(seed: int, rows: int = TOKENS) -> Tensor:
    """Inputs that are neither centred nor alike in all directions."""
    return drawn(rows, HIDDEN, seed=seed) @ drawn(HIDDEN, HIDDEN, seed=99) + drawn(HIDDEN, seed=seed + 1)


def second(x_ND: Tensor) -> Tensor:
    return x_ND.T @ x_ND / len(x_ND)


# --- one shared head for a group ------------------------------------------------------------------------------------


def price(merged: Merged, maps_JED: Tensor, metrics_JEE: Tensor, x_ND: Tensor) -> float:
    """`sum_j E |root(M_j) (A_j x - L_j S x)|^2`, head by head and sample by sample."""
    total = 0.0
    for A_ED, M_EE, L_ER in zip(maps_JED, metrics_JEE, merged.lift_JER, strict=True):
        for x_D in x_ND.to(A_ED):
            off_E = A_ED @ x_D - L_ER @ (merged.shared_RD @ x_D)
            total += float((off_E.conj() @ M_EE @ off_E).real)
    return total / len(x_ND)


def best(maps_JED: Tensor, metrics_JEE: Tensor, x_ND: Tensor, rank: int) -> tuple[float, float]:
    """What no map of this rank can keep, and all there is: by Eckart and Young on the samples themselves."""
    factors = [torch.linalg.cholesky(M_EE).mH @ A_ED for A_ED, M_EE in zip(maps_JED, metrics_JEE, strict=True)]
    values = torch.linalg.svdvals(torch.cat([x_ND.to(A_ED) @ A_ED.T for A_ED in factors], dim=1)) ** 2
    return float(values[rank:].sum()) / len(x_ND), float(values.sum()) / len(x_ND)


@pytest.mark.parametrize(
    ("width", "rank", "dtype"),
    [(5, 5, torch.float64), (5, 2, torch.float64), (1, 1, torch.complex128), (3, 2, torch.complex128)],
)
def test_no_shared_head_is_better(width: int, rank: int, dtype: torch.dtype) -> None:
    maps_JED, x_ND = drawn(3, width, HIDDEN, dtype=dtype), samples(1)
    roots_JEE = drawn(3, width, width + 2, seed=3, dtype=dtype)
    metrics_JEE = roots_JEE @ roots_JEE.mH
    merged = low_rank(maps_JED, metrics_JEE, second(x_ND), rank)
    least, whole = best(maps_JED, metrics_JEE, x_ND, rank)
    assert merged.shared_RD.shape == (rank, HIDDEN)
    assert merged.lift_JER.shape == (3, width, rank)
    assert price(merged, maps_JED, metrics_JEE, x_ND) == pytest.approx(least, rel=1e-9)
    assert merged.lost == pytest.approx(least / whole, rel=1e-9)
    assert least > 0.05 * whole  # there is something to lose
    for seed in range(20):  # and a step in any direction is worse
        near = 1e-3 * drawn(rank, HIDDEN, seed=seed, dtype=dtype)
        moved = replace(merged, shared_RD=merged.shared_RD + near)
        assert price(moved, maps_JED, metrics_JEE, x_ND) > least
        moved = replace(merged, lift_JER=merged.lift_JER + 1e-3 * drawn(3, width, rank, seed=seed, dtype=dtype))
        assert price(moved, maps_JED, metrics_JEE, x_ND) > least


def test_planes_in_front_are_problems_of_their_own() -> None:
    maps_PJ1D, x_ND = drawn(4, 3, 1, HIDDEN, dtype=torch.complex128), samples(1)
    metrics_PJ11 = drawn(4, 3, 1, 1, seed=5).square().to(torch.complex128)
    together = low_rank(maps_PJ1D, metrics_PJ11, second(x_ND), 1)
    least = [best(*each, x_ND, 1) for each in zip(maps_PJ1D, metrics_PJ11, strict=True)]
    for plane in range(4):
        alone = Merged(together.shared_RD[plane], together.lift_JER[plane], 0.0)
        assert price(alone, maps_PJ1D[plane], metrics_PJ11[plane], x_ND) == pytest.approx(least[plane][0], rel=1e-9)
    assert together.lost == pytest.approx(sum(lost for lost, _ in least) / sum(whole for _, whole in least), rel=1e-9)


@pytest.mark.parametrize(("rank", "dtype"), [(5, torch.float64), (2, torch.float64), (5, torch.complex128)])
def test_a_shared_head_is_as_loud_as_those_it_stands_for(rank: int, dtype: torch.dtype) -> None:
    """Whole, not row by row: the power of `width` rows is spread over `rank` of them."""
    maps_JED, x_ND = 30 * drawn(3, 5, HIDDEN, dtype=dtype), samples(1)
    metrics_JEE = 1e-4 * torch.eye(5, dtype=dtype).expand(3, 5, 5)
    merged = low_rank(maps_JED, metrics_JEE, second(x_ND), rank)
    said = (x_ND.to(dtype) @ maps_JED.mT).abs().square().sum(2).mean()
    heard = (x_ND.to(dtype) @ merged.shared_RD.T).abs().square().sum(1).mean()
    torch.testing.assert_close(heard, said, rtol=1e-9, atol=0)


def test_images_of_one_head_are_read_off_it() -> None:
    source_ED, images_JEE = drawn(5, HIDDEN), drawn(3, 5, 5, seed=1)
    maps_JED = images_JEE @ source_ED
    merged = low_rank(maps_JED, torch.eye(5).double().expand(3, 5, 5), second(samples(1)), 5)
    assert abs(merged.lost) < 1e-12
    torch.testing.assert_close(merged.lift_JER @ merged.shared_RD, maps_JED, rtol=1e-9, atol=1e-9)


# --- alignment ------------------------------------------------------------------------------------------------------


def turned_to_one_another(heads: list[Any], rounds: int = 2000) -> tuple[Any, list[Any]]:
    """The generalised Procrustes loop as a textbook has it, on samples: mean and turns (N, E), (E, E)."""
    mean = heads[0]
    for _ in range(rounds):
        if heads[0].shape[1] == 1:
            turns = [np.exp(1j * np.angle(np.vdot(head, mean)))[None, None] for head in heads]
        else:
            turns = [orthogonal_procrustes(head, mean)[0] for head in heads]
        mean = sum(head @ turn for head, turn in zip(heads, turns, strict=True)) / len(heads)
    return mean, turns


@pytest.mark.parametrize(("width", "dtype"), [(4, torch.float64), (1, torch.complex128)])
def test_alignment_is_the_procrustes_loop(width: int, dtype: torch.dtype) -> None:
    shared_ED, x_ND = drawn(width, HIDDEN, dtype=dtype), samples(1)
    turns_JEE = torch.linalg.qr(drawn(3, width, width, seed=1, dtype=dtype)).Q
    maps_JED = turns_JEE @ shared_ED + 0.3 * drawn(3, width, HIDDEN, seed=2, dtype=dtype)
    merged = aligned(maps_JED, second(x_ND), keep_norm=False)
    heads = [(x_ND.to(dtype) @ A_ED.T).numpy() for A_ED in maps_JED]
    mean, turns = turned_to_one_another(heads)
    found = (x_ND.to(dtype) @ merged.shared_RD.T).numpy()
    np.testing.assert_allclose(found, mean, rtol=0, atol=2e-3 * np.abs(mean).max())
    for lift_EE, turn in zip(merged.lift_JER, turns, strict=True):  # A ~ L u: samples of A are turned by conj(L)
        np.testing.assert_allclose(lift_EE.conj().resolve_conj().numpy(), turn, rtol=0, atol=2e-3)
        np.testing.assert_allclose((lift_EE @ lift_EE.mH).numpy(), np.eye(width), rtol=0, atol=1e-12)
    off = sum(np.linalg.norm(head @ turn - mean) ** 2 for head, turn in zip(heads, turns, strict=True))
    whole = sum(np.linalg.norm(head) ** 2 for head in heads)
    assert merged.lost == pytest.approx(off / whole, rel=1e-4)
    assert 0.01 < merged.lost < 0.5


@pytest.mark.parametrize(("width", "dtype"), [(4, torch.float64), (1, torch.complex128)])
def test_the_norm_is_that_of_the_heads(width: int, dtype: torch.dtype) -> None:
    maps_PJED, gram_DD = drawn(2, 3, width, HIDDEN, dtype=dtype), second(samples(1))
    plain, kept = (aligned(maps_PJED, gram_DD, keep_norm=keep_norm) for keep_norm in (False, True))
    norms_P = torch.linalg.matrix_norm(maps_PJED).mean(-1)
    torch.testing.assert_close(torch.linalg.matrix_norm(kept.shared_RD), norms_P)
    assert bool((torch.linalg.matrix_norm(plain.shared_RD) < 0.95 * norms_P).all())
    assert torch.equal(kept.lift_JER, plain.lift_JER)
    longer_P = (norms_P / torch.linalg.matrix_norm(plain.shared_RD))[:, None, None]
    torch.testing.assert_close(kept.shared_RD, plain.shared_RD * longer_P)


# --- a whole site ---------------------------------------------------------------------------------------------------


def attention(rope: str = "half-split", heads: tuple[int, int] = (4, 4), biased: bool = False) -> Attention:
    return Attention(HIDDEN, *heads, WIDTH, biases=frozenset("qkvo") if biased else frozenset(), rope=ROPES[rope])


def site(shape: Attention, seed: int = 0) -> Roles:
    return {role: 0.3 * drawn(*size, seed=seed + number) for number, (role, size) in enumerate(shape.roles().items())}


def heads_of(x_ND: Tensor, roles: Roles, role: str) -> Tensor:
    """What a role makes of inputs, head by head (N, H, E)."""
    out_NE = x_ND @ roles[role].T
    if f"{role}_bias" in roles:
        out_NE = out_NE + roles[f"{role}_bias"]
    if f"{role}_norm" in roles:
        heads_NHE = out_NE.view(len(x_ND), -1, WIDTH)
        return heads_NHE / heads_NHE.square().mean(-1, keepdim=True).sqrt() * roles[f"{role}_norm"]
    return out_NE.view(len(x_ND), -1, WIDTH)


def planes_of(heads_NHE: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Heads as complex planes (N, H, P), and what is not rotated (N, H, F)."""
    if rope is None:
        return torch.zeros(*heads_NHE.shape[:2], 0, dtype=torch.complex128), heads_NHE
    turns, half = heads_NHE[..., : rope.dims], rope.dims // 2
    one, two = (turns[..., :half], turns[..., half:]) if rope.half_split else (turns[..., ::2], turns[..., 1::2])
    return torch.complex(one.contiguous(), two.contiguous()), heads_NHE[..., rope.dims :]


def logits(shape: Attention, roles: Roles, x_ND: Tensor) -> Tensor:
    """Every query of every head with every key, each at its own position (H, T, S)."""
    q_NHP, free_q = planes_of(heads_of(x_ND, roles, "q"), shape.rope)
    k_NHP, free_k = planes_of(heads_of(x_ND, roles, "k"), shape.rope)
    if shape.rope:
        angles_P = shape.rope.theta ** (-torch.arange(0, shape.rope.dims, 2).double() / shape.rope.dims)
        turn_N1P = torch.exp(1j * torch.arange(len(x_ND)).double()[:, None, None] * angles_P)
        q_NHP, k_NHP = q_NHP * turn_N1P, k_NHP * turn_N1P
    group = q_NHP.shape[1] // k_NHP.shape[1]
    k_NHP, free_k = k_NHP.repeat_interleave(group, 1), free_k.repeat_interleave(group, 1)
    rotated_HTS = torch.einsum("thp,shp->hts", q_NHP, k_NHP.conj()).real
    return rotated_HTS + torch.einsum("thf,shf->hts", free_q, free_k)


def spoken(shape: Attention, roles: Roles, y_ND: Tensor) -> Tensor:
    """What each query head adds to the residual stream when it attends to inputs alone (N, H, D)."""
    v_NGE = heads_of(y_ND, roles, "v")
    v_NHE = v_NGE.repeat_interleave(shape.num_attention_heads // v_NGE.shape[1], 1)
    return torch.einsum("nhe,dhe->nhd", v_NHE, roles["o"].view(HIDDEN, -1, WIDTH))


def moments(roles: Roles, x_ND: Tensor, y_ND: Tensor) -> Moments:
    q_NHE = heads_of(x_ND, roles, "q")
    query_HEE = torch.einsum("nhe,nhf->hef", q_NHE, q_NHE) / len(x_ND)
    return Moments(second(x_ND), x_ND.mean(0), query_HEE, second(y_ND), y_ND.mean(0))


def merge(
    shape: Attention, roles: Roles, heads: int, how: Merge = "fit", seed: int = 10
) -> tuple[Attention, Roles, list[float]]:
    """The merged site on samples of its own."""
    found, lost = merge_site(shape, roles, heads, moments(roles, samples(seed), samples(seed + 5)), how)
    return replace(shape, num_key_value_heads=heads), found, lost


def gauge(shape: Attention, roles: Roles, *, orthogonal: bool = False, seed: int = 40) -> Roles:
    """Another teacher of the same function: a complex number for each rotated plane of a key head, any matrix else.

    `orthogonal` ones are phases and turns.
    """
    changed = {role: tensor.clone() for role, tensor in roles.items()}
    group, rotated = shape.query_group, shape.rope.dims if shape.rope else 0

    def apply(role: str, head: int, map_EE: Tensor) -> None:
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        changed[role][rows] = map_EE @ changed[role][rows]
        if f"{role}_bias" in changed:
            changed[f"{role}_bias"][rows] = map_EE @ changed[f"{role}_bias"][rows]

    for head in range(shape.num_key_value_heads):
        key_EE = torch.eye(WIDTH).double()
        if shape.rope:
            half = rotated // 2
            for plane in range(half):
                pair = [plane, plane + half] if shape.rope.half_split else [2 * plane, 2 * plane + 1]
                a, b = drawn(2, seed=seed + 100 * head + plane)
                if orthogonal:
                    a, b = (each / torch.hypot(a, b) for each in (a, b))
                key_EE[np.ix_(pair, pair)] = torch.stack([torch.stack([a, -b]), torch.stack([b, a])])
        free_EE = drawn(WIDTH - rotated, WIDTH - rotated, seed=seed + head)
        value_EE = drawn(WIDTH, WIDTH, seed=seed + 50 + head)
        if orthogonal:
            free_EE, value_EE = torch.linalg.qr(free_EE).Q, torch.linalg.qr(value_EE).Q
        key_EE[rotated:, rotated:] = free_EE
        apply("k", head, key_EE)
        apply("v", head, value_EE)
        for reader in range(head * group, (head + 1) * group):
            apply("q", reader, torch.linalg.inv(key_EE).T)
            columns = slice(reader * WIDTH, (reader + 1) * WIDTH)
            changed["o"][:, columns] = changed["o"][:, columns] @ torch.linalg.inv(value_EE)
    return changed


def alike(shape: Attention, roles: Roles, heads: int, *, orthogonal: bool = False) -> Roles:
    """The heads of each group made equal, and then each given a gauge of its own: linear images of one another."""
    same = {role: tensor.clone() for role, tensor in roles.items()}
    group = shape.num_key_value_heads // heads
    for role in {"k", "v", "k_bias", "v_bias"} & roles.keys():
        blocks = same[role].view(heads, group, WIDTH, -1)
        blocks[:, 1:] = blocks[:, :1]
    return gauge(shape, same, orthogonal=orthogonal)


SHAPES = [(rope, heads, biased) for rope in ROPES for heads in ((4, 4), (8, 4)) for biased in (False, True)]


@pytest.mark.parametrize(("rope", "heads", "biased"), SHAPES)
def test_images_of_one_another_lose_nothing(rope: str, heads: tuple[int, int], biased: bool) -> None:
    shape = attention(rope, heads, biased)
    roles, x_ND = alike(shape, site(shape), 2), samples(20)
    merged_shape, merged, lost = merge(shape, roles, 2)
    assert {role: tuple(tensor.shape) for role, tensor in merged.items()} == merged_shape.roles()
    torch.testing.assert_close(logits(merged_shape, merged, x_ND), logits(shape, roles, x_ND), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(spoken(merged_shape, merged, x_ND), spoken(shape, roles, x_ND), rtol=1e-7, atol=1e-7)
    assert len(lost) == 2
    assert max(map(abs, lost)) < 1e-10
    assert {role for role in roles if not torch.equal(merged[role], roles[role])} == roles.keys() - {"o_bias"}


@pytest.mark.parametrize(("rope", "heads", "biased"), SHAPES)
def test_what_a_fit_loses_is_the_least_that_is_lost(rope: str, heads: tuple[int, int], biased: bool) -> None:
    """Over all pairs of a query and a key, plane by plane and group by group: against the samples themselves."""
    shape = attention(rope, heads, biased)
    roles, readers = site(shape), shape.num_attention_heads // 2
    x_ND, y_ND = samples(10), samples(15)  # those that the moments are of
    merged_shape, merged, lost = merge(shape, roles, 2)

    def pairs(shape: Attention, roles: Roles) -> tuple[Tensor, Tensor]:
        """Products of every query with every key: of planes (T, S, H, P), and of what is not rotated (T, S, H)."""
        q_NHP, free_q = planes_of(heads_of(x_ND, roles, "q"), shape.rope)
        k_NHP, free_k = planes_of(heads_of(x_ND, roles, "k"), shape.rope)
        k_NHP, free_k = (k.repeat_interleave(q_NHP.shape[1] // k.shape[1], 1) for k in (k_NHP, free_k))
        return torch.einsum("thp,shp->tshp", q_NHP, k_NHP.conj()), torch.einsum("thf,shf->tsh", free_q, free_k)

    def tail(data_SN: Tensor, rank: int) -> tuple[float, float]:
        values = torch.linalg.svdvals(data_SN) ** 2
        return float(values[rank:].sum()), float(values.sum())

    (planes, free), (new_planes, new_free) = pairs(shape, roles), pairs(merged_shape, merged)
    said, new_said = spoken(shape, roles, y_ND), spoken(merged_shape, merged, y_ND)
    for number in range(2):
        mine = slice(number * readers, (number + 1) * readers)
        shares = []
        if shape.rope:
            kept = [tail(planes[:, :, mine, plane].transpose(0, 1).flatten(1), 1) for plane in range(planes.shape[-1])]
            off = (planes - new_planes)[:, :, mine].abs().square().sum((0, 1, 2))
            np.testing.assert_allclose(off.numpy(), [least for least, _ in kept], rtol=1e-8, atol=1e-8)
            shares.append(sum(least for least, _ in kept) / sum(whole for _, whole in kept))
        if free.any():
            width = WIDTH - (shape.rope.dims if shape.rope else 0)
            least, whole = tail(free[:, :, mine].transpose(0, 1).flatten(1), width)
            assert float((free - new_free)[:, :, mine].square().sum()) == pytest.approx(least, rel=1e-8)
            shares.append(least / whole)
        least, whole = tail(said[:, mine].flatten(1), WIDTH)
        assert float((said - new_said)[:, mine].square().sum()) == pytest.approx(least, rel=1e-8)
        shares.append(least / whole)
        assert lost[number] == pytest.approx(max(shares), rel=1e-6)
        assert min(shares) > 1e-4


@pytest.mark.parametrize(("rope", "heads", "biased"), SHAPES)
def test_a_fit_is_of_the_function_and_not_of_its_gauge(rope: str, heads: tuple[int, int], biased: bool) -> None:
    shape = attention(rope, heads, biased)
    roles, x_ND = site(shape), samples(20)
    other = gauge(shape, roles)
    torch.testing.assert_close(logits(shape, other, x_ND), logits(shape, roles, x_ND), rtol=1e-8, atol=1e-8)
    (_, one, lost), (merged_shape, two, again) = merge(shape, roles, 1), merge(shape, other, 1)
    for measure in (logits, spoken):
        torch.testing.assert_close(
            measure(merged_shape, two, x_ND), measure(merged_shape, one, x_ND), rtol=0, atol=1e-6
        )
        assert float((measure(merged_shape, one, x_ND) - measure(shape, roles, x_ND)).abs().max()) > 0.1
    assert again == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("how", ["align", "align-norm"])
@pytest.mark.parametrize(("rope", "heads", "biased"), SHAPES)
def test_turned_copies_align_without_loss(how: Merge, rope: str, heads: tuple[int, int], biased: bool) -> None:
    """Of one norm, so that keeping it changes nothing."""
    shape = attention(rope, heads, biased)
    roles, x_ND = alike(shape, site(shape), 2, orthogonal=True), samples(20)
    merged_shape, merged, lost = merge(shape, roles, 2, how)
    torch.testing.assert_close(logits(merged_shape, merged, x_ND), logits(shape, roles, x_ND), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(spoken(merged_shape, merged, x_ND), spoken(shape, roles, x_ND), rtol=1e-6, atol=1e-6)
    assert max(map(abs, lost)) < 1e-9


@pytest.mark.parametrize("rope", ["half-split", "interleaved", "partial"])
def test_align_norm_keeps_the_norm_of_each_plane(rope: str) -> None:
    shape = attention(rope, biased=True)
    roles = site(shape)
    planes = {}
    for how in ("align", "align-norm"):
        _, merged, _ = merge(shape, roles, 2, how)
        for name, each in (("heads", roles), (how, merged)):
            rows_HED = torch.cat([each["k"], each["k_bias"][:, None]], dim=1).view(-1, WIDTH, HIDDEN + 1)
            planes[name] = planes_of(rows_HED.mT, shape.rope)[0].abs().square().sum(1).sqrt()  # (H, P)
    torch.testing.assert_close(planes["align-norm"], planes["heads"].view(2, 2, -1).mean(1))
    assert bool((planes["align"] < planes["align-norm"]).all())


@pytest.mark.parametrize("how", HOWS)
def test_nothing_else_moves(how: Merge) -> None:
    """Groups do not see one another, heads keep their order, and what was given is left as it was."""
    shape = attention("half-split", (8, 4), biased=True)
    roles = site(shape)
    before = {role: tensor.clone() for role, tensor in roles.items()}
    _, merged, _ = merge(shape, roles, 2, how)
    assert all(torch.equal(roles[role], before[role]) for role in before)
    assert all(tensor.dtype == torch.float64 for tensor in merged.values())
    assert torch.equal(merged["o_bias"], roles["o_bias"])
    other = {role: tensor.clone() for role, tensor in roles.items()}
    rows, columns = slice(2 * WIDTH, 4 * WIDTH), slice(4 * WIDTH, 8 * WIDTH)  # the second group and its readers
    for role in ("k", "v", "k_bias", "v_bias"):
        other[role][rows] = other[role][rows].flip(0)
    other["q"][columns] *= 2
    other["o"][:, columns] *= 3
    _, changed, _ = merge(shape, other, 2, how)
    half, first = WIDTH, slice(0, 4 * WIDTH)
    for role in ("k", "v", "k_bias", "v_bias"):
        assert torch.equal(changed[role][:half], merged[role][:half])
        assert not torch.allclose(changed[role][half:], merged[role][half:])
    assert torch.equal(changed["q"][first], merged["q"][first])
    assert torch.equal(changed["q_bias"][first], merged["q_bias"][first])
    assert torch.equal(changed["o"][:, first], merged["o"][:, first])


def test_the_moments_of_a_site_are_those_that_calibration_found() -> None:
    shape, x_ND = attention(), samples(1)
    wanted = moments(site(shape), x_ND, samples(2))
    here, elsewhere = Site(3), Site(2)
    answers: dict[Any, Mapping[str, Tensor]] = {}
    for place, scale in ((here, 1.0), (elsewhere, 7.0)):
        answers[InputGram(place)] = {"gram_DD": scale * wanted.gram_DD, "mean_D": scale * wanted.mean_D}
        answers[QueryGram(place)] = {"gram_HEE": scale * wanted.query_HEE}
        answers[AttentionGram(place)] = {
            "gram_DD": scale * wanted.attended_DD,
            "mean_D": scale * wanted.attended_mean_D,
        }
    found = moments_of(here, answers)
    assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in vars(wanted))


# --- where q and k are normed before they are rotated ---------------------------------------------------------------


def normed(weight_E: Tensor) -> tuple[Attention, Roles]:
    shape = replace(attention("half-split", (8, 4)), norms="pre_rope")
    return shape, {**site(shape), "q_norm": weight_E, "k_norm": weight_E.flip(0)}


@pytest.mark.parametrize("how", HOWS)
def test_normed_heads_of_any_length_that_are_turned_lose_nothing(how: Merge) -> None:
    """Where the norm weighs both coordinates of a plane alike, a phase passes through it; lengths never do."""
    weight_E = (1 + 0.3 * drawn(WIDTH // 2)).repeat(2)
    shape, roles = normed(weight_E)
    roles["k_norm"] = 1 + weight_E
    roles = alike(shape, roles, 2, orthogonal=True)
    roles["k"] *= torch.tensor([1.0, 7.0, 0.1, 3.0]).double().repeat_interleave(WIDTH)[:, None]
    x_ND = samples(20)
    merged_shape, merged, _ = merge(shape, roles, 2, how)
    torch.testing.assert_close(logits(merged_shape, merged, x_ND), logits(shape, roles, x_ND), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(spoken(merged_shape, merged, x_ND), spoken(shape, roles, x_ND), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_normed_queries_are_turned_and_not_stretched(how: Merge) -> None:
    shape, roles = normed(1 + 0.3 * drawn(WIDTH))
    _, merged, _ = merge(shape, roles, 2, how)
    before, after = (planes_of(each["q"].view(-1, WIDTH, HIDDEN).mT, shape.rope)[0] for each in (roles, merged))
    torch.testing.assert_close(after.abs(), before.abs())
    turned_HP = (after / before).mean(1)
    torch.testing.assert_close((after / before).std(1).abs(), torch.zeros(8, 4).double(), rtol=0, atol=1e-9)
    assert torch.equal(turned_HP[::2], turned_HP[1::2]) or torch.allclose(turned_HP[::2], turned_HP[1::2])
    for role in ("q_norm", "k_norm"):
        assert torch.equal(merged[role], roles[role])


# --- heads that say nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("norms", ["none", "pre_rope"])
@pytest.mark.parametrize("dead", ["key", "keys", "plane", "values", "query", "output"])
def test_heads_that_were_pruned_stay_numbers(how: Merge, norms: Any, dead: str) -> None:
    """Pruned and padded models hold rows of zeros."""
    shape = replace(attention("half-split", (4, 4)), norms=norms)
    roles = site(shape)
    pair = slice(0, 2 * WIDTH)  # the first group
    if dead == "plane":
        roles["k"].view(4, WIDTH, -1)[:, [1, 1 + WIDTH // 2]] = 0
    elif dead == "output":
        roles["o"][:, pair] = 0
    else:
        role, rows = {"key": ("k", slice(0, WIDTH)), "keys": ("k", pair), "values": ("v", pair), "query": ("q", pair)}[
            dead
        ]
        roles[role][rows] = 0
    _, merged, lost = merge(shape, roles, 2, how)
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    assert all(0 <= each <= 1 for each in lost)


# --- heads that count more -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fit", "align"])
def test_equal_weights_change_no_bit(how: Merge) -> None:
    shape = attention(heads=(8, 4))
    roles = site(shape)
    seen = moments(roles, samples(10), samples(15))
    plain, lost = merge_site(shape, roles, 2, seen, how)
    found, same = merge_site(shape, roles, 2, seen, how, torch.ones(4).double())
    assert lost == same
    assert all(torch.equal(found[role], plain[role]) for role in plain)


@pytest.mark.parametrize("plain", [False, True])
def test_weights_are_those_of_least_squares_on_materialised_rows(plain: bool) -> None:
    """The best approximation of a matrix of rows by `WIDTH` columns (or of a plane by one) is its largest part."""
    shape = attention(heads=(8, 4))
    roles = site(shape)
    x_ND, y_ND = samples(10), samples(15)
    weight_G = torch.tensor([0.02, 5.0, 1.0, 0.3]).double()
    found, _ = merge_site(shape, roles, 1, moments(roles, x_ND, y_ND), "fit", None if plain else weight_G)
    student, readers_H = replace(shape, num_key_value_heads=1), weight_G.repeat_interleave(shape.query_group)
    before_NHD, after_NHD = spoken(shape, roles, y_ND), spoken(student, found, y_ND)
    roots_H1 = readers_H.sqrt()[:, None]
    rows = (before_NHD * roots_H1).flatten(1)
    best = torch.linalg.svdvals(rows)[WIDTH:].square().sum()
    values = ((before_NHD - after_NHD) * roots_H1).square().sum()

    assert shape.rope
    k_NGP, q_NHP = (planes_of(heads_of(x_ND, roles, role), shape.rope)[0] for role in "kq")
    shared_NP = planes_of(heads_of(x_ND, found, "k"), shape.rope)[0][:, 0]
    power_GP = q_NHP.abs().square().mean(0).view(4, shape.query_group, -1).sum(1)
    weighted_PNG = (k_NGP * (weight_G[:, None] * power_GP).sqrt()).permute(2, 0, 1)
    best_key = torch.linalg.svdvals(weighted_PNG)[:, 1:].square().sum()
    unit_PN1 = (shared_NP / shared_NP.norm(dim=0)).T[..., None]
    keys = (weighted_PNG - unit_PN1 @ (unit_PN1.mH @ weighted_PNG)).abs().square().sum()

    if plain:  # the unweighted optimum is another one
        assert values > 1.05 * best
        assert keys > 1.05 * best_key
    else:
        torch.testing.assert_close(values, best, rtol=1e-6, atol=0)
        torch.testing.assert_close(keys, best_key, rtol=1e-6, atol=0)


def test_weights_by_ablation_are_squares_of_the_kl_and_never_nothing() -> None:
    shape, here = attention(heads=(8, 4)), Site(3)

    def weights(*kls: float) -> list[float]:
        answers = {HeadKL(here, head): {"kl": torch.tensor(kl).double()} for head, kl in enumerate(kls)}
        return ablation_weights(here, shape, answers).tolist()

    assert weights(0.1, 0.1, 0.3, 0.1) == pytest.approx([1 / 3, 1 / 3, 3, 1 / 3])
    assert weights(0, 0, 0, 0) == [1, 1, 1, 1]
    assert weights(0, 0, 0.5, 0) == pytest.approx([1e-3, 1e-3, 4, 1e-3])
