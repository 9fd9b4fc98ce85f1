"""The closed form for layers that share: exact where it must be, and as good as anything where it cannot be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve.shared_layers import Reader, share

D, E, H, N = 24, 6, 8, 4000
KINDS: dict[str, dict[str, Any]] = {
    "rotated": {"rope": Rope(E, 10000.0)},
    "interleaved": {"rope": Rope(E, 10000.0, half_split=False)},
    "partly rotated": {"rope": Rope(4, 10000.0)},
    "not rotated": {},
    "biased": {"rope": Rope(E, 10000.0), "biases": frozenset("qkv")},
    "normed": {"rope": Rope(E, 10000.0), "norms": "pre_rope"},
}


def attention_of(kind: str, heads: int) -> Attention:
    return Attention(D, H, heads, E, **KINDS[kind])


def drawn(attention: Attention, generator: torch.Generator) -> Roles:
    """Random roles; norms are alike within a plane, as the gauge of a normed key asks."""
    roles = {}
    for role, form in attention.roles().items():
        roles[role] = torch.randn(form, generator=generator, dtype=torch.float64) / math.sqrt(form[-1])
        if "norm" in role:
            roles[role] = 1 + torch.cat([roles[role][: E // 2]] * 2)
    return roles


def planes(rows: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """Rotated coordinates `(..., E)` as complex planes, and the rest."""
    rope = attention.rope
    dims = rope.dims if rope else 0
    if rope and not rope.half_split:
        return torch.complex(rows[..., 0:dims:2], rows[..., 1:dims:2]), rows[..., dims:]
    return torch.complex(rows[..., : dims // 2], rows[..., dims // 2 : dims]), rows[..., dims:]


def joined(turned: Tensor, rest: Tensor, attention: Attention) -> Tensor:
    if attention.rope and not attention.rope.half_split:
        return torch.cat([torch.view_as_real(turned).flatten(-2), rest], -1)
    return torch.cat([turned.real, turned.imag, rest], -1)


def attended(attention: Attention, roles: Roles, x_TD: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
    """A textbook attention over one row: `made` is what `keys_and_values` gave."""
    q_THE = heads_of(roles, "q", x_TD)
    if "q_norm" in roles:
        q_THE = normed(q_THE, roles["q_norm"])
    turned, rest = planes(q_THE, attention)
    angle = torch.arange(len(x_TD), dtype=torch.float64)[:, None] / 10.0 ** torch.arange(turned.shape[-1])
    q_THE = joined(turned * torch.polar(torch.ones_like(angle), angle)[:, None], rest, attention)
    key_SGE, value_SGE = made
    found = []
    for head in range(H):
        mine = head // (H // key_SGE.shape[1])
        logits_TS = q_THE[:, head] @ key_SGE[:, mine].T / math.sqrt(E)
        logits_TS = logits_TS.masked_fill(torch.ones_like(logits_TS).triu(1).bool(), -torch.inf)
        found.append(logits_TS.softmax(-1) @ value_SGE[:, mine])
    return torch.cat(found, -1) @ roles["o"].T


def keys_and_values(attention: Attention, roles: Roles, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    k_SGE = heads_of(roles, "k", x_TD)
    if "k_norm" in roles:
        k_SGE = normed(k_SGE, roles["k_norm"])
    turned, rest = planes(k_SGE, attention)
    angle = torch.arange(len(x_TD), dtype=torch.float64)[:, None] / 10.0 ** torch.arange(turned.shape[-1])
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None]
    return joined(turned, rest, attention), heads_of(roles, "v", x_TD)


def heads_of(roles: Roles, role: str, x_TD: Tensor) -> Tensor:
    return (x_TD @ roles[role].T + roles.get(f"{role}_bias", torch.zeros(1))).view(len(x_TD), -1, E)


def normed(heads: Tensor, weight: Tensor) -> Tensor:
    return weight * heads / heads.square().mean(-1, keepdim=True).sqrt()


def reader_of(attention: Attention, roles: Roles, x_ND: Tensor, owner_ND: Tensor) -> Reader:
    """A layer with the moments of these inputs."""
    q_NHE = heads_of(roles, "q", x_ND)
    return Reader(
        attention,
        roles,
        x_ND.T @ x_ND / len(x_ND),
        x_ND.mean(0),
        owner_ND.T @ x_ND / len(x_ND),
        torch.einsum("nhe,nhf->hef", q_NHE, q_NHE) / len(x_ND),
    )


def image(
    attention: Attention, roles: Roles, own: Attention, turn_DD: Tensor, shift_D: Tensor, seed: int
) -> tuple[Attention, Roles]:
    """A layer of `own` heads whose keys and values are images of the owner's, heads in another order.

    It reads `x' = T x + c`; where it has more heads than the owner, several are images of one.
    """
    generator = torch.Generator().manual_seed(seed)
    new = drawn(own, generator)
    theirs, mine = attention.num_key_value_heads, own.num_key_value_heads
    order = torch.randperm(mine, generator=generator) * theirs // mine
    back_DD = torch.linalg.inv(turn_DD)
    keys, values = (roles[role].view(theirs, E, D)[order] for role in "kv")
    biases = {role: roles[f"{role}_bias"].view(theirs, E)[order] for role in "kv" if f"{role}_bias" in roles}
    scale = torch.rand(mine, E, generator=generator, dtype=torch.float64) + 0.5
    if "k_norm" in new:
        wide = torch.rand(E // 2, generator=generator, dtype=torch.float64) + 0.5
        new["k_norm"] = roles["k_norm"] * torch.cat([wide, wide])
        scale = torch.ones_like(scale)
    phase = torch.rand(mine, E, generator=generator, dtype=torch.float64) * 6
    free = torch.linalg.qr(torch.randn(mine, E, E, generator=generator, dtype=torch.float64)).Q
    for role, rows in (("k", keys), ("v", values)):
        columns = torch.cat([rows, biases[role][..., None]], -1) if biases else rows
        if role == "v":
            turned = free @ columns
        else:
            one, rest = planes(columns.mT, attention)
            count, left = one.shape[-1], rest.shape[-1]
            factor = torch.polar(scale[:, None, :count], phase[:, None, :count])
            turned = joined(one * factor, rest @ free[:, :left, :left], attention).mT
        linear = turned[..., :D] @ back_DD
        new[role] = linear.flatten(0, 1)
        if biases:
            new[f"{role}_bias"] = (turned[..., D] - linear @ shift_D).flatten()
    return own, new


@pytest.mark.parametrize(("owners", "consumers"), [(4, 4), (2, 4), (8, 2), (4, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_the_owner_are_shared_without_loss(kind: str, owners: int, consumers: int) -> None:
    generator = torch.Generator().manual_seed(1)
    own, other = attention_of(kind, owners), attention_of(kind, consumers)
    roles = drawn(own, generator)
    if owners > consumers:  # every head of the owner is read: those that one of the consumer's reads are alike
        for role in {"k", "v", "k_bias", "v_bias"} & set(roles):
            blocks = roles[role].view(consumers, owners // consumers, E, -1)
            roles[role] = blocks[:, :1].expand_as(blocks).reshape_as(roles[role])
    x_ND = torch.randn(N, D, generator=generator, dtype=torch.float64) + 0.3
    layers, inputs = [(own, roles)], [x_ND]
    for seed in (2, 3):
        turn_DD = torch.eye(D) + 0.3 * torch.randn(D, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
        shift_D = torch.zeros(D, dtype=torch.float64)
        if "biases" in KINDS[kind]:  # or nothing could take it up
            shift_D = torch.randn(D, generator=generator, dtype=torch.float64)
        layers.append(image(own, roles, other, turn_DD, shift_D, seed))
        inputs.append(x_ND @ turn_DD.T + shift_D)
    made = share([reader_of(*layer, each, x_ND) for layer, each in zip(layers, inputs, strict=True)], 1e-12)
    assert made.lost < 1e-8
    assert max(made.heads) < 1e-8
    shared = keys_and_values(own, made.roles[0], inputs[0][:20])
    for (attention, before), after, x in zip(layers, made.roles, inputs, strict=True):
        expected = attended(attention, before, x[:20], keys_and_values(attention, before, x[:20]))
        found = attended(attention, after, x[:20], shared)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        consumer = after is not made.roles[0]
        student = replace(attention, source=0 if consumer else None, num_key_value_heads=owners)
        assert {role: tuple(each.shape) for role, each in after.items()} == student.roles()
    copied = attended(other, layers[1][1], inputs[1][:20], keys_and_values(own, roles, x_ND[:20]))
    assert (copied - expected).abs().max() > 0.1  # which the gauge and the order were made to spoil


def unrelated(kind: str, owners: int, consumers: int) -> tuple[list[Reader], list[Tensor]]:
    """An owner and a consumer that have little in common but correlated inputs."""
    generator = torch.Generator().manual_seed(7)
    x_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y_ND = 0.6 * x_ND @ torch.randn(D, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    y_ND += 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    readers = []
    for heads, each in ((owners, x_ND), (consumers, y_ND)):
        attention = attention_of(kind, heads)
        readers.append(reader_of(attention, drawn(attention, generator), each, x_ND))
    return readers, [x_ND, y_ND]


@pytest.mark.parametrize(("owners", "consumers"), [(4, 4), (2, 4), (4, 2)])
def test_what_is_said_to_be_lost_is_what_is_lost(owners: int, consumers: int) -> None:
    """From the folded tensors alone, over the very inputs of the moments: query by query and reader by reader."""
    readers, inputs = unrelated("rotated", owners, consumers)
    made = share(readers, 1e-12)
    whole, lost = np.zeros(2), np.zeros(2)
    keys, values = (heads_of(made.roles[0], role, inputs[0]) for role in "kv")
    for reader, after, x_ND, order in zip(readers, made.roles, inputs, orders(readers, made.roles), strict=True):
        own_k, own_v = (heads_of(reader.roles, role, x_ND) for role in "kv")
        for new, old in enumerate(order):
            read, had = new // (H // owners), old // reader.attention.query_group
            q_PD, folded_PD = (
                planes(each["q"].view(H, E, D)[head].T, reader.attention)[0].T
                for each, head in ((reader.roles, old), (after, new))
            )
            factor_P = (folded_PD / q_PD).mean(-1).conj()
            k_NP, u_NP = planes(own_k[:, had], reader.attention)[0], planes(keys[:, read], reader.attention)[0]
            look_E = reader.query_HEE[old].diagonal()
            look_P = planes(look_E, reader.attention)[0]
            weight_P = look_P.real + look_P.imag
            error = (k_NP - factor_P * u_NP).abs().square().mean(0)
            o_DE, new_o_DE = (each["o"].view(D, H, E)[:, head] for each, head in ((reader.roles, old), (after, new)))
            missing = own_v[:, had] @ o_DE.T - values[:, read] @ new_o_DE.T
            whole += [
                float((weight_P * k_NP.abs().square().mean(0)).sum()),
                float((own_v[:, had] @ o_DE.T).square().sum() / N),
            ]
            lost += [float((weight_P * error).sum()), float(missing.square().sum() / N)]
    assert made.lost == pytest.approx(float((lost / whole).sum()), rel=1e-6)
    assert 0.2 < made.lost < 2


def orders(readers: list[Reader], made: list[Roles]) -> list[list[int]]:
    """The source's query head behind each query head of a student: rows of q differ by a factor for each plane."""
    found = []
    for reader, after in zip(readers, made, strict=True):
        old, new = (planes(roles["q"].view(H, E, D).mT, reader.attention)[0].mT for roles in (reader.roles, after))
        spread = (new[:, None] / old[None]).std(-1).sum(-1)  # one complex number for a whole row, or not
        found.append([int(head) for head in spread.abs().argmin(1)])
        assert sorted(found[-1]) == list(range(H))
    return found


