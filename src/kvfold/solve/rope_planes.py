"""Which rotary planes a key head needs most: RoPElite (arXiv 2503.01586, section 3.2), exact, in one pass.

A logit is a sum over planes, and so is its change when planes are left unrotated on both sides:

    d_c = scale * Re(q_c conj(k_c) (1 - e^{i (m - n) theta_c})),      S - S_E = -sum_{c not in E} d_c

RoPElite greedily adds to E the plane that makes the mean of `|S_E - S|` smallest. The paper runs the model for each
candidate of each round; here every round sums the `d_c` of sampled pairs of a query and a key before it, from one pass.
Query heads that share a key head share its planes, so they are taken together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Rope
from kvfold.solve.linalg import LEAST
from kvfold.solve.rope import frequencies, pairs

MOST = 16_384  # pairs of a key head


@dataclass(frozen=True)
class Pairs:
    """Pairs X of a query and a key before it in the same row, for one key head and all query heads that read it.

    `lost_XC` is the change of the logit if a plane is left unrotated, `product_XC` the plane's unrotated part of it.
    """

    lost_XC: Tensor
    product_XC: Tensor


def pairs_of(attention: Attention, rope: Rope, sample: Mapping[str, Tensor]) -> Iterator[Pairs]:
    """The pairs of each key head in turn, float64: each sampled token with those up to it in its row.

    `sample` answers SampledPairs. Of more than `MOST` pairs every n-th is used. Raises SettingError for a RoPE scaling
    that depends on the length of the text.
    """
    position_N, row_N = sample["position_N"], sample["row_N"]
    query, key = torch.nonzero((row_N[:, None] == row_N) & (position_N[:, None] >= position_N), as_tuple=True)
    step = max(1, -(-len(query) * attention.query_group // MOST))
    query, key = query[::step], key[::step]
    theta_C, factor = frequencies(rope)
    scale = factor**2 * attention.logit_scale
    angle_XC = (position_N[query] - position_N[key])[:, None] * theta_C
    turn_XC = 1 - torch.polar(torch.ones_like(angle_XC), angle_XC)
    real, imaginary = pairs(rope)
    q_NHC, k_NGC = (
        torch.complex(heads[..., real].double(), heads[..., imaginary].double())
        for heads in (sample["q_NHE"], sample["k_NGE"])
    )
    for group in range(attention.num_key_value_heads):
        heads = slice(group * attention.query_group, (group + 1) * attention.query_group)
        met_RXC = scale * q_NHC[query, heads].transpose(0, 1) * k_NGC[key, group].conj()
        yield Pairs((met_RXC * turn_XC).real.flatten(0, 1), met_RXC.real.flatten(0, 1))


def elite(seen: Pairs) -> Tensor:
    """The planes of a key head in the order of RoPElite's choice, `order_C`."""
    rest_X, waiting = seen.lost_XC.sum(1), list(range(seen.lost_XC.shape[1]))
    order = []
    while waiting:
        distance_C = (rest_X[:, None] - seen.lost_XC[:, waiting]).abs().mean(0)
        order.append(waiting.pop(int(distance_C.argmin())))
        rest_X = rest_X - seen.lost_XC[:, order[-1]]
    return torch.tensor(order)


def contribution(seen: Pairs) -> Tensor:
    """Planes by their mean contribution to a logit, descending, `order_C`: the baseline of arXiv 2410.08703."""
    return seen.product_XC.mean(0).argsort(descending=True, stable=True)


def importance(seen: Pairs) -> Tensor:
    """How much the logits change without the rotation of each plane, as a part of the sum over planes, `part_C`."""
    change_C = seen.lost_XC.abs().mean(0)
    return change_C / change_C.sum().clamp_min(LEAST)


def uniform(planes: int, kept: int) -> Tensor:
    """`kept` planes spread evenly over the frequencies, `planes_K`: a published baseline."""
    return torch.linspace(0, planes - 1, kept, dtype=torch.float64).round().long()


def left(seen: Pairs, kept_K: Tensor) -> Tensor:
    """S - S_E, the change of each logit if these planes of a key head are rotated and no others, `error_X`."""
    others_C = torch.ones(seen.lost_XC.shape[1], dtype=torch.bool).index_fill(0, kept_K, False)
    return seen.lost_XC[:, others_C].sum(1)
