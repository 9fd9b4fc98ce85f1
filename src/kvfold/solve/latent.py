"""A site's tensors in two parts: rotated planes of each key head, and a latent for all other keys and all values.

Coordinates of each head are reordered to [planes that stay rotated | the rest], those of its query heads alike, so that
no logit changes. Errors of the latent are weighed by their effect on what the attention writes: an error of a key by
the change of a logit, times the spread of the values behind `o` that the logit chooses among; an error of a value by
its size behind `o`. Both have the same unit.

Only differences of logits count, so unrotated keys drop their mean and their bias without loss. Values keep theirs as a
bias behind the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve import Factor, Metric, Search, rope_planes
from kvfold.solve.linalg import floored, psd_roots
from kvfold.solve.low_rank import Block, joint, separate, spectrum
from kvfold.solve.rope import frequencies, pairs
from kvfold.solve.shared_heads import Maps, Moments

AVERAGED = 0.1  # errors of the logits of many keys partly cancel in their average: measured (docs/log.md)
TURNED = 0.1  # the same for planes that are not rotated
ALIKE = 1.02  # times the least error: splits below it count as equal, and speed decides
LEAST = 1e-3  # of the mean over heads: the lowest weight of a head's values


# --- which planes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """The planes that each key head keeps, by the number of kept planes, and the errors of sampled logits.

    `planes` (G, K) are ascending. `left` has the mean error by key head, and `variance_H` the variance of the error by
    query head; both are empty without a sample.
    """

    planes: Mapping[int, Tensor]
    left: Mapping[int, Sequence[float]]
    variance_H: Mapping[int, Tensor]


def survey(attention: Attention, search: Search, numbers: Sequence[int], sample: Mapping[str, Tensor] | None) -> Survey:
    """Choose planes for each of these numbers of planes. `sample` answers SampledPairs; `uniform` needs none."""
    rope = _rope(attention)
    even = {kept: rope_planes.uniform(rope.dims // 2, kept) for kept in numbers}
    if sample is None:
        assert search == "uniform"
        return Survey({kept: each.repeat(attention.num_key_value_heads, 1) for kept, each in even.items()}, {}, {})
    chosen: dict[int, list[Tensor]] = {kept: [] for kept in numbers}
    left: dict[int, list[float]] = {kept: [] for kept in numbers}
    variances: dict[int, list[Tensor]] = {kept: [] for kept in numbers}
    for seen in rope_planes.pairs_of(attention, rope, sample):
        order = {"elite": rope_planes.elite, "contribution": rope_planes.contribution}.get(search)
        order_C = order(seen) if order else None
        for kept in numbers:
            mine_K = even[kept] if order_C is None else order_C[:kept].sort().values
            error_X = rope_planes.left(seen, mine_K)
            chosen[kept].append(mine_K)
            left[kept].append(float(error_X.abs().mean()))
            variances[kept].append(error_X.view(attention.query_group, -1).var(1, correction=0))
    return Survey(
        {kept: torch.stack(each) for kept, each in chosen.items()},
        left,
        {kept: torch.cat(each) for kept, each in variances.items()},
    )


def coordinates(attention: Attention, planes_GK: Tensor) -> Tensor:
    """The coordinates of each key head, `order_GE`: real and imaginary parts of kept planes, then the rest."""
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
    """A site in its new coordinates, float64: heads of q, rotated and free rows of k, v, and the bias of v."""

    attention: Attention
    q_HEX: Tensor  # X: the input, then the bias if there is one
    rotated_GPX: Tensor
    free_GND: Tensor
    v_GED: Tensor
    v_bias_GE: Tensor
    order_GE: Tensor

    @classmethod
    def of(cls, attention: Attention, roles: Roles, planes_GK: Tensor) -> Cut:
        """Reorder coordinates. The factor of a scaled RoPE moves into the keys that are not rotated."""
        order_GE, hidden = coordinates(attention, planes_GK), attention.hidden_size
        order_HE = order_GE.repeat_interleave(attention.query_group, 0)
        q, k, v = (Maps.of(roles, role, attention) for role in "qkv")
        q_HEX, k_GEX = (
            each.rows_HED.take_along_dim(order[..., None], dim=1) for each, order in ((q, order_HE), (k, order_GE))
        )
        rotated, (_, factor) = 2 * planes_GK.shape[1], frequencies(_rope(attention))
        free_GND = k_GEX[:, rotated:, :hidden] * factor**2
        bias_GE = v.rows_HED[..., hidden] if v.biased else v.rows_HED.new_zeros(v.rows_HED.shape[:2])
        return cls(attention, q_HEX, k_GEX[:, :rotated], free_GND, v.rows_HED[..., :hidden], bias_GE, order_GE)


def blocks(cut: Cut, roles: Roles, metric: Metric, moments: Moments | None, gram_DD: Tensor | None) -> list[Block]:
    """Keys and values as blocks to factorise, in this metric.

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
    o_HDE = output_columns(cut.attention, roles)
    metrics = _key_metric(cut, roles, moments), _over_groups(o_HDE.mT @ o_HDE, cut.attention)
    keys_NN, values_MM = (torch.block_diag(*psd_roots(each)[0]) for each in metrics)  # type: ignore[no-untyped-call]
    return [Block(free_ND, keys_NN, seen_DD), Block(v_MD, values_MM, attended_DD)]


