"""What attention and MLP add to the residual stream, as they are or through a norm, and what of it is missing.

Behind an RMS norm the stream takes `w * u / r(u)` of an output u, where `r(u)` is its root mean square. At that length
a change of u moves the stream by `w / r` times as much: u lacks `r / w` of what the stream does, and tokens count by
`1 / r`. A norm over the stream and the output (post-norm) is the same, with their sum for u. A LayerNorm subtracts the
mean of u first, and its length is the standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNUSED = 1e-6  # of a norm's largest weight: an output coordinate below it is not heard


@dataclass(frozen=True)
class Norm:
    """An RMS norm, `weight * u / rms(u)`, whose module may add an offset to the weights that it stores; a LayerNorm."""

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

    def length(self, u_BTD: Tensor) -> Tensor:
        """What it divides by, `(B, T, 1)`."""
        if isinstance(self.module, nn.LayerNorm):
            u_BTD = u_BTD - u_BTD.mean(-1, keepdim=True)
        return (u_BTD.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


@dataclass(frozen=True)
class Residual:
    """A module whose output joins the residual stream times a factor, through a norm where there is one.

    The norm is that of the output, or with `post_norm` that of the stream and the output.
    """

    module: nn.Module
    norm: Norm | None = None
    factor: float = 1.0
    post_norm: bool = False

    @property
    def last(self) -> nn.Module:
        """The last module before the stream goes on."""
        return self.module if self.norm is None else self.norm.module

    def behind(self, stream_BTD: Tensor, last_BTD: Tensor) -> Tensor:
        """The stream behind, from the stream before and the output of `last`."""
        return last_BTD if self.post_norm else stream_BTD.to(last_BTD) + self.factor * last_BTD

    def joined(self, stream_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """The stream behind an output of the module."""
        through_BTD = self._through(stream_BTD, output_BTD)
        return self.behind(stream_BTD, through_BTD if self.norm is None else self.norm(through_BTD))

    def missing(self, stream_BTD: Tensor, output_BTD: Tensor, wanted_BTD: Tensor) -> tuple[Tensor, Tensor | float]:
        """What an output lacks for the stream behind to be `wanted_BTD`, and the weight of each token."""
        u_BTD, wanted_BTD = self._through(stream_BTD, output_BTD), wanted_BTD.to(output_BTD)
        if not self.post_norm:
            wanted_BTD = wanted_BTD - stream_BTD.to(output_BTD)
        if self.norm is None:
            return (wanted_BTD - self.factor * u_BTD) / self.factor, 1.0
        taken_BTD = self.norm(u_BTD) if self.post_norm else self.factor * self.norm(u_BTD)
        lacks_BTD = (wanted_BTD - taken_BTD) / self.factor
        weight_D = self.norm.weight
        heard_D = weight_D.abs() > UNUSED * weight_D.abs().max()
        length_BT1 = self.norm.length(u_BTD)
        missing_BTD = length_BT1 * lacks_BTD / torch.where(heard_D, weight_D, 1.0)
        return torch.where(heard_D, missing_BTD, 0.0), 1 / length_BT1

    def _through(self, stream_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """What the norm reads."""
        return stream_BTD.to(output_BTD) + self.factor * output_BTD if self.post_norm else output_BTD
