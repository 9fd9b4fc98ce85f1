"""One latent of the encoder's output for the cross-attentions of all layers, in closed form.

Every layer makes its keys `K_l x` and values `V_l y` of the same x, the encoder's output; y is x as attention averages
it. Read off one latent `c = A x` they lose

    sum_l E |M_l^1/2 (K_l - U_l A) x|^2  +  sum_l E |O_l (V_l - W_l A) y_l|^2

where `O_l` is what stands behind the values, and `M_l` what an error of a key does there: second moments of the queries
that meet it, times how far the values behind lie apart (`latents`). For given A, `U_l` and `W_l` are regressions, and
what is left depends on the layers through two matrices alone,

    S_k = sum_l K_l^T M_l K_l,       S_v = sum_l V_l^T O_l^T O_l V_l,

so A is found as for one layer (`factor`), whatever the number of layers. For that, and that alone, the y_l have their
mean moments, each weighed by the values that it bears. Logits feel no part of a key that is the same for all tokens,
so moments are taken about their means, and values keep theirs as a bias; so do keys whose logits are capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles
from kvfold.solve.latent import AVERAGED, apart, outputs
from kvfold.solve.linalg import LEAST, floored, psd_roots
from kvfold.solve.low_rank import Block, joint, read_off
from kvfold.solve.shared_heads import Moments, about


@dataclass(frozen=True)
class Reader:
    """The cross-attention of one layer, and the moments of what it reads; without them errors are not weighed."""

    attention: Attention
    roles: Roles
    moments: Moments | None = None

    def heads(self, role: str) -> Tensor:
        """Rows of `k` or `v` by head in float64, `(G, E, D)`."""
        return self.roles[role].double().view(-1, self.attention.head_dim, self.attention.input_width)

    def costs(self) -> tuple[Tensor, Tensor]:
        """What an error of the input costs through the keys and through the values, both `(D, D)`."""
        k_GED, v_GED = self.heads("k"), self.heads("v")
        if self.moments is None:
            return _square(k_GED.flatten(0, 1)), _square(v_GED.flatten(0, 1))
        attention, moments = self.attention, self.moments
        o_HDE = outputs(attention, self.roles)
        v_HED = v_GED.repeat_interleave(attention.query_group, 0)
        seen_DD, attended_DD = moments.covariances()
        cost_H = AVERAGED * attention.logit_scale**2 * apart(o_HDE, v_HED, seen_DD - attended_DD)
        keys_DD, values_DD = torch.zeros_like(seen_DD), torch.zeros_like(seen_DD)
        for head, cost in enumerate(cost_H):  # one after the other: heads side by side would be H times the memory
            k_ED = k_GED[head // attention.query_group]
            keys_DD += cost * (k_ED.T @ moments.query_HEE[head] @ k_ED)
            values_DD += _square(o_HDE[head] @ v_HED[head])
        return keys_DD, values_DD


@dataclass(frozen=True)
class Shared:
    """The latent `down_RD`; by layer the roles that read it, and what parts its keys and its values lose."""

    down_RD: Tensor
    roles: Sequence[Roles]
    lost: Sequence[tuple[float, float]]


def share(readers: Sequence[Reader], width: int, seen: tuple[Tensor, Tensor] | None) -> Shared:
    """Fit a latent of `width` numbers, fewer than the model's own, to the cross-attentions of all layers.

    `seen` is the second moment and the mean of the encoder's output; without them it is the SVD of the weights. Readers
    with moments are weighed by what errors do; without, keys and values count alike.
    """
    hidden = readers[0].attention.input_width
    one_DD, mean_D = torch.eye(hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)
    seen_DD = one_DD
    if seen is not None:
        seen_DD, mean_D = floored(about(*seen)), seen[1]
    costs = [reader.costs() for reader in readers]
    keys_DD, values_DD = (sum(parts[1:], parts[0]) for parts in zip(*costs, strict=True))
    means, attended = [mean_D] * len(readers), [seen_DD] * len(readers)
    weighed = [reader.moments for reader in readers if reader.moments is not None]
    if weighed:
        means = [each.attended_mean_D for each in weighed]
        attended = [floored(each.covariances()[1]) for each in weighed]
        borne = [_power(cost[1], gram_DD) for cost, gram_DD in zip(costs, attended, strict=True)]
        shares = [part / sum(borne) if sum(borne) > 0 else 1 / len(borne) for part in borne]
        attended_DD = sum((part * gram_DD for part, gram_DD in zip(shares, attended, strict=True)), 0 * seen_DD)
        narrower = _ratio(float(attended_DD.trace()), float(seen_DD.trace()))  # the search begins from the mean of both
        blocks = [
            Block(psd_roots(keys_DD)[0], one_DD, seen_DD),
            Block(psd_roots(narrower * values_DD)[0], one_DD, attended_DD / narrower),
        ]
    else:
        balance = 1.0 if seen is None else _ratio(_power(keys_DD, seen_DD), _power(values_DD, seen_DD))
        blocks = [Block(psd_roots(keys_DD + balance * values_DD)[0], one_DD, seen_DD)]
    down_RD, _ = joint([block for block in blocks if block.power() > LEAST] or blocks[:1], width)
    roles, lost = [], []
    for reader, cost, average_D, gram_DD in zip(readers, costs, means, attended, strict=True):
        new: Roles = dict(reader.roles)
        new["k"], off_k = _read(reader.heads("k"), down_RD, seen_DD)
        new["v"], off_v = _read(reader.heads("v"), down_RD, gram_DD)
        lost_means = {"v": off_v @ average_D}
        if reader.attention.softcap is not None:
            lost_means["k"] = off_k @ mean_D
        for role, lost_D in lost_means.items():
            old = reader.roles.get(f"{role}_bias")
            new[f"{role}_bias"] = reader.heads(role).flatten(0, 1) @ lost_D + (0 if old is None else old.double())
        roles.append(new)
        lost.append((_part(cost[0], off_k, seen_DD), _part(cost[1], off_v, gram_DD)))
    return Shared(down_RD, roles, lost)


def _read(rows_GED: Tensor, down_RD: Tensor, gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """What reads these rows off the latent, `(G E, R)`, and what the latent leaves of an input, `off_DD`."""
    one_DD = torch.eye(len(gram_DD), dtype=torch.float64)
    guess_DR = read_off(Block(one_DD, one_DD, gram_DD), down_RD)  # of the input: the best for all of its images
    return rows_GED.flatten(0, 1) @ guess_DR, one_DD - guess_DR @ down_RD


def _ratio(above: float, below: float) -> float:
    """A quotient of what both are worth, 1 where one of them is worth nothing."""
    return above / below if above > 0 and below > 0 else 1.0


def _square(rows_ND: Tensor) -> Tensor:
    return rows_ND.T @ rows_ND


def _power(cost_DD: Tensor, gram_DD: Tensor) -> float:
    return float((cost_DD * gram_DD).sum())


def _part(cost_DD: Tensor, off_DD: Tensor, gram_DD: Tensor) -> float:
    """What errors cost, as a part of all that could be lost."""
    whole = _power(cost_DD, gram_DD)
    return _power(cost_DD, off_DD @ gram_DD @ off_DD.T) / whole if whole > 0 else 0.0
