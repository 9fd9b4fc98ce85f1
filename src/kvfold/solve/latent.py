"""A site's tensors cut in two: rotated planes of each key head, and a latent for other keys and all values.

Coordinates of each head are put in the order [planes that stay rotated | the rest], those of its query heads alike, so
that logits are what they were. What the rest of the keys and the values lose in a latent of few numbers is weighed by
what it does: an error of a key by what the queries make of it in a logit, and that by how far the values behind it lie
apart, as `o` sees them; an error of a value by `o`. Both are then changes of what the attention writes, in one unit.

Only differences of logits count, so unrotated keys lose their mean and their bias for nothing; values keep theirs as a
bias behind the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve import rope_planes as planes
from kvfold.solve.linalg import floored, psd_roots
from kvfold.solve.low_rank import Block, joint, separate, spectrum
from kvfold.solve.rope import frequencies, pairs
from kvfold.solve.shared_heads import Moments

Search = Literal["elite", "contribution", "uniform"]
Metric = Literal["outputs", "inputs", "weights"]
Factor = Literal["joint", "separate"]

AVERAGED = 0.1  # errors of logits, of many keys, partly cancel in what a query attends to: measured (docs/log.md)
TURNED = 0.1  # the same, of planes that are not turned
ALIKE = 1.02  # times the least error: what makes no difference, and may be chosen by speed
LEAST = 1e-3  # of the mean over heads: how little the values of a head can count


# --- which planes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What pairs of queries and keys say of each number of rotated planes.

    `planes` (G, K) are those that each key head would keep, ascending. What is lost of logits without the others is
    `left`, the mean error by key head, and `variance_H`; neither is known without a sample.
    """

    planes: Mapping[int, Tensor]
    left: Mapping[int, Sequence[float]]
    variance_H: Mapping[int, Tensor]


