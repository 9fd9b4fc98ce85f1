"""One head for the key or value heads of a group, in closed form, from second moments alone.

Head j of the group maps the input x to `A_j x`. One shared head u is kept, and every head is reconstructed from it:

    A_j x ~ L_j u,   u = S x

`S` (the shared map) becomes the new k or v. `L_j` (the lift) is folded into the readers of head j: `q_h <- L_j^H q_h`
for keys, `o_h <- o_h L_j` for values. L_j is any matrix for values and for keys without rotation. Under RoPE it is one
complex number for each plane (see `solve.rope`), which is the same problem with heads of width 1 over the complex
numbers. All functions are batched over leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvfold.contracts.requests import Answers, AttentionGram, HeadKL, InputGram, QueryGram
from kvfold.contracts.site import Attention, Roles, Rope, Site
from kvfold.solve import Merge
from kvfold.solve.linalg import LEAST, psd_roots
from kvfold.solve.rope import put_planes, to_planes

ROUNDS = 100  # of generalised Procrustes, at most
SETTLED = 1e-7  # relative gain of a round below which it has converged
UNSEEN = 1e-10  # of the largest moment of a group of heads: a direction below it was not in the text
SPAN = 1e-9  # of the largest singular value: a direction below it is outside of the heads' span
LEAST_WEIGHT = 1e-3  # of a head by ablation, where 1 is the mean: no head is dropped for a sample that does not use it
NOTHING = 1e-9  # of the second moment: a loss below it is rounding, in float64


@dataclass(frozen=True)
class Merged:
    """One head for a group of J: `shared_RD`, `lift_JER`, and the part of the weighted moment that is lost."""

    shared_RD: Tensor
    lift_JER: Tensor
    lost: float


def low_rank(maps_JED: Tensor, metrics_JEE: Tensor, gram_DD: Tensor, rank: int) -> Merged:
    """The best shared head of width `rank`: it minimises `sum_j E |root(M_j) (A_j x - L_j u)|^2`.

    `gram_DD` is E[x x^T]. The metric `M_j` weighs the directions of head j: for keys the second moment of its queries,
    for values `sum_h o_h^T o_h` over its readers. The optimum is the principal component analysis of the heads side by
    side, each under the root of its metric (Eckart and Young 1936). It is lossless exactly when the heads together span
    `rank` dimensions, so that they are linear images of one another.
    """
    heads, width = maps_JED.shape[-3:-1]
    roots_JEE, inverses_JEE = psd_roots(metrics_JEE)
    weighted_ND = (roots_JEE @ maps_JED).flatten(-3, -2)
    values_N, vectors_NN = torch.linalg.eigh(weighted_ND @ gram_DD.to(weighted_ND) @ weighted_ND.mH)
    unseen = bool((values_N[..., -rank] <= UNSEEN * values_N[..., -1]).any())
    if unseen:  # too little text, or the heads span less: unseen directions are kept by their weights
        vectors_NN = _within(weighted_ND, gram_DD)
    top_NR = vectors_NN[..., -rank:].flip(-1)
    shared_RD = top_NR.mH @ weighted_ND
    lift_JER = inverses_JEE @ top_NR.reshape(*top_NR.shape[:-2], heads, width, rank)
    # the scale of the source's numbers suits a narrow format or a quantised cache
    power = _power(maps_JED, gram_DD).mean(-1) * width / rank
    scale = _ratio(power, _power(shared_RD, gram_DD)).sqrt()[..., None, None]
    whole = values_N.clamp_min(0).sum()
    lost = float(values_N[..., :-rank].clamp_min(0).sum() / whole) if whole > 0 else 0.0
    if unseen:
        lost = max(lost, _left_out(weighted_ND, top_NR))
    return Merged(shared_RD * scale, lift_JER / scale[..., None], lost)


def _within(weighted_ND: Tensor, gram_DD: Tensor) -> Tensor:
    """Directions ordered by their power, ascending, all those outside of the heads' span before those within.

    If the text has fewer inputs than the heads have directions, moments alone cannot rank the rest: heads that are
    images of one another would then be lossless on this text, and on no other.
    """
    left_NK, size_K, _ = torch.linalg.svd(weighted_ND, full_matrices=False)
    own_NK = left_NK * (size_K > SPAN * size_K[..., :1])[..., None, :]
    mean = gram_DD.diagonal().mean()
    floored_DD = gram_DD + UNSEEN * mean.clamp_min(LEAST) * torch.eye(len(gram_DD)).to(gram_DD)
    worth_NN = weighted_ND @ floored_DD.to(weighted_ND) @ weighted_ND.mH
    largest = torch.linalg.matrix_norm(worth_NN)[..., None, None].clamp_min(LEAST)
    # adding 1 to every direction of the span puts the others last
    vectors_NN: Tensor = torch.linalg.eigh(worth_NN / largest + own_NK @ own_NK.mH)[1]
    return vectors_NN


def _left_out(weighted_ND: Tensor, top_NR: Tensor) -> float:
    """The part of the heads' weights outside of these directions."""
    whole = weighted_ND.abs().square().sum()
    kept = (top_NR.mH @ weighted_ND).abs().square().sum()
    return max(0.0, 1 - float(kept / whole)) if whole > 0 else 0.0


