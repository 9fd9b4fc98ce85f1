"""One rotated key for all heads of a layer, and one latent for all else, in closed form, on second moments alone.

A plane p of the key heads is one complex number per head, `k_p` in C^G. Under RoPE it can be mapped by any complex
matrix without changing how it turns (`solve.rope`), so its best n shared components are its principal components, each
head weighed by the power of its queries:

    k_gp ~ sum_n l_gpn u_n + r_gp,      u_n = s_n x,      q'_hn = conj(l_gpn) q_hp

The components u of some planes are the rotated key; `l` goes into the queries. The rest r of every plane is left
unrotated and, with the values, becomes a linear map of the latent (`solve.latent`). The cost of leaving a component of
power w unrotated is `w E|e^{i theta d} - 1|^2` over distances d, and that of rotating it by the angle of another plane
`w E|e^{i theta d} - e^{i phi d}|^2`: so components are ranked over planes and layers, and neighbours may be folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve import Metric
from kvfold.solve.latent import Cut, blocks, output_columns, spread_behind
from kvfold.solve.linalg import LEAST
from kvfold.solve.low_rank import Block, joint, spectrum
from kvfold.solve.rope import frequencies, put_planes, to_planes
from kvfold.solve.shared_heads import Maps, Moments, low_rank, plane_power

REACH = 2048  # tokens: distances between a query and its keys count by their logarithm, up to this
TURNED = 0.1  # errors of the logits of many keys partly cancel in their average (as in `solve.latent`)
EPSILON = 1e-6  # of the norm on the latent, in every deepseek_v3
POWERS = {"float16": 8}
"""By format: the constant of the latent is `2^power sqrt(R)`. The error of the norm falls with it, as 4^-power; float16
holds no number above 65504, and less of the others as they are divided by `2^power`."""
POWER = 16  # of other formats


@dataclass(frozen=True)
class Pool:
    """Planes whose components are taken together, the plane whose angle they rotate by, and how many are kept."""

    planes: tuple[int, ...]
    angle: int
    kept: int


@dataclass(frozen=True)
class Source:
    """A site in float64 with what weighs its errors: keys and queries with a column for the bias of k."""

    attention: Attention
    roles: Roles
    metric: Metric
    moments: Moments | None
    gram_DD: Tensor
    q_HED: Tensor
    k_GEX: Tensor
    v: Maps
    weight_GP: Tensor  # cost of an error of each plane of each key head
    key_gram_XX: Tensor

    @classmethod
    def of(
        cls, attention: Attention, roles: Roles, metric: Metric, moments: Moments | None, gram_DD: Tensor | None
    ) -> Source:
        """`outputs` needs the moments, `inputs` the second moments of the input."""
        q, k, v = (Maps.of(roles, role, attention) for role in "qkv")
        hidden, groups, rope = attention.hidden_size, attention.num_key_value_heads, rope_of(attention)
        k.rows_HED[:, : rope.dims] *= frequencies(rope)[1] ** 2  # a scaled RoPE's factor of q and k
        weight_GP = torch.ones(groups, rope.dims // 2, dtype=torch.float64)
        mean_D = torch.zeros(hidden, dtype=torch.float64)
        if metric == "outputs":
            assert moments is not None
            gram_DD, mean_D = moments.gram_DD, moments.mean_D
            power_HP = plane_power(moments.query_HEE.diagonal(dim1=1, dim2=2), rope)
            seen_DD, attended_DD = moments.covariances()
            v_HED = v.rows_HED[..., :hidden].repeat_interleave(attention.query_group, 0)
            spread_H = spread_behind(output_columns(attention, roles), v_HED, seen_DD - attended_DD)
            # half: the real part of a product. The spread of each head makes it worse (docs/log.md)
            cost_HP = attention.logit_scale**2 * spread_H.mean() * power_HP / 2
            weight_GP = cost_HP.view(groups, attention.query_group, -1).sum(1)
        if gram_DD is None:
            gram_DD = torch.eye(hidden, dtype=torch.float64)
        key_gram_XX = k.with_one(gram_DD, mean_D, mean_D)
        return cls(attention, roles, metric, moments, gram_DD, q.rows_HED, k.rows_HED, v, weight_GP, key_gram_XX)

    def powers(self) -> Tensor:
        """The weighted power of each component of each plane, descending, `(P, G)`."""
        planes_PGX = to_planes(self.k_GEX, rope_of(self.attention)).transpose(0, 1)
        weighed_PGX = planes_PGX * self.weight_GP.T.sqrt()[..., None]
        values_PG: Tensor = torch.linalg.eigvalsh(weighed_PGX @ self.key_gram_XX.to(weighed_PGX) @ weighed_PGX.mH)
        return values_PG.flip(1).clamp_min(0)


def rope_of(attention: Attention) -> Rope:
    """The rotation of a site that has one."""
    assert attention.rope is not None
    return attention.rope


# --- which components -------------------------------------------------------------------------------------------------


def missed(theta: Tensor, other: Tensor | None = None) -> Tensor:
    """`E|e^{i theta d} - e^{i other d}|^2` over distances d up to `REACH`, each by 1 / d; `other` is 0 by default."""
    distance_X = torch.arange(1, REACH + 1, dtype=torch.float64)
    angle = theta if other is None else theta - other
    apart = 2 - 2 * (angle[..., None] * distance_X).cos()
    return (apart / distance_X).sum(-1) / (1 / distance_X).sum()


def gains(source: Source) -> Tensor:
    """What rotating each component of each plane saves, `(P, G)`, descending in a plane."""
    theta_P, _ = frequencies(rope_of(source.attention))
    return source.powers() * missed(theta_P)[:, None]


def chosen(gains_PG: Sequence[Tensor], pairs: int) -> list[int]:
    """How many components of each plane are rotated: those that save most, as a part of each site, over all sites."""
    gain_PG = torch.stack([each / each.sum().clamp_min(LEAST) for each in gains_PG]).sum(0)
    best = gain_PG.flatten().argsort(descending=True, stable=True)[:pairs] // gain_PG.shape[1]
    return torch.bincount(best, minlength=len(gain_PG)).tolist()


def counted(counts: Sequence[int]) -> list[Pool]:
    """Pools of single planes, by the number of components that each keeps."""
    return [Pool((plane,), plane, kept) for plane, kept in enumerate(counts) if kept]


def spaced(source: Source, pairs: int, *, always: bool) -> list[Pool]:
    """One component of every n-th plane, its neighbours up to the next one folded into it where that saves more."""
    theta_P, _ = frequencies(rope_of(source.attention))
    step, pools = stride(len(theta_P), pairs), []
    for angle in range(0, pairs * step, step):
        several = Pool(tuple(range(angle, min(angle + step, len(theta_P)))), angle, 1)
        alone = Pool((angle,), angle, 1)
        folds = always or saved(source, several, theta_P) > saved(source, alone, theta_P)
        pools.append(several if folds else alone)
    return pools


def stride(planes: int, pairs: int) -> int:
    """The distance between rotated planes that are evenly spaced from the fastest one on."""
    return max(1, planes // pairs)


def saved(source: Source, pool: Pool, theta_P: Tensor) -> float:
    """What the components of a pool save, each of its planes rotated by the pool's angle."""
    shared_NX, lift_GJN = _components(source, pool)
    planes = torch.tensor(pool.planes)
    power_N = ((shared_NX @ source.key_gram_XX.to(shared_NX)) * shared_NX.conj()).real.sum(-1)
    costs_GJ = source.weight_GP[:, planes] * (lift_GJN.abs().square() * power_N).sum(-1)
    saved_J = missed(theta_P[planes]) - missed(theta_P[planes], theta_P[pool.angle])
    return float((costs_GJ * saved_J).sum())


