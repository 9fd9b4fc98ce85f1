"""What uptraining does for a method: stages, each with its losses and its share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfold import ranks
from kvfold.contracts.site import Shape, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

GUIDED: Mapping[str, float] = {"kl": 1.0, "ce": 0.3}
"""The default losses with a teacher: together they are better than either alone (docs/log.md)."""


@dataclass(frozen=True)
class Stage:
    """One stage of uptraining."""

    name: str
    share: float  # of all tokens: the shares of a method's stages add up to 1
    losses: Mapping[str, float]  # weights of `ce`, `kl` and `attention` (the distance between attention outputs)
    trainable: tuple[str, ...] = ()  # roles; empty: every parameter
    converted: bool = False  # train only the attention that the conversion changed
    rates: Mapping[str, float] = field(default_factory=dict)  # role -> factor of the learning rate; 0: does not train
    scheduled: bool = False  # `Method.during` is called before each forward pass, and `Method.settled` before each step
    finish: str | None = None  # passed to `Method.end` when the stage is over
    taught: bool = False  # each attention reads the teacher's input of that attention, with the loss `attention` alone


@dataclass(frozen=True)
class Learner:
    """A student in training: its model, the shape of its checkpoint, and the parameter of each role."""

    model: nn.Module
    shape: Shape
    parameter: Callable[[Site, str], str]  # its name in the model

    def map(self, site: Site, role: str) -> Any:
        """The module of a role."""
        return self.model.get_submodule(self.parameter(site, role).removesuffix(".weight"))

    def put(self, site: Site, role: str, module: nn.Module) -> None:
        """Replace the module of a role."""
        self.model.set_submodule(self.parameter(site, role).removesuffix(".weight"), module)

    def whole(self, site: Site, role: str) -> Tensor:
        """The tensor of a role without its gradient, whole on every rank: all ranks call it."""
        return ranks.whole(self.model.get_parameter(self.parameter(site, role)).detach())