def aligned(maps_JED: Tensor, gram_DD: Tensor, weight_J: Tensor | None = None, *, keep_norm: bool) -> Merged:
    """The mean of the heads after each is rotated towards it: generalised Procrustes (Gower 1975; arXiv 2412.20677).

    Lifts are orthogonal, or phases. `weight_J` weighs the heads in the mean. `keep_norm` scales it to the heads' mean
    Frobenius norm: rotated heads still differ, so their mean is shorter than they are.
    """
    weight_J = torch.ones(maps_JED.shape[-3]) if weight_J is None else weight_J / weight_J.mean()
    weight_J11 = weight_J.to(maps_JED.real)[:, None, None]
    maps_JED = maps_JED.clone()
    gram_DD = gram_DD.to(maps_JED)
    mean_ED = maps_JED[..., 0, :, :]
    lift_JEE = torch.zeros(*maps_JED.shape[:-1], maps_JED.shape[-2], dtype=maps_JED.dtype, device=maps_JED.device)
    before = torch.zeros((), dtype=torch.float64)
    for _ in range(ROUNDS):
        left, _, right = torch.linalg.svd(maps_JED @ gram_DD @ mean_ED.mH[..., None, :, :])
        lift_JEE = left @ right
        mean_ED = (lift_JEE.mH @ maps_JED * weight_J11).mean(-3)
        kept = _power(mean_ED, gram_DD).sum().cpu()
        if kept <= before * (1 + SETTLED):
            break
        before = kept
    whole = (_power(maps_JED, gram_DD) * weight_J11[..., 0, 0]).sum().cpu()
    lost = 1 - float(before * maps_JED.shape[-3] / whole) if whole > 0 else 0.0
    if keep_norm:
        norms_J = torch.linalg.matrix_norm(maps_JED)
        mean_ED = mean_ED * _ratio(norms_J.mean(-1), torch.linalg.matrix_norm(mean_ED))[..., None, None]
    return Merged(mean_ED, lift_JEE, lost)


def averaged(maps_JED: Tensor, gram_DD: Tensor) -> Merged:
    """The mean of the heads as they are."""
    mean_ED = maps_JED.mean(0)
    kept, whole = (float(_power(each, gram_DD).sum()) for each in (mean_ED, maps_JED))
    lost = 1 - kept * len(maps_JED) / whole if whole > 0 else 0.0
    lift_JEE = torch.eye(len(mean_ED), dtype=maps_JED.dtype, device=maps_JED.device).expand(len(maps_JED), -1, -1)
    return Merged(mean_ED, lift_JEE, lost)


