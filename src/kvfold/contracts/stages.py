"""What uptraining does for a method: stages, each with its losses and its share of the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage of uptraining."""

    name: str
    share: float  # of all tokens: the shares of a method's stages add up to 1
    losses: Mapping[str, float]  # weights of `ce`, `kl` and `attention` (the distance between attention outputs)
    trainable: tuple[str, ...] = ()  # roles; empty: every parameter
    converted: bool = False  # train only the attention that the conversion changed
    rates: Mapping[str, float] = field(default_factory=dict)  # role -> factor of the learning rate
    scheduled: bool = False  # `Method.during` is called before each forward pass
    finish: str | None = None  # passed to `Method.end` when the stage is over
    taught: bool = False  # each attention reads the teacher's input of that attention, with the loss `attention` alone
