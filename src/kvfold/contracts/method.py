"""The contract of a method: a class that says how an attention is made cheaper."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_origin

from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.requests import Answers, Question
from kvfold.contracts.site import Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn


class Config(Protocol):
    """The settings of a method: a frozen dataclass, whose fields become flags."""

    def check(self, shape: Shape) -> None:
        """Refuse settings that this shape cannot have, at plan time: SettingError with the range and the remedy."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Student:
    """What a conversion will produce: the new shape, and what `config.json` must say beyond the head counts."""

    shape: Shape
    fields: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None  # None: the source's own architecture, which stock engines load


class Method(Generic[C]):
    """A way to make attention cheaper. A subclass defines `Config`, `student`, `convert` and `lossless`, and
    `example` where `lossless` changes nothing.

    Everything that a caller may ask of a method is here, with a default. An instance holds no state.
    """

    Config: type[C]

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        for base in vars(cls).get("__orig_bases__", ()):
            if "Config" not in vars(cls) and get_origin(base) is Method:
                (cls.Config,) = get_args(base)

    without_text: ClassVar[Mapping[str, Any]] = {}
    """Settings that replace defaults when no calibration text is given: what weights alone can do."""

    published: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Settings of the starts that papers publish. Reports compare the others with these."""

    @property
    def about(self) -> str:
        """The first line of the docstring of the method's file."""
        return (sys.modules[type(self).__module__].__doc__ or "").strip().partition("\n")[0]

    # --- what comes out, from the shape alone

    def student(self, config: C, shape: Shape) -> Student:
        """The student's shape, known before any tensor is read."""
        raise NotImplementedError

    def cache_spec(self, config: C, shape: Shape) -> CacheSpec:
        """What the student caches, to the byte."""
        return grouped_cache(self.student(config, shape).shape)

    def groups(self, config: C, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """The sites that are converted together, in order. A site in no group is copied as it is."""
        return [(site,) for site in shape.sites if site.kind != "encoder"]

    def notes(self, config: C, shape: Shape) -> Sequence[str]:
        """Warnings for the plan."""
        return ()

    def lossless(self, shape: Shape) -> C:
        """Settings at which the student equals the teacher."""
        raise NotImplementedError

    def example(self, shape: Shape) -> C:
        """Small settings that change this shape: what the contract tests fold with."""
        return self.lossless(shape)

    # --- calibration

    def needs(self, config: C, shape: Shape) -> Sequence[Question]:
        """The requests that calibration must answer."""
        return ()

    def reckon(self, site: Site, tensors: SiteTensors, answers: Answers, config: C) -> Mapping[str, Tensor]:
        """The answer to a `Reckoned` request: what the method computes for a site before `resolve`."""
        raise NotImplementedError

    def with_heads(self, config: C, heads: int) -> C:
        """Settings under which one site is folded to `heads` key/value heads, to answer `FoldedKL`."""
        raise NotImplementedError

    def alone(self, config: C, shape: Shape, sites: Sequence[Site]) -> C:
        """Settings under which only these sites are converted, to answer `ConvertedKL`."""
        raise NotImplementedError

    def resolve(self, config: C, shape: Shape, answers: Answers) -> C:
        """Settings with every `auto` and ratio replaced by explicit numbers. They are hashed and saved."""
        return config

    def found(self, config: C, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """The measurements by which `resolve` chose, for kvfold.json."""
        return {}

    # --- conversion and what follows

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: C) -> Mapping[Site, Roles]:
        """The new roles of one group of sites: pure, deterministic, float64 inside."""
        raise NotImplementedError

    def fold(
        self, group: Mapping[Site, SiteTensors], answers: Answers, config: C
    ) -> tuple[Mapping[Site, Roles], Mapping[Site, Any]]:
        """What `convert` returns, and measurements of each site for kvfold.json."""
        return self.convert(group, answers, config), {}

    def repairs(self, config: C) -> Sequence[str]:
        """The roles that are refitted after conversion, unless the user says otherwise."""
        return ()

    def stages(self, config: C) -> Sequence[Stage]:
        """The stages of uptraining. Empty: one stage on every parameter, with the user's losses."""
        return ()

    def end(self, finish: str, student: nn.Module, config: C) -> None:
        """Change the model at the end of a stage that names a `finish`."""
