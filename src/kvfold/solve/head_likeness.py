"""How alike the key/value heads of a site are, in the measure of `fit`, and how many directions each of them uses.

Two heads become one with the loss of `solve.shared_heads.low_rank`: the smallest eigenvalues of their joint moments.
Heads without anything in common lose the smallest eigenvalues of the two heads apart. The likeness is

    1 - (lost together) / (lost with nothing in common)        1: linear images of one another, 0: unrelated

By the pinching inequality it is never below 0. Keys are compared plane by plane under RoPE, each under the power of its
queries; values under `sum o^T o` over their readers. So what does not change the function does not change the
likeness: a phase and a scale for each plane of a key head, any invertible map of a value head, folded into q or o.

The effective rank of a head is `exp(- sum_i p_i log p_i)` of the eigenvalues of its covariance in the same weights, as
parts of their sum (Roy and Vetterli 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles
from kvfold.solve.linalg import LEAST, psd_roots
from kvfold.solve.rope import to_planes
from kvfold.solve.shared_heads import Maps, Moments, plane_power


@dataclass(frozen=True)
class Likeness:
    """Of the G heads of a site: likeness of each pair, what a pair loses as one head, and effective ranks.

    `lost_GG` is the larger part of the weighted second moment that keys or values lose, as `fit` reports it.
    """

    keys_GG: Tensor
    values_GG: Tensor
    lost_GG: Tensor
    key_rank_G: Tensor
    value_rank_G: Tensor


def likeness(attention: Attention, roles: Roles, moments: Moments) -> Likeness:
    """Compare the heads of a site by its tensors and moments, in float64."""
    keys, values = Maps.of(roles, "k", attention), Maps.of(roles, "v", attention)
    heads, readers, width = attention.num_key_value_heads, attention.query_group, attention.head_dim
    looks_GEE = moments.query_HEE.view(heads, readers, width, width).sum(1)
    output_DGRE = roles["o"].double().view(attention.hidden_size, heads, readers, width)
    seen_GEE = torch.einsum("dgre,dgrf->gef", output_DGRE, output_DGRE)
    key_gram_DD = keys.with_one(moments.gram_DD, moments.mean_D, moments.mean_D)
    value_gram_DD = values.with_one(moments.attended_DD, moments.attended_mean_D, moments.attended_mean_D)
    weighted_GED = psd_roots(seen_GEE)[0] @ values.rows_HED
    of_keys = [_pairs(part_NGED, key_gram_DD) for part_NGED in _key_parts(keys.rows_HED, looks_GEE, attention)]
    of_values = _pairs(weighted_GED[None], value_gram_DD)
    inputs_DD, attended_DD = moments.covariances()
    columns = slice(attention.hidden_size)  # without the bias, which has no variance
    return Likeness(
        _likeness(of_keys),
        _likeness([of_values]),
        torch.stack([lost_GG / whole_GG.clamp_min(LEAST) for lost_GG, _, whole_GG in [*of_keys, of_values]]).amax(0),
        _effective_rank(psd_roots(looks_GEE)[0] @ keys.rows_HED[..., columns], inputs_DD),
        _effective_rank(weighted_GED[..., columns], attended_DD),
    )


def _key_parts(keys_GED: Tensor, looks_GEE: Tensor, attention: Attention) -> list[Tensor]:
    """The weighted parts of key heads that become one head each: the planes, `(P, G, 1, D)`, and the rest."""
    rope, parts = attention.rope, []
    rotated = rope.dims if rope else 0
    if rope:
        power_GP = plane_power(looks_GEE.diagonal(dim1=1, dim2=2), rope)
        planes_GPD = to_planes(keys_GED, rope) * power_GP.sqrt()[..., None]
        parts.append(planes_GPD.transpose(0, 1)[..., None, :])
    if rotated < attention.head_dim:
        roots_GFF = psd_roots(looks_GEE[:, rotated:, rotated:])[0]
        parts.append((roots_GFF @ keys_GED[:, rotated:])[None])
    return parts


Pairs = tuple[Tensor, Tensor, Tensor]
"""Of each pair of heads, `(G, G)`: what it loses as one, what with nothing in common, and the whole; 0 of itself."""


def _pairs(weighted_NGED: Tensor, gram_DD: Tensor) -> Pairs:
    """The sums over N of what each pair of heads loses."""
    heads, width = weighted_NGED.shape[1:3]
    gram_DD = gram_DD.to(weighted_NGED)
    flat_NXD = weighted_NGED.flatten(1, 2)
    joint_NXX = flat_NXD @ gram_DD @ flat_NXD.mH
    lost_GG, apart_GG, whole_GG = (torch.zeros(heads, heads, dtype=torch.float64) for _ in range(3))
    blocks = [slice(head * width, (head + 1) * width) for head in range(heads)]
    own = [torch.linalg.eigvalsh(joint_NXX[:, block, block]).clamp_min(0) for block in blocks]
    for first in range(heads):
        for second in range(first):
            both = [*range(blocks[second].start, blocks[second].stop), *range(blocks[first].start, blocks[first].stop)]
            together_NX = torch.linalg.eigvalsh(joint_NXX[:, both][:, :, both]).clamp_min(0)
            apart_NX = torch.cat([own[first], own[second]], dim=-1).sort().values
            found = together_NX[:, :width].sum(), apart_NX[:, :width].sum(), apart_NX.sum()
            for total_GG, value in zip((lost_GG, apart_GG, whole_GG), found, strict=True):
                total_GG[first, second] = total_GG[second, first] = value
    return lost_GG, apart_GG, whole_GG


def _likeness(found: Sequence[Pairs]) -> Tensor:
    """The likeness of each pair by all parts of the heads, `(G, G)`: 1 on the diagonal, and for heads of zeros."""
    lost_GG, apart_GG = (torch.stack([each[at] for each in found]).sum(0) for at in (0, 1))
    return (1 - lost_GG / apart_GG.clamp_min(LEAST)).clamp(0, 1)


def _effective_rank(weighted_GED: Tensor, covariance_DD: Tensor) -> Tensor:
    """The effective rank of each head, `(G,)`: from 1 to E; 1 for a head of zeros."""
    values_GE = torch.linalg.eigvalsh(weighted_GED @ covariance_DD @ weighted_GED.mT).clamp_min(0)
    parts_GE = values_GE / values_GE.sum(-1, keepdim=True).clamp_min(LEAST)
    rank_G: Tensor = torch.special.entr(parts_GE).sum(-1).exp()
    return rank_G
