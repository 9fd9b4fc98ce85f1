"""Closed forms for heads behind a norm over all of them at once (OLMo 2's).

Such a norm computes `w * (A x) / r(x)` of the heads' rows `A x`, where `r(x)^2` is the mean square of all rows. The
closed forms replace r by its root mean square over inputs: `absorb` gives the maps `w * A / r`, and `restore` writes
other maps as rows and norm weights again. The rows of each plane keep the mean square of the source's, so that `r(x)`
does not change in the mean, nor for any token where the heads that become one were alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles
from kvfold.solve import Merge
from kvfold.solve.linalg import LEAST
from kvfold.solve.rope import pairs
from kvfold.solve.shared_heads import Maps, Moments, merge_site
from kvfold.solve.shared_layers import Reader, Shared, share


def merge_normed(
    attention: Attention, roles: Roles, heads: int, moments: Moments, how: Merge, weight_G: Tensor | None = None
) -> tuple[Roles, list[float]]:
    """Merge the heads of a site like `merge_site`, with q and k behind such norms."""
    source = {role: tensor.double() for role, tensor in roles.items()}
    seen = moments.gram_DD, moments.mean_D
    new, lost = merge_site(attention, absorb(source, attention, *seen), heads, moments, how, weight_G)
    for role in "qk":
        restore(new, role, source, attention, *seen)
    return new, lost


def share_normed(readers: Sequence[Reader]) -> Shared:
    """Share the keys and values of the first layer like `share`, with q and k behind such norms."""
    sources = [{role: tensor.double() for role, tensor in reader.roles.items()} for reader in readers]
    plain = [
        replace(reader, roles=absorb(roles, reader.attention, reader.gram_DD, reader.mean_D))
        for reader, roles in zip(readers, sources, strict=True)
    ]
    shared = share(plain)
    for reader, source, new, order in zip(readers, sources, shared.roles, shared.queries, strict=True):
        heads = Maps.of(source, "q", reader.attention)
        Maps(heads.rows_HED[order], heads.biased).put(source, "q")
        source["q_norm"] = source["q_norm"].view(len(order), -1)[order].flatten()
        for role in ("q", "k") if "k" in new else ("q",):
            restore(new, role, source, reader.attention, reader.gram_DD, reader.mean_D)
    return shared


def absorb(roles: Roles, attention: Attention, gram_DD: Tensor, mean_D: Tensor) -> Roles:
    """The roles of a site in float64, with the norms folded into `q` and `k`."""
    new = dict(roles)
    for role in "qk":
        maps = Maps.of(roles, role, attention)
        power_HE = _power(maps, gram_DD, mean_D)
        weight_HE1 = new.pop(f"{role}_norm").view(-1, attention.head_dim, 1)
        Maps(maps.rows_HED * weight_HE1 / power_HE.mean().clamp_min(LEAST).sqrt(), maps.biased).put(new, role)
    return new


def restore(new: Roles, role: str, source: Roles, attention: Attention, gram_DD: Tensor, mean_D: Tensor) -> None:
    """Write maps with a folded norm as rows and norm weights, in place. `source` has the roles before `absorb`.

    `attention` is the source's. Fewer heads than it has stand for groups of neighbours, and keep their mean powers.
    """
    width = attention.head_dim
    old, made = Maps.of(source, role, attention), Maps.of(new, role, attention)
    groups, power_HE = len(made.rows_HED), _power(old, gram_DD, mean_D)
    weight_GE1 = source[f"{role}_norm"].view(groups, -1, width).square().mean(1).sqrt()[..., None]
    rows_GED = torch.where(weight_GE1 > 0, made.rows_HED / weight_GE1, 0.0)
    wanted_GE, found_GE = power_HE.view(groups, -1, width).mean(1), _power(Maps(rows_GED, made.biased), gram_DD, mean_D)
    if attention.rope:  # one number for both coordinates of a plane, because its rows rotate together
        real, imaginary = pairs(attention.rope)
        for power_GE in (wanted_GE, found_GE):
            power_GE[:, real] = power_GE[:, imaginary] = power_GE[:, real] + power_GE[:, imaginary]
    scale_GE1 = torch.where(found_GE > 0, found_GE / wanted_GE.clamp_min(LEAST), 1.0).sqrt()[..., None]
    Maps(rows_GED / scale_GE1, made.biased).put(new, role)
    new[f"{role}_norm"] = (weight_GE1 * scale_GE1).flatten() * power_HE.mean().sqrt()


def _power(maps: Maps, gram_DD: Tensor, mean_D: Tensor) -> Tensor:
    """`E |row x|^2` of each row, `(H, E)`."""
    return ((maps.rows_HED @ maps.with_one(gram_DD, mean_D, mean_D)) * maps.rows_HED).sum(-1)
