"""One latent of the encoder's output for the cross-attentions of all layers, in closed form.

Every layer makes its keys `K_l x` and values `V_l y` of the encoder's output x; y is x averaged by attention. From one
latent `c = A x` they lose

    sum_l E |M_l^1/2 (K_l - U_l A) x|^2  +  sum_l E |O_l (V_l - W_l A) y_l|^2

where `O_l` maps values to the output of the attention, and `M_l` is the cost of an error of a key: second moments of
its queries, times the spread of the values behind `O_l` (`solve.latent`). For a given A, `U_l` and `W_l` are
regressions, and the rest depends on the layers through two matrices alone,

    S_k = sum_l K_l^T M_l K_l,       S_v = sum_l V_l^T O_l^T O_l V_l,

so A is found as for one layer (`solve.low_rank`), whatever the number of layers. Only for this step, the y_l have their
mean moments, each weighed by the power of its values. Logits ignore a part of a key that is the same for all tokens, so
moments are taken about their means, and values keep theirs as a bias; so do keys whose logits are capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Roles
from kvfold.solve.latent import AVERAGED, output_columns, spread_behind
from kvfold.solve.linalg import LEAST, floored, psd_roots
from kvfold.solve.low_rank import Block, joint, read_off
from kvfold.solve.shared_heads import Moments, covariance


@dataclass(frozen=True)
class CrossAttention:
    """The cross-attention of one layer, and the moments of its input. Without them errors are not weighed."""

    attention: Attention
    roles: Roles
    moments: Moments | None = None

    def heads(self, role: str) -> Tensor:
        """Rows of `k` or `v` by head in float64, `(G, E, D)`."""
        return self.roles[role].double().view(-1, self.attention.head_dim, self.attention.input_width)

    def costs(self) -> tuple[Tensor, Tensor]:
        """The cost of an error of the input through the keys and through the values, both `(D, D)`."""
        k_GED, v_GED = self.heads("k"), self.heads("v")
        if self.moments is None:
            return _square(k_GED.flatten(0, 1)), _square(v_GED.flatten(0, 1))
        attention, moments = self.attention, self.moments
        o_HDE = output_columns(attention, self.roles)
        v_HED = v_GED.repeat_interleave(attention.query_group, 0)
        seen_DD, attended_DD = moments.covariances()
        cost_H = AVERAGED * attention.logit_scale**2 * spread_behind(o_HDE, v_HED, seen_DD - attended_DD)
        keys_DD, values_DD = torch.zeros_like(seen_DD), torch.zeros_like(seen_DD)
        for head, cost in enumerate(cost_H):  # one after the other: heads side by side would be H times the memory
            k_ED = k_GED[head // attention.query_group]
            keys_DD += cost * (k_ED.T @ moments.query_HEE[head] @ k_ED)
            values_DD += _square(o_HDE[head] @ v_HED[head])
        return keys_DD, values_DD


@dataclass(frozen=True)
class EncoderLatent:
    """The latent map `down_RD`; by layer the new roles, and the parts of its keys and of its values that are lost."""

    down_RD: Tensor
    roles: Sequence[Roles]
    lost: Sequence[tuple[float, float]]


def fit_latent(layers: Sequence[CrossAttention], width: int, seen: tuple[Tensor, Tensor] | None) -> EncoderLatent:
    """Fit a latent of `width` numbers, fewer than the encoder's output has, to the cross-attentions of all layers.

    `seen` is the second moment and the mean of the encoder's output; without it, the fit is the SVD of the weights.
    Layers with moments are weighed by the effect of errors; without, keys and values count alike.
    """
    hidden = layers[0].attention.input_width
    seen_DD, mean_D = torch.eye(hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64)
    if seen is not None:
        seen_DD, mean_D = floored(covariance(*seen)), seen[1]
    costs = [layer.costs() for layer in layers]
    moments = [layer.moments for layer in layers if layer.moments is not None]
    means = [each.attended_mean_D for each in moments] or [mean_D] * len(layers)
    attended = [floored(each.covariances()[1]) for each in moments] or [seen_DD] * len(layers)
    blocks = _weighed_blocks(costs, seen_DD, attended) if moments else _plain_blocks(costs, seen_DD, seen is not None)
    down_RD, _ = joint([block for block in blocks if block.power() > LEAST] or blocks[:1], width)
    roles, lost = [], []
    for layer, cost, average_D, gram_DD in zip(layers, costs, means, attended, strict=True):
        new: Roles = dict(layer.roles)
        new["k"], off_k = _read(layer.heads("k"), down_RD, seen_DD)
        new["v"], off_v = _read(layer.heads("v"), down_RD, gram_DD)
        lost_means = {"v": off_v @ average_D}
        if layer.attention.softcap is not None:
            lost_means["k"] = off_k @ mean_D
        for role, lost_D in lost_means.items():
            old = layer.roles.get(f"{role}_bias")
            new[f"{role}_bias"] = layer.heads(role).flatten(0, 1) @ lost_D + (0 if old is None else old.double())
        roles.append(new)
        lost.append((_part(cost[0], off_k, seen_DD), _part(cost[1], off_v, gram_DD)))
    return EncoderLatent(down_RD, roles, lost)


Costs = Sequence[tuple[Tensor, Tensor]]


def _weighed_blocks(costs: Costs, seen_DD: Tensor, attended: Sequence[Tensor]) -> list[Block]:
    """Keys and values of all layers as one block each."""
    one_DD = torch.eye(len(seen_DD), dtype=torch.float64)
    keys_DD, values_DD = (sum(parts[1:], parts[0]) for parts in zip(*costs, strict=True))
    powers = [_power(cost[1], gram_DD) for cost, gram_DD in zip(costs, attended, strict=True)]
    shares = [power / sum(powers) if sum(powers) > 0 else 1 / len(powers) for power in powers]
    attended_DD = sum((part * gram_DD for part, gram_DD in zip(shares, attended, strict=True)), 0 * seen_DD)
    narrower = _ratio(float(attended_DD.trace()), float(seen_DD.trace()))  # the search begins from the mean of both
    return [
        Block(psd_roots(keys_DD)[0], one_DD, seen_DD),
        Block(psd_roots(narrower * values_DD)[0], one_DD, attended_DD / narrower),
    ]


def _plain_blocks(costs: Costs, seen_DD: Tensor, balanced: bool) -> list[Block]:
    """Keys and values of all layers as one block, `balanced` so that both have the same power."""
    keys_DD, values_DD = (sum(parts[1:], parts[0]) for parts in zip(*costs, strict=True))
    balance = _ratio(_power(keys_DD, seen_DD), _power(values_DD, seen_DD)) if balanced else 1.0
    one_DD = torch.eye(len(seen_DD), dtype=torch.float64)
    return [Block(psd_roots(keys_DD + balance * values_DD)[0], one_DD, seen_DD)]


def _read(rows_GED: Tensor, down_RD: Tensor, gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as maps of the latent, `(G E, R)`, and the part of an input that the latent loses, `off_DD`."""
    one_DD = torch.eye(len(gram_DD), dtype=torch.float64)
    guess_DR = read_off(Block(one_DD, one_DD, gram_DD), down_RD)  # of the input: the best for all of its images
    return rows_GED.flatten(0, 1) @ guess_DR, one_DD - guess_DR @ down_RD


def _ratio(above: float, below: float) -> float:
    """A quotient, 1 if either number is not positive."""
    return above / below if above > 0 and below > 0 else 1.0


def _square(rows_ND: Tensor) -> Tensor:
    return rows_ND.T @ rows_ND


def _power(cost_DD: Tensor, gram_DD: Tensor) -> float:
    return float((cost_DD * gram_DD).sum())


def _part(cost_DD: Tensor, off_DD: Tensor, gram_DD: Tensor) -> float:
    """The cost of the errors, as a part of all that can be lost."""
    whole = _power(cost_DD, gram_DD)
    return _power(cost_DD, off_DD @ gram_DD @ off_DD.T) / whole if whole > 0 else 0.0