def test_alternating_least_squares_finds_nothing_better() -> None:
    """The keys of one head over two layers, plane by plane, from several starts and over many rounds."""
    attention = Attention(D, 1, 1, E, rope=Rope(E, 10000.0))
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    inputs = [x_ND, x_ND.roll(1, 1) + torch.randn(N, D, generator=generator, dtype=torch.float64)]
    readers = []
    for each in inputs:
        roles = drawn(attention, generator)
        readers.append(reader_of(attention, {**roles, "v": torch.zeros_like(roles["v"])}, each, x_ND))
    basis_ND = torch.linalg.qr(x_ND).Q.to(torch.complex128)
    whole = lost = 0.0
    for plane in range(E // 2):
        keys = [
            planes(heads_of(r.roles, "k", x)[:, 0], attention)[0][:, plane]
            for r, x in zip(readers, inputs, strict=True)
        ]
        looks = [float(r.query_HEE[0].diagonal()[[plane, plane + E // 2]].sum()) for r in readers]
        whole += sum(w * float(k.abs().square().mean()) for w, k in zip(looks, keys, strict=True))
        tried = []
        for seed in range(3):
            start = torch.Generator().manual_seed(seed)
            factors = [torch.randn((), dtype=torch.complex128, generator=start) for _ in keys]
            for _ in range(60):
                wanted = sum(w * f.conj() * k for w, f, k in zip(looks, factors, keys, strict=True))
                u_N = basis_ND @ (basis_ND.mH @ wanted)
                factors = [(u_N.conj() * k).sum() / u_N.abs().square().sum() for k in keys]
            tried.append(
                sum(
                    w * float((k - f * u_N).abs().square().mean()) for w, f, k in zip(looks, factors, keys, strict=True)
                )
            )
        lost += min(tried)
    assert share(readers, 1e-12).lost == pytest.approx(lost / whole, rel=1e-6)


def test_it_is_pure_and_deterministic() -> None:
    readers, _ = unrelated("biased", 4, 4)
    before = [{role: each.clone() for role, each in reader.roles.items()} for reader in readers]
    once, twice = share(readers), share(readers)
    for reader, roles, one, other in zip(readers, before, once.roles, twice.roles, strict=True):
        assert all(torch.equal(reader.roles[role], roles[role]) for role in roles)
        assert all(torch.equal(one[role], other[role]) and one[role].dtype == torch.float64 for role in one)


@pytest.mark.parametrize("dead", ["q", "k", "v", "o"])
def test_heads_of_zeros_stay_finite(dead: str) -> None:
    readers, _ = unrelated("rotated", 4, 4)
    for reader in readers:
        reader.roles[dead][:E] = 0
        if dead == "o":
            reader.roles[dead][:, : 2 * E] = 0
    made = share(readers)
    assert all(bool(each.isfinite().all()) for roles in made.roles for each in roles.values())
    assert 0 <= made.lost <= 2