def survey(attention: Attention, search: Search, numbers: Sequence[int], sample: Mapping[str, Tensor] | None) -> Survey:
    """Choose planes for each of these numbers; `sample` answers SampledPairs, and `uniform` needs none."""
    rope, query_group = _rope(attention), attention.query_group
    even = {kept: planes.uniform(rope.dims // 2, kept) for kept in numbers}
    if sample is None:
        assert search == "uniform"
        return Survey({kept: each.repeat(attention.num_key_value_heads, 1) for kept, each in even.items()}, {}, {})
    chosen: dict[int, list[Tensor]] = {kept: [] for kept in numbers}
    left: dict[int, list[float]] = {kept: [] for kept in numbers}
    variances: dict[int, list[Tensor]] = {kept: [] for kept in numbers}
    for seen in planes.pairs_of(attention, rope, sample):
        order = {"elite": lambda seen: planes.elite(seen)[0], "contribution": planes.contribution}.get(search)
        order_C = order(seen) if order else None
        for kept in numbers:
            mine_K = even[kept] if order_C is None else order_C[:kept].sort().values
            error_X = planes.left(seen, mine_K)
            chosen[kept].append(mine_K)
            left[kept].append(float(error_X.abs().mean()))
            variances[kept].append(error_X.view(query_group, -1).var(1, correction=0))
    return Survey(
        {kept: torch.stack(each) for kept, each in chosen.items()},
        left,
        {kept: torch.cat(each) for kept, each in variances.items()},
    )


def coordinates(attention: Attention, planes_GK: Tensor) -> Tensor:
    """The coordinates of each key head, those of kept planes in front, `order_GE`: real, imaginary, the rest."""
    real, imaginary = (torch.arange(attention.head_dim)[part] for part in pairs(_rope(attention)))
    rows = []
    for planes_K in planes_GK:
        front = torch.cat([real[planes_K], imaginary[planes_K]])
        behind = torch.ones(attention.head_dim, dtype=torch.bool).index_fill(0, front, False).nonzero()[:, 0]
        rows.append(torch.cat([front, behind]))
    return torch.stack(rows)


def _rope(attention: Attention) -> Rope:
    assert attention.rope is not None
    return attention.rope


# --- a latent for the rest --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A site in its new coordinates, float64: heads of q, rotated and free rows of k, v, and their biases."""

    attention: Attention
    q_HEX: Tensor  # X: the input, and the bias behind it where there is one
    rotated_GPX: Tensor
    free_GND: Tensor
    v_GED: Tensor
    v_bias_GE: Tensor
    order_GE: Tensor

    @classmethod
    def of(cls, attention: Attention, roles: Roles, planes_GK: Tensor) -> Cut:
        """Put coordinates in order; the scale of a stretched RoPE stays with the keys that are not rotated."""
        order_GE = coordinates(attention, planes_GK)
        order_HE = order_GE.repeat_interleave(attention.query_group, 0)
        q_HEX, k_GEX = (
            _ordered(_with_bias(roles, role, attention.head_dim), order)
            for role, order in (("q", order_HE), ("k", order_GE))
        )
        rotated, (_, factor) = 2 * planes_GK.shape[1], frequencies(_rope(attention))
        free_GND = k_GEX[:, rotated:, : attention.hidden_size] * factor**2
        v_GEX = _with_bias(roles, "v", attention.head_dim)
        bias_GE = v_GEX[..., attention.hidden_size] if "v_bias" in roles else v_GEX.new_zeros(v_GEX.shape[:2])
        return cls(
            attention, q_HEX, k_GEX[:, :rotated], free_GND, v_GEX[..., : attention.hidden_size], bias_GE, order_GE
        )


def _with_bias(roles: Roles, role: str, width: int) -> Tensor:
    rows_HED = roles[role].double().view(-1, width, roles[role].shape[1])
    bias = roles.get(f"{role}_bias")
    return rows_HED if bias is None else torch.cat([rows_HED, bias.double().view(-1, width, 1)], dim=-1)


def _ordered(rows_HEX: Tensor, order_HE: Tensor) -> Tensor:
    return rows_HEX.take_along_dim(order_HE[..., None], dim=1)


def blocks(cut: Cut, roles: Roles, metric: Metric, moments: Moments | None, gram_DD: Tensor | None) -> list[Block]:
    """Keys and values as blocks to be factorised, in the metric that is asked for.

    `inputs` needs `gram_DD`, the second moments of the input; `outputs` needs all moments.
    """
    free_ND, v_MD = cut.free_GND.flatten(0, 1), cut.v_GED.flatten(0, 1)
    one_N, one_M = (torch.eye(len(rows), dtype=torch.float64) for rows in (free_ND, v_MD))
    if metric == "weights":
        plain_DD = torch.eye(free_ND.shape[1], dtype=torch.float64)
        return [Block(free_ND, one_N, plain_DD), Block(v_MD, one_M, plain_DD)]
    if metric == "inputs":
        assert gram_DD is not None
        gram_DD = floored(gram_DD)
        keys, values = Block(free_ND, one_N, gram_DD), Block(v_MD, one_M, gram_DD)
        power = keys.power() / max(1, len(free_ND))
        balance = (values.power() / len(v_MD) / power) ** 0.5 if power > 0 else 1.0
        return [Block(free_ND, balance * one_N, gram_DD), values]
    assert moments is not None
    seen_DD, attended_DD = map(floored, moments.covariances())
    keys_GNN, values_GEE = _key_metric(cut, roles, moments), _value_metric(cut, roles)
    return [
        Block(free_ND, _by_heads(psd_roots(keys_GNN)[0]), seen_DD),
        Block(v_MD, _by_heads(psd_roots(values_GEE)[0]), attended_DD),
    ]


def _by_heads(metric_GNN: Tensor) -> Tensor:
    """Heads side by side: a block for each on the diagonal."""
    groups, width = metric_GNN.shape[:2]
    whole_GNGN = metric_GNN.new_zeros(groups, width, groups, width)
    whole_GNGN.diagonal(dim1=0, dim2=2).copy_(metric_GNN.permute(1, 2, 0))
    return whole_GNGN.view(groups * width, groups * width)


def outputs(attention: Attention, roles: Roles) -> Tensor:
    """The columns of `o` by head in float64, `o_HDE`."""
    return roles["o"].double().view(attention.hidden_size, -1, attention.head_dim).transpose(0, 1)


def _value_metric(cut: Cut, roles: Roles) -> Tensor:
    """What an error of a value costs behind `o`, summed over the heads that read it, `(G, E, E)`."""
    o_HDE = outputs(cut.attention, roles)
    return _over_groups(o_HDE.mT @ o_HDE, cut.attention)


def _over_groups(heads_HEE: Tensor, attention: Attention) -> Tensor:
    """The sum over the query heads of each key head."""
    groups = attention.num_key_value_heads
    return heads_HEE.view(groups, attention.query_group, *heads_HEE.shape[1:]).sum(1)


def spreads(cut: Cut, roles: Roles, moments: Moments) -> Tensor:
    """How far the values of a query lie apart behind `o`, by head: what an error of one logit does, `spread_H`.

    Inputs that one query attends to have the covariance of all, less that of their averages.
    """
    seen_DD, attended_DD = moments.covariances()
    v_HED = cut.v_GED.repeat_interleave(cut.attention.query_group, 0)
    return apart(outputs(cut.attention, roles), v_HED, seen_DD - attended_DD)


def apart(o_HDE: Tensor, v_HED: Tensor, within_DD: Tensor) -> Tensor:
    """The spread behind `o` of values made of inputs with this covariance, by head, `spread_H`."""
    within_HEE = v_HED @ within_DD @ v_HED.mT
    apart_H = ((o_HDE @ within_HEE) * o_HDE).sum((1, 2))
    return apart_H.clamp_min(LEAST * apart_H.mean().clamp_min(torch.finfo(torch.float64).tiny))


def _key_metric(cut: Cut, roles: Roles, moments: Moments) -> Tensor:
    """What an error of an unrotated key costs: its square in a logit, by how far values lie apart, `(G, N, N)`."""
    attention, rotated = cut.attention, cut.rotated_GPX.shape[1]
    order_HE = cut.order_GE.repeat_interleave(attention.query_group, 0)[:, rotated:]
    gram_HNN = moments.query_HEE.take_along_dim(order_HE[:, :, None], 1).take_along_dim(order_HE[:, None], 2)
    scale = attention.logit_scale
    return _over_groups(AVERAGED * scale**2 * spreads(cut, roles, moments)[:, None, None] * gram_HNN, attention)


def cut_site(
    attention: Attention,
    roles: Roles,
    planes_GK: Tensor,
    width: int,
    *,
    metric: Metric,
    factor: Factor,
    moments: Moments | None = None,
    gram_DD: Tensor | None = None,
) -> tuple[Roles, float]:
    """A site's roles with latent attention, float64, and the part of its metric that the latent does not keep."""
    cut = Cut.of(attention, roles, planes_GK)
    weighed = blocks(cut, roles, metric, moments, gram_DD)
    down_RD, (k_up_NR, v_up_MR) = (joint if factor == "joint" else separate)(weighed, width)
    whole = sum(block.power() for block in weighed)
    lost = sum(block.loss(down_RD, up) for block, up in zip(weighed, (k_up_NR, v_up_MR), strict=True))
    v_bias_M = cut.v_bias_GE.flatten()
    if moments is not None:
        v_bias_M = v_bias_M + (weighed[1].rows_ND - v_up_MR @ down_RD) @ moments.attended_mean_D
    q_NX, rotated_MX = cut.q_HEX.flatten(0, 1), cut.rotated_GPX.flatten(0, 1)
    hidden = attention.hidden_size
    new: Roles = {"q": q_NX[:, :hidden], "o": roles["o"], "k_rope": rotated_MX[:, :hidden], "kv_down": down_RD}
    new |= {role: tensor for role, tensor in roles.items() if role == "o_bias"}
    new |= {
        role: rows[:, hidden]
        for role, rows in (("q_bias", q_NX), ("k_rope_bias", rotated_MX))
        if rows.shape[1] > hidden
    }
    if len(k_up_NR):
        new["k_up"] = k_up_NR
    return {**new, "v_up": v_up_MR, "v_up_bias": v_bias_M, "planes": planes_GK}, lost / whole if whole > 0 else 0.0


# --- how much of each
# ---------------------------------------------------------------------------------------------------


def reckoned(
    attention: Attention,
    roles: Roles,
    search: Search,
    numbers: Sequence[int],
    sample: Mapping[str, Tensor],
    moments: Moments,
) -> Tensor:
    """What every split of a site is reckoned to lose behind `o`, as a part of the power of all its values, `error_CR`.

    C runs over these numbers of rotated planes, R over latents of 0 to D numbers. It is what logits lose by planes that
    are not turned, as far as values lie apart, and what the latent loses, under the mean of the moments of both blocks.
    """
    found, width = survey(attention, search, numbers, sample), attention.hidden_size
    rows = []
    for kept in numbers:
        cut = Cut.of(attention, roles, found.planes[kept])
        weighed = blocks(cut, roles, "outputs", moments, None)
        lost_R = torch.zeros(width + 1, dtype=torch.float64)
        lost_R[:width] = spectrum(weighed).flip(0).cumsum(0).flip(0)
        turned = TURNED * float((spreads(cut, roles, moments) * found.variance_H[kept]).sum())
        whole = weighed[1].power()
        rows.append((lost_R + turned) / whole if whole > 0 else lost_R + turned)  # no values: nothing can be lost
    return torch.stack(rows)


def best_split(error_CR: Tensor, elements_CR: Tensor, room: int) -> tuple[int, int]:
    """The split of a site, as an index into its errors, that loses least within `room` elements.

    Splits that cannot be are infinite. Of those that lose at most `ALIKE` times as much the one with the narrowest
    latent is taken: it decodes fastest.
    """
    error_CR = error_CR.masked_fill(elements_CR > room, torch.inf)
    alike_CR = error_CR <= ALIKE * error_CR.min()
    width = int(alike_CR.any(0).nonzero()[0])
    return int(error_CR[:, width].argmin()), width