def _power(maps_ED: Tensor, gram_DD: Tensor) -> Tensor:
    """The mean over the rows of `E |row x|^2`."""
    return ((maps_ED @ gram_DD.to(maps_ED)) * maps_ED.conj()).real.sum(-1).mean(-1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A quotient, 1 for heads of zeros, which pruned and padded models have."""
    return torch.where(below > 0, above / below, 1.0)


def reported(lost: Sequence[float], weight: Tensor) -> dict[str, list[Any]]:
    """The measurements of shared heads for kvfold.json: the loss of each, and which are lossless.

    A loss that rounding to the format of `weight` can cause counts as none.
    """
    nothing = rounding(weight)
    return {"lost": list(lost), "lossless": [number for number, share in enumerate(lost) if share <= nothing]}


def rounding(weight: Tensor) -> float:
    """The part of a second moment that rounding to the format of `weight` can lose: a smaller loss counts as none."""
    return max(NOTHING, (torch.finfo(weight.dtype).eps / 2) ** 2)


# --- a site's heads, group by group ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Second moments and means of a site: `gram_DD` and `mean_D` of its input x, `query_HEE` of its query heads.

    `attended_DD` and `attended_mean_D` are those of the inputs averaged by attention, which weigh the values.
    """

    gram_DD: Tensor
    mean_D: Tensor
    query_HEE: Tensor
    attended_DD: Tensor
    attended_mean_D: Tensor

    def covariances(self) -> tuple[Tensor, Tensor]:
        """The covariances of the inputs and of their averages by attention, both `(D, D)`."""
        return covariance(self.gram_DD, self.mean_D), covariance(self.attended_DD, self.attended_mean_D)


def covariance(gram_DD: Tensor, mean_D: Tensor) -> Tensor:
    """Second moments about the mean."""
    return gram_DD - torch.outer(mean_D, mean_D)


def moments_of(site: Site, answers: Answers) -> Moments:
    """The moments of a site, from the answers of calibration."""
    seen, attended = answers[InputGram(site)], answers[AttentionGram(site)]
    return Moments(
        seen["gram_DD"],
        seen["mean_D"],
        answers[QueryGram(site)]["gram_HEE"],
        attended["gram_DD"],
        attended["mean_D"],
    )


def ablation_weights(site: Site, attention: Attention, answers: Answers) -> Tensor:
    """How often an error of each key/value head counts, `(G,)`, 1 on average: the square of the KL without its readers.

    The KL itself does less for the heads that a model needs most (docs/methods/gqa.md).
    """
    kl_G = torch.stack([answers[HeadKL(site, head)]["kl"] for head in range(attention.num_key_value_heads)])
    return _ratio(kl_G.square(), kl_G.square().mean()).clamp_min(LEAST_WEIGHT)


def merge_site(
    attention: Attention, roles: Roles, heads: int, moments: Moments, how: Merge, weight_G: Tensor | None = None
) -> tuple[Roles, list[float]]:
    """Merge the KV heads of a site into `heads` contiguous groups: its new roles, float64, and the loss of each group.

    An error of KV head g counts `weight_G[g]` times, 1 unless given. The loss of a group is the larger of its keys' and
    its values'. A bias is a column of its map, for an input that is
    always 1.
    """
    new = {role: tensor.to(torch.float64, copy=True) for role, tensor in roles.items()}
    keys, values = Maps.of(new, "k", attention), Maps.of(new, "v", attention)
    queries = Maps.of(new, "q", attention)
    output_DHE = new["o"].view(attention.hidden_size, attention.num_attention_heads, attention.head_dim)
    group, readers = attention.num_key_value_heads // heads, attention.query_group
    key_gram_DD = keys.with_one(moments.gram_DD, moments.mean_D, moments.mean_D)
    value_gram_DD = values.with_one(moments.attended_DD, moments.attended_mean_D, moments.attended_mean_D)
    merged_k, merged_v, lost = [], [], []
    for first in range(0, attention.num_key_value_heads, group):
        mine = slice(first, first + group)
        read = slice(first * readers, (first + group) * readers)
        weight_J = None if weight_G is None else weight_G[mine]
        looks_JEE = moments.query_HEE[read].view(group, readers, *moments.query_HEE.shape[1:]).sum(1)
        shared_ED, lifts, lost_k = shared_key(keys.rows_HED[mine], looks_JEE, key_gram_DD, attention, how, weight_J)
        if attention.norms == "all_heads":
            shared_ED, lifts = as_first(shared_ED, lifts)
        for head, queries_RED in enumerate(queries.rows_HED[read].view(group, readers, *queries.rows_HED.shape[1:])):
            lifts.fold(head, queries_RED)
        output_DJRE = output_DHE[:, read].view(attention.hidden_size, group, readers, attention.head_dim)
        seen_JEE = torch.einsum("djre,djrf->jef", output_DJRE, output_DJRE)
        merged = shared_value(values.rows_HED[mine], seen_JEE, value_gram_DD, how, weight_J)
        output_DJRE.copy_(torch.einsum("djre,jef->djrf", output_DJRE, merged.lift_JER))
        merged_k.append(shared_ED)
        merged_v.append(merged.shared_RD)
        lost.append(max(lost_k, merged.lost))
    Maps(torch.stack(merged_k), keys.biased).put(new, "k")
    Maps(torch.stack(merged_v), values.biased).put(new, "v")
    queries.put(new, "q")
    return new, lost


@dataclass(frozen=True)
class KeyLifts:
    """The lifts of J heads from a shared key: one factor for each plane, and a matrix for unrotated coordinates."""

    planes_JP: Tensor | None
    free_JFF: Tensor | None
    rope: Rope | None

    def fold(self, head: int, queries_RED: Tensor) -> None:
        """Apply the lift of a head to the queries that read it, in place, so that they read the shared key."""
        rotated = self.rope.dims if self.rope else 0
        if self.rope and self.planes_JP is not None:
            turned_RPD = self.planes_JP[head].conj()[:, None] * to_planes(queries_RED, self.rope)
            put_planes(queries_RED, turned_RPD, self.rope)
        if self.free_JFF is not None:
            queries_RED[:, rotated:] = self.free_JFF[head].mT @ queries_RED[:, rotated:]

    def unfold(self, head: int, key_ED: Tensor) -> None:
        """Apply the inverse of the lift to the head itself, in place."""
        rotated = self.rope.dims if self.rope else 0
        if self.rope and self.planes_JP is not None:
            turned_1PD = to_planes(key_ED[None], self.rope) / self.planes_JP[head][:, None]
            put_planes(key_ED[None], turned_1PD, self.rope)
        if self.free_JFF is not None:
            key_ED[rotated:] = torch.linalg.solve(self.free_JFF[head], key_ED[rotated:])

    def bounded(self) -> KeyLifts:
        """The lifts with small factors raised, so that their inverses stay bounded."""
        planes_JP = self.planes_JP
        if planes_JP is not None:
            least_P = SMALLEST * planes_JP.abs().amax(0)
            size_JP = planes_JP.abs()
            planes_JP = torch.where(size_JP > 0, planes_JP.sgn(), 1) * size_JP.clamp_min(least_P)
        return replace(self, planes_JP=planes_JP, free_JFF=None if self.free_JFF is None else _bounded(self.free_JFF))


def shared_key(
    keys_JED: Tensor,
    metric_JEE: Tensor,
    gram_DD: Tensor,
    attention: Attention,
    how: Merge,
    weight_J: Tensor | None = None,
) -> tuple[Tensor, KeyLifts, float]:
    """The shared key of J heads, `(E, D)`, the lift of each, and the part of their weighted moment that is lost.

    `metric_JEE` is the second moment of the queries that read each head. An error of head j counts `weight_J[j]` times.
    """
    if weight_J is not None:
        metric_JEE = metric_JEE * weight_J[:, None, None]
    rope, width = attention.rope, attention.head_dim
    shared_ED, lost = torch.zeros_like(keys_JED[0]), 0.0
    rotated = rope.dims if rope else 0
    planes_JP = free_JFF = None
    if attention.norms == "pre_rope":
        # a norm follows: heads of one length, matched by phases alone, without a scale to choose
        power_J11 = ((keys_JED @ gram_DD) * keys_JED).sum((1, 2), keepdim=True)
        keys_JED = keys_JED * _ratio(torch.ones_like(power_J11), power_J11).sqrt()
        how = "align"
    if rope:
        maps_PJ1D = to_planes(keys_JED, rope).transpose(0, 1)[..., None, :]
        if how == "fit":
            metric_PJ11 = plane_power(metric_JEE.diagonal(dim1=1, dim2=2), rope).T.to(maps_PJ1D.dtype)[..., None, None]
            merged = low_rank(maps_PJ1D, metric_PJ11, gram_DD, 1)
        else:
            merged = aligned(maps_PJ1D, gram_DD, weight_J, keep_norm=how == "align-norm")
        put_planes(shared_ED[None], merged.shared_RD[None, :, 0], rope)
        planes_JP = merged.lift_JER[..., 0, 0].T
        lost = merged.lost
    if rotated < width:
        free = slice(rotated, width)
        if attention.norms == "pre_rope":  # whose weights differ, so that heads cannot be rotated as a whole
            merged = averaged(keys_JED[:, free], gram_DD)
        elif how == "fit":
            merged = low_rank(keys_JED[:, free], metric_JEE[:, free, free], gram_DD, width - rotated)
        else:
            merged = aligned(keys_JED[:, free], gram_DD, weight_J, keep_norm=how == "align-norm")
        shared_ED[free], free_JFF = merged.shared_RD, merged.lift_JER
        lost = max(lost, merged.lost)
    return shared_ED, KeyLifts(planes_JP, free_JFF, rope), lost


def as_first(key_ED: Tensor, lifts: KeyLifts) -> tuple[Tensor, KeyLifts]:
    """The shared key in the phases of the first head, so that the queries of this head are not rotated.

    A rotation does not commute with the weights of the queries' norm if these differ within a plane.
    """
    if lifts.rope is None or lifts.planes_JP is None:
        return key_ED, lifts
    first_P, turned_ED = lifts.planes_JP[0].sgn(), key_ED.clone()
    put_planes(turned_ED[None], first_P[:, None] * to_planes(key_ED[None], lifts.rope), lifts.rope)
    return turned_ED, replace(lifts, planes_JP=lifts.planes_JP * first_P.conj())


def plane_power(power_JE: Tensor, rope: Rope) -> Tensor:
    """Powers of the rotated coordinates of heads -> powers of their planes, `(J, P)`."""
    planes_JP1 = to_planes(power_JE[..., None], rope)
    return (planes_JP1.real + planes_JP1.imag)[..., 0]


def shared_value(
    values_JED: Tensor, metric_JEE: Tensor, gram_DD: Tensor, how: Merge, weight_J: Tensor | None = None
) -> Merged:
    """The shared value of J heads; `metric_JEE` is `sum o^T o` over the readers of each, `weight_J` as of keys."""
    if weight_J is not None:
        metric_JEE = metric_JEE * weight_J[:, None, None]
    if how == "fit":
        return low_rank(values_JED, metric_JEE, gram_DD, values_JED.shape[1])
    return aligned(values_JED, gram_DD, weight_J, keep_norm=how == "align-norm")


@dataclass(frozen=True)
class Maps:
    """The heads of a role as maps of the input, with the bias as a last column if there is one."""

    rows_HED: Tensor
    biased: bool

    @classmethod
    def of(cls, roles: Roles, role: str, attention: Attention) -> Maps:
        """The heads of `q`, `k` or `v` in float64, in their own memory."""
        rows_HED = roles[role].to(torch.float64, copy=True).view(-1, attention.head_dim, roles[role].shape[-1])
        bias = roles.get(f"{role}_bias")
        if bias is not None:
            rows_HED = torch.cat([rows_HED, bias.double().view(*rows_HED.shape[:2], 1)], dim=-1)
        return cls(rows_HED, bias is not None)

    def put(self, roles: Roles, role: str) -> None:
        """Write the heads back as weight and bias."""
        flat = self.rows_HED.flatten(0, 1)
        roles[role] = flat[:, :-1] if self.biased else flat
        if self.biased:
            roles[f"{role}_bias"] = flat[:, -1]

    def with_one(self, gram_DD: Tensor, first_D: Tensor, second_D: Tensor) -> Tensor:
        """Moments E[x y^T] of two inputs with means, each followed by a 1 for maps with a bias column."""
        if not self.biased:
            return gram_DD
        above = torch.cat([gram_DD, first_D[:, None]], dim=1)
        return torch.cat([above, torch.cat([second_D, second_D.new_ones(1)])[None]])


# --- the same heads in the basis of the shared one -------------------------------------------------------------------

SMALLEST = 0.1  # singular value of a lift, as a part of its largest: the inverse stays bounded


def in_shared_basis(attention: Attention, roles: Roles, heads: int, moments: Moments) -> Roles:
    """The heads of a site in the basis of those that `fit` would share among `heads` contiguous groups, float64.

    Head j is `L_j u` as far as one head u can stand for it: its map becomes `L_j^-1 A_j`, and its readers take `L_j`
    in. The site computes the same, and the heads of a group become alike. Where a lift almost drops a direction, its
    singular value is raised to `SMALLEST` of the largest.
    """
    new = {role: tensor.to(torch.float64, copy=True) for role, tensor in roles.items()}
    keys, values, queries = (Maps.of(new, role, attention) for role in "kvq")
    output_DGRE = new["o"].view(attention.hidden_size, -1, attention.query_group, attention.head_dim)
    queries_GRED = queries.rows_HED.view(-1, attention.query_group, *queries.rows_HED.shape[1:])
    looks_GEE = moments.query_HEE.view(len(queries_GRED), attention.query_group, *moments.query_HEE.shape[1:]).sum(1)
    key_gram_DD = keys.with_one(moments.gram_DD, moments.mean_D, moments.mean_D)
    value_gram_DD = values.with_one(moments.attended_DD, moments.attended_mean_D, moments.attended_mean_D)
    size = attention.num_key_value_heads // heads
    for first in range(0, attention.num_key_value_heads, size):
        mine = slice(first, first + size)
        _, lifts, _ = shared_key(keys.rows_HED[mine], looks_GEE[mine], key_gram_DD, attention, "fit")
        lifts = lifts.bounded()
        seen_JEE = torch.einsum("djre,djrf->jef", output_DGRE[:, mine], output_DGRE[:, mine])
        lift_JEE = _bounded(shared_value(values.rows_HED[mine], seen_JEE, value_gram_DD, "fit").lift_JER)
        for number, head in enumerate(range(first, first + size)):
            lifts.unfold(number, keys.rows_HED[head])
            lifts.fold(number, queries_GRED[head])
        values.rows_HED[mine] = torch.linalg.solve(lift_JEE, values.rows_HED[mine])
        output_DGRE[:, mine] = torch.einsum("djre,jef->djrf", output_DGRE[:, mine], lift_JEE)
    for role, maps in (("k", keys), ("v", values), ("q", queries)):
        maps.put(new, role)
    return new


def _bounded(lift_JEE: Tensor) -> Tensor:
    """Lifts whose small singular values are raised."""
    left, size_JE, right = torch.linalg.svd(lift_JEE)
    raised_JEE: Tensor = (left * size_JE.clamp_min(SMALLEST * size_JE[..., :1])[..., None, :]) @ right
    return raised_JEE
