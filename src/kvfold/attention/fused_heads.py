"""Fused heads: each key or value head of a layer as a weighted sum of the heads of its group.

    W^(h) = sum_{j in group of h} omega_hj * W_j        omega_GGE: one weight for each coordinate of a head

At the identity the map is that of the heads as they are, to the last bit. Where the weights of all heads of a group are
equal, so are its heads, and one can stand for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kvfold.ranks import whole


class FusedHeads(nn.Module):
    """A linear map of heads in place of a plain one, whose weight and bias it takes over under the same names.

    `fusion` are the weights omega, `multiplier` that of their constraint, and `group` the number of each head's group.
    The differences of weights from their group's mean count `apart` times.
    """

    group: Tensor
    apart: Tensor

    def __init__(self, plain: nn.Linear, head_dim: int) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        heads = plain.weight.shape[0] // head_dim
        self.fusion = nn.Parameter(_identity(heads, head_dim).flatten())  # a vector, which does not decay
        self.multiplier = nn.Parameter(torch.zeros(1))
        self.register_buffer("group", torch.zeros(heads, dtype=torch.int64))
        self.register_buffer("apart", torch.ones(1))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The fused heads of an input, `(B, T, G E)`."""
        return linear(x_BTD, *_mixed(self.weight, self.bias, self._omega(self.fusion)))

    def _omega(self, fusion: Tensor) -> Tensor:
        """The weights `omega_GGE` that count, 0 between heads of different groups."""
        heads = len(self.group)
        omega_GGE = fusion.view(heads, heads, -1) * self._together()
        return omega_GGE - (1 - self.apart) * (omega_GGE - self._mean(omega_GGE))

    def _together(self) -> Tensor:
        """Which heads share a group, `(G, G, 1)`."""
        return (self.group[:, None] == self.group)[..., None]

    def _mean(self, omega_GGE: Tensor) -> Tensor:
        """The mean weights of each head's group."""
        together_GG1 = self._together()
        share_GG = (together_GG1[..., 0] / together_GG1.sum(1)).to(omega_GGE.dtype)
        return torch.einsum("hj,jke->hke", share_GG, omega_GGE)

    def join(self, groups: Sequence[Sequence[int]]) -> None:
        """Put the heads into these groups, with the weights of the identity."""
        for number, members in enumerate(groups):
            self.group[list(members)] = number
        heads = len(self.group)
        _put(self.fusion, _identity(heads, self.fusion.numel() // heads**2).flatten())

    def groups(self) -> list[list[int]]:
        """The heads of each group, ordered by their first."""
        found: dict[int, list[int]] = {}
        for head, number in enumerate(self.group.tolist()):
            found.setdefault(number, []).append(head)
        return list(found.values())

    def distances(self) -> Tensor:
        """The fusion loss of each pair of heads, `(G, G)`: `1/G sum_j (omega_hj - omega_h'j)^2`, a mean over E."""
        flat_GX = self._omega(whole(self.fusion)).detach().double().flatten(1)
        return torch.cdist(flat_GX, flat_GX).square() / flat_GX.shape[1]

    def spread(self) -> Tensor:
        """How far the weights of a group's heads are apart, with a gradient: their fusion loss, 1 at the identity."""
        omega_GGE = self._omega(whole(self.fusion))
        start = (1 - 1 / self._together().sum(1)).sum() * omega_GGE.shape[-1]
        return (omega_GGE - self._mean(omega_GGE)).square().sum() / start.clamp_min(1)

    def constraint(self, threshold: float) -> Tensor:
        """The term `multiplier * max(spread - threshold, 0)`, whose descent is an ascent for the multiplier."""
        excess, multiplier = (self.spread() - threshold).clamp_min(0), whole(self.multiplier).sum()
        return multiplier.detach() * excess + (multiplier.detach() - multiplier) * excess.detach()

    @torch.no_grad()
    def hand_over(self) -> None:
        """Make the first head of each group the mean of its fused heads, and let the others copy it."""
        fusion_GGE = self._omega(whole(self.fusion))
        copies_GGE = torch.zeros_like(fusion_GGE)
        self.apart.fill_(1.0)
        for heads in self.groups():
            fusion_GGE[heads[0]] = fusion_GGE[heads].mean(0)
            copies_GGE[heads, heads[0]] = 1
        weight, bias = _mixed(whole(self.weight), None if self.bias is None else whole(self.bias), fusion_GGE)
        _put(self.weight, weight)
        if self.bias is not None and bias is not None:
            _put(self.bias, bias)
        _put(self.fusion, copies_GGE.flatten())


def _identity(heads: int, width: int) -> Tensor:
    return torch.eye(heads)[..., None].repeat(1, 1, width)


def _mixed(weight: Tensor, bias: Tensor | None, fusion_GGE: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the fused heads."""
    heads, _, width = fusion_GGE.shape
    fusion_GGE = fusion_GGE.to(weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        fused_GED = torch.einsum("hje,jed->hed", fusion_GGE, weight.view(heads, width, -1))
        moved = None if bias is None else torch.einsum("hje,je->he", fusion_GGE, bias.view(heads, width)).flatten()
    return fused_GED.flatten(0, 1), moved


def _put(parameter: Any, value: Tensor) -> None:
    """Write a value that every rank has into a parameter that may be sharded over them."""
    with torch.no_grad():
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