def output_columns(attention: Attention, roles: Roles) -> Tensor:
    """The columns of `o` by head in float64, `o_HDE`."""
    return roles["o"].double().view(attention.hidden_size, -1, attention.head_dim).transpose(0, 1)


def _over_groups(heads_HEE: Tensor, attention: Attention) -> Tensor:
    """The sum over the query heads of each key head."""
    return heads_HEE.view(attention.num_key_value_heads, attention.query_group, *heads_HEE.shape[1:]).sum(1)


def spreads(cut: Cut, roles: Roles, moments: Moments) -> Tensor:
    """The spread of the values of one query behind `o`, by head: the effect of an error of one logit, `spread_H`.

    The inputs that one query attends to have the covariance of all inputs, less that of their averages.
    """
    seen_DD, attended_DD = moments.covariances()
    v_HED = cut.v_GED.repeat_interleave(cut.attention.query_group, 0)
    return spread_behind(output_columns(cut.attention, roles), v_HED, seen_DD - attended_DD)


def spread_behind(o_HDE: Tensor, v_HED: Tensor, within_DD: Tensor) -> Tensor:
    """The spread behind `o` of values whose inputs have this covariance, by head, `spread_H`."""
    within_HEE = v_HED @ within_DD @ v_HED.mT
    spread_H = ((o_HDE @ within_HEE) * o_HDE).sum((1, 2))
    return spread_H.clamp_min(LEAST * spread_H.mean().clamp_min(torch.finfo(torch.float64).tiny))


def _key_metric(cut: Cut, roles: Roles, moments: Moments) -> Tensor:
    """The cost of an error of an unrotated key: its square in a logit, times the spread of values, `(G, N, N)`."""
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
    """The roles of a site with latent attention, float64, and the part of the metric that the latent loses."""
    cut, hidden = Cut.of(attention, roles, planes_GK), attention.hidden_size
    weighed = blocks(cut, roles, metric, moments, gram_DD)
    down_RD, (k_up_NR, v_up_MR) = (joint if factor == "joint" else separate)(weighed, width)
    whole = sum(block.power() for block in weighed)
    lost = sum(block.loss(down_RD, up) for block, up in zip(weighed, (k_up_NR, v_up_MR), strict=True))
    v_bias_M = cut.v_bias_GE.flatten()
    if moments is not None:
        v_bias_M = v_bias_M + (weighed[1].rows_ND - v_up_MR @ down_RD) @ moments.attended_mean_D
    q_NX, rotated_MX = cut.q_HEX.flatten(0, 1), cut.rotated_GPX.flatten(0, 1)
    new: Roles = {"q": q_NX[:, :hidden], "o": roles["o"], "k_rope": rotated_MX[:, :hidden], "kv_down": down_RD}
    if "o_bias" in roles:
        new["o_bias"] = roles["o_bias"]
    for role, rows in (("q_bias", q_NX), ("k_rope_bias", rotated_MX)):
        if rows.shape[1] > hidden:
            new[role] = rows[:, hidden]
    if len(k_up_NR):
        new["k_up"] = k_up_NR
    return {**new, "v_up": v_up_MR, "v_up_bias": v_bias_M, "planes": planes_GK}, lost / whole if whole > 0 else 0.0


# --- how much of each -------------------------------------------------------------------------------------------------


def split_errors(
    attention: Attention,
    roles: Roles,
    search: Search,
    numbers: Sequence[int],
    sample: Mapping[str, Tensor],
    moments: Moments,
) -> Tensor:
    """The expected error behind `o` of every split of a site, as a part of the power of all its values, `error_CR`.

    C runs over these numbers of rotated planes, R over latents of 0 to D numbers. The error is that of logits through
    planes that are not rotated, times the spread of values, plus that of the latent, under the mean moments of both
    blocks.
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
    """The split of the least error within `room` elements, as an index into `error_CR`. Impossible splits are infinite.

    Among splits with at most `ALIKE` times that error, the narrowest latent wins: it decodes fastest.
    """
    error_CR = error_CR.masked_fill(elements_CR > room, torch.inf)
    alike_CR = error_CR <= ALIKE * error_CR.min()
    width = int(alike_CR.any(0).nonzero()[0])
    return int(error_CR[:, width].argmin()), width
