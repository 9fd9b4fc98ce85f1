"""What uptraining does for a method: stages, each with its losses and its share of the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stretch of uptraining.

    `share` is its part of all tokens (the shares of a method add up to 1); `losses` weighs `ce`, `kl` and
    `attention` (matching of attention outputs); `trainable` names roles, or is empty for every parameter; `converted`
    leaves out sites that the conversion did not touch, and all that is no attention; `rates` multiplies the learning
    rate by role; `finish` names the `end` of the method to call when it is over. `taught` lets attentions read what the
    teacher's did, where only their outputs are matched.
    """

    name: str
    share: float
    losses: Mapping[str, float]
    trainable: tuple[str, ...] = ()
    converted: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    finish: str | None = None
    taught: bool = False
