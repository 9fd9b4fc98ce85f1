"""What attention and MLP add to the residual stream, as they are or behind a norm, and what of it is missing.

Behind an RMS norm the stream takes `w * u / r(u)` of an output u, where `r(u)` is its root mean square. At that length
a change of u moves the stream by `w / r` times as much: u lacks `r / w` of what the stream does, and tokens count by
`1 / r`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNUSED = 1e-6  # of a norm's largest weight: an output coordinate below it is not heard


@dataclass(frozen=True)
class Norm:
    """An RMS norm, `weight * u / rms(u)`, whose module may add an offset to the weights that it stores."""

    module: Any
    offset: float = 0.0

    def __call__(self, u_BTD: Tensor) -> Tensor:
        """`u_BTD` normed."""
        found: Tensor = self.module(u_BTD)
        return found

    @property
    def weight(self) -> Tensor:
        """What it multiplies by."""
        found: Tensor = self.module.weight + self.offset
        return found

    @property
    def epsilon(self) -> float:
        """What it adds to the mean square."""
        return float(getattr(self.module, "variance_epsilon", None) or self.module.eps)


@dataclass(frozen=True)
class Residual:
    """A module whose output joins the residual stream, behind a norm where there is one, times a factor."""

    module: nn.Module
    norm: Norm | None = None
    factor: float = 1.0

    @property
    def last(self) -> nn.Module:
        """The module that puts out what is added."""
        return self.module if self.norm is None else self.norm.module

    def added(self, output_BTD: Tensor) -> Tensor:
        """What the stream takes of an output."""
        return self.factor * (output_BTD if self.norm is None else self.norm(output_BTD))

    def missing(self, output_BTD: Tensor, wanted_BTD: Tensor) -> tuple[Tensor, Tensor | float]:
        """What an output lacks where `wanted_BTD` is to be added to the stream, and the weight of each token."""
        lacks_BTD = (wanted_BTD.to(output_BTD) - self.added(output_BTD)) / self.factor
        if self.norm is None:
            return lacks_BTD, 1.0
        weight_D = self.norm.weight
        heard_D = weight_D.abs() > UNUSED * weight_D.abs().max()
        length_BT1 = (output_BTD.square().mean(-1, keepdim=True) + self.norm.epsilon).sqrt()
        missing_BTD = length_BT1 * lacks_BTD / torch.where(heard_D, weight_D, 1.0)
        return torch.where(heard_D, missing_BTD, 0.0), 1 / length_BT1