def _components(source: Source, pool: Pool) -> tuple[Tensor, Tensor]:
    """The components of a pool as maps of the input, `shared_NX`, and what each plane of each head is of them."""
    planes = list(pool.planes)
    maps_GJX = to_planes(source.k_GEX, rope_of(source.attention))[:, planes]
    weight_J = source.weight_GP[:, planes].flatten().clamp_min(LEAST).to(maps_GJX.dtype)
    merged = low_rank(maps_GJX.flatten(0, 1)[:, None], weight_J[:, None, None], source.key_gram_XX, pool.kept)
    return merged.shared_RD, merged.lift_JER[:, 0].view(*maps_GJX.shape[:2], pool.kept)


# --- a site's new tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A site in two parts: the rotated key of all heads and its queries, and the rest, left unrotated.

    Rows of `key_PX` and of `query_HPD` are real and imaginary parts of planes in turn, as they rotate together.
    """

    key_PX: Tensor
    query_HPD: Tensor
    rest: Cut


def split(source: Source, pools: Sequence[Pool]) -> Split:
    """Take the components of these pools out of the keys."""
    attention, rope, hidden = source.attention, rope_of(source.attention), source.attention.hidden_size
    left_GPX, q_HPD = to_planes(source.k_GEX, rope), to_planes(source.q_HED, rope)
    keys, queries = [], []
    for pool in pools:
        planes = list(pool.planes)
        shared_NX, lift_GJN = _components(source, pool)
        left_GPX[:, planes] -= lift_GJN @ shared_NX
        lift_HJN = lift_GJN.repeat_interleave(attention.query_group, 0)
        keys.append(shared_NX)
        queries.append(torch.einsum("hjn,hjd->hnd", lift_HJN.conj(), q_HPD[:, planes]))
    free_GEX = source.k_GEX.clone()
    put_planes(free_GEX, left_GPX, rope)
    v_GED = source.v.rows_HED
    bias_GE = v_GED[..., hidden] if source.v.biased else v_GED.new_zeros(v_GED.shape[:2])
    order_GE = torch.arange(attention.head_dim).expand(len(free_GEX), -1)
    none_GPX = free_GEX[:, :0]
    rest = Cut(attention, source.q_HED, none_GPX, free_GEX[..., :hidden], v_GED[..., :hidden], bias_GE, order_GE)
    return Split(_neighbours(torch.cat(keys)), _neighbours(torch.cat(queries, dim=1)), rest)


def _neighbours(planes_NX: Tensor) -> Tensor:
    """Complex rows as real ones, real and imaginary parts in turn."""
    return torch.stack([planes_NX.real, planes_NX.imag], dim=-2).flatten(-3, -2)


def latent_blocks(source: Source, rest: Cut, *, centred: bool) -> list[Block]:
    """Unrotated keys and values as blocks to factorise. Uncentred, their means must come out of the latent too."""
    moments = source.moments
    if moments is not None and not centred:
        moments = replace(
            moments, mean_D=torch.zeros_like(moments.mean_D), attended_mean_D=torch.zeros_like(moments.attended_mean_D)
        )
    return blocks(rest, source.roles, source.metric, moments, source.gram_DD)


def convert_site(source: Source, pools: Sequence[Pool], width: int, *, exact: bool, dtype: str) -> tuple[Roles, float]:
    """The roles of a site with a latent of `width`, float64, and the part of the metric that the latent loses.

    `exact` holds the norm on the latent still by a constant in its last coordinate; else the norm changes each latent
    by its length, which is 1 in the mean.
    """
    attention, parts = source.attention, split(source, pools)
    hidden, head, heads = attention.hidden_size, attention.head_dim, attention.num_attention_heads
    weighed, own = latent_blocks(source, parts.rest, centred=exact), width - exact
    whole, rotates_all = sum(block.power() for block in weighed), _all_rotated(attention, pools)
    if rotates_all:
        weighed = weighed[1:]
    down_RD, ups = joint(weighed, own)
    lost = sum(block.loss(down_RD, up_NR) for block, up_NR in zip(weighed, ups, strict=True))
    v_up_MR = ups[-1]
    k_up_NR = torch.zeros_like(v_up_MR) if rotates_all else ups[0]
    length = float(((down_RD @ source.gram_DD) * down_RD).sum() / own) ** 0.5 or 1.0
    down_RD, k_up_NR, v_up_MR = down_RD / length, k_up_NR * length, v_up_MR * length
    up_HNR = torch.cat([each.view(-1, head, own) for each in (k_up_NR, v_up_MR)], dim=1)
    up_HNR = up_HNR.repeat_interleave(attention.query_group, 0)
    scale = attention.logit_scale * (head + len(parts.key_PX)) ** 0.5  # of deepseek_v3: 1 / sqrt(width of a head)
    q_HND = scale * torch.cat([parts.rest.q_HEX, parts.query_HPD], dim=1)
    new: Roles = {"o": source.roles["o"]} | queries(source, q_HND.flatten(0, 1), dtype)
    key_PD = parts.key_PX[:, :hidden]
    part = lost / whole if whole > 0 else 0.0
    if not exact:
        norm_R = torch.ones(width, dtype=torch.float64)
        new |= {"kv_down": torch.cat([down_RD, key_PD]), "kv_norm": norm_R, "kv_up": up_HNR.flatten(0, 1)}
        return new, part
    constant, norm_R, gain = constants(width, dtype)
    up_HNR = torch.cat([up_HNR / gain, up_HNR.new_zeros(heads, 2 * head, 1)], dim=-1)
    key_bias_P = parts.key_PX[:, hidden] if parts.key_PX.shape[1] > hidden else key_PD.new_zeros(len(key_PD))
    v_bias_GE = parts.rest.v_bias_GE
    if source.moments is not None:
        lacking_MD = weighed[-1].rows_ND - ups[-1] @ (down_RD * length)
        v_bias_GE = v_bias_GE + (lacking_MD @ source.moments.attended_mean_D).view_as(v_bias_GE)
    o_bias_D = source.roles["o"].double() @ v_bias_GE.repeat_interleave(attention.query_group, 0).flatten()
    if "o_bias" in source.roles:
        o_bias_D = o_bias_D + source.roles["o_bias"].double()
    new |= {"o_bias": o_bias_D, "kv_norm": norm_R, "kv_up": up_HNR.flatten(0, 1)}
    new["kv_down"] = torch.cat([down_RD, down_RD.new_zeros(1, hidden), key_PD])
    new["kv_down_bias"] = torch.cat([down_RD.new_zeros(own), down_RD.new_tensor([constant]), key_bias_P])
    return new, part


def queries(source: Source, q_NX: Tensor, dtype: str) -> Roles:
    """The roles of queries: one map, or two where they have a bias, with the input and a constant between them.

    The input is scaled by a power of two to a mean square of about 1, as the constant expects.
    """
    hidden = source.attention.hidden_size
    if q_NX.shape[1] == hidden:
        return {"q": q_NX}
    constant, norm_R, gain = constants(hidden + 1, dtype)
    power = float(source.gram_DD.diagonal().mean().clamp_min(LEAST))
    scale = 2.0 ** -round(math.log2(power) / 2)
    return {
        "q_down": scale * torch.eye(hidden + 1, hidden, dtype=torch.float64),
        "q_down_bias": torch.cat([q_NX.new_zeros(hidden), q_NX.new_tensor([constant])]),
        "q_down_norm": norm_R,
        "q_up": torch.cat([q_NX[:, :hidden] / (scale * gain), q_NX[:, hidden:]], dim=1),
    }


def _all_rotated(attention: Attention, pools: Sequence[Pool]) -> bool:
    """Whether no part of a key is left unrotated."""
    planes, groups = rope_of(attention).dims // 2, attention.num_key_value_heads
    whole = rope_of(attention).dims == attention.head_dim
    return whole and [pool.kept for pool in pools if pool.planes == (pool.angle,)] == [groups] * planes


def constants(width: int, dtype: str) -> tuple[float, Tensor, float]:
    """The constant of a latent in this format, the weights of its norm, and what these still make of a latent.

    The norm divides by `sqrt(constant^2 / R + |z|^2 / R)`, which differs from one number by a part of
    `|z|^2 / (2 constant^2)`. Its weights are powers of two, exact in every format; the last one makes the constant 1,
    which comes out of the norm as the square root of R.
    """
    power, kind = POWERS.get(dtype, POWER), getattr(torch, dtype)
    constant = float(torch.tensor(2.0**power * math.sqrt(width), dtype=torch.float64).to(kind))
    norm_R = torch.full((width,), 2.0**power, dtype=torch.float64)
    norm_R[-1] = 1 / float(torch.tensor(math.sqrt(width), dtype=torch.float64).to(kind))
    return constant, norm_R, 2.0**power / math.sqrt(constant**2 / width + EPSILON)


# --- how much of each -------------------------------------------------------------------------------------------------


def split_errors(source: Source, candidates: Sequence[Sequence[Pool]], *, exact: bool) -> Tensor:
    """The expected error behind `o`, as a part of the power of all values, `error_CR`.

    C runs over candidates for the rotated key, R over latents of 0 to D + 1 numbers.
    """
    hidden, rows = source.attention.hidden_size, []
    whole_turned, theta_P = float(gains(source).sum()), frequencies(rope_of(source.attention))[0]
    for pools in candidates:
        weighed = latent_blocks(source, split(source, pools).rest, centred=exact)
        lost_R = torch.zeros(hidden + 2, dtype=torch.float64)
        lost_R[exact : hidden + exact] = spectrum(weighed).flip(0).cumsum(0).flip(0)
        if exact:
            lost_R[0] = torch.inf
        turned = TURNED * (whole_turned - sum(saved(source, pool, theta_P) for pool in pools))
        whole = weighed[1].power()
        rows.append((lost_R + turned) / whole if whole > 0 else lost_R + turned)
    return torch.stack(rows)
