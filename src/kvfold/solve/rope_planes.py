"""Which rotary planes a key head cannot do without: RoPElite (arXiv 2503.01586, section 3.2), exact, in one pass.

A logit is a sum over planes, and so is what it loses when planes are left unrotated on both sides:

    d_c = scale * Re(q_c conj(k_c) (1 - e^{i (m - n) theta_c})),      S - S_E = -sum_{c not in E} d_c

RoPElite adds to E the plane after which the mean of `|S_E - S|` is smallest, and again. The paper runs the model for
each candidate of each round; with `d_c` of sampled pairs of a query and a key before it, all rounds are sums of what
one pass has shown. Query heads that share a key head are taken together, for they share its planes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.contracts.site import Attention, Rope
from kvfold.solve.rope import frequencies, pairs

MOST = 16_384  # pairs of a key head


@dataclass(frozen=True)
class Pairs:
    """Queries and the keys before them in the same rows, of one key head and all query heads that read it (X).

    `lost_XC` is what each plane takes from a logit when it is left unrotated, `product_XC` its unrotated part of it.
    """

    lost_XC: Tensor
    product_XC: Tensor


def pairs_of(attention: Attention, rope: Rope, sample: Mapping[str, Tensor]) -> Iterator[Pairs]:
    """Pair each sampled token with those before it in its row, itself included, key head after key head; float64.

    `sample` answers SampledPairs. Of more than `MOST` pairs every n-th is taken. Raises SettingError for a RoPE scaling
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


def elite(seen: Pairs) -> tuple[Tensor, Tensor]:
    """All planes of a key head in the order in which RoPElite takes them, `order_C`, and what is still lost then.

    `left_C` is the mean of |S_E - S| in logits after each choice; after the last it is 0.
    """
    rest_X, waiting = seen.lost_XC.sum(1), list(range(seen.lost_XC.shape[1]))
    order, left = [], []
    while waiting:
        distance_C = (rest_X[:, None] - seen.lost_XC[:, waiting]).abs().mean(0)
        best = int(distance_C.argmin())
        left.append(distance_C[best])
        order.append(waiting.pop(best))
        rest_X = rest_X - seen.lost_XC[:, order[-1]]
    return torch.tensor(order), torch.stack(left)


def contribution(seen: Pairs) -> Tensor:
    """Planes by what they add to a logit, largest mean first, `order_C`: a published baseline (arXiv 2410.08703)."""
    return seen.product_XC.mean(0).argsort(descending=True, stable=True)


def uniform(planes: int, kept: int) -> Tensor:
    """So many planes spread evenly over the frequencies, `planes_K`: a published baseline."""
    return torch.linspace(0, planes - 1, kept, dtype=torch.float64).round().long()


def left(seen: Pairs, kept_K: Tensor) -> Tensor:
    """S - S_E, what each logit loses when these planes of a key head are rotated and no others, `error_X`."""
    others_C = torch.ones(seen.lost_XC.shape[1], dtype=torch.bool).index_fill(0, kept_K, False)
    return seen.lost_XC[:, others_C].sum(1)
