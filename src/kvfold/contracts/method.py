"""The contract of a method: a class that makes an attention cheaper."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_origin

from kvfold.contracts.cache import CacheSpec, grouped_cache, root_elements
from kvfold.contracts.requests import Answers, Question
from kvfold.contracts.site import Attention, Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import Learner, Stage
from kvfold.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor


class Config(Protocol):
    """The settings of a method: a frozen dataclass, whose fields become flags."""

    def check(self, shape: Shape) -> None:
        """Refuse settings that this shape cannot have, at plan time: SettingError with the range and the remedy."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Student:
    """The result of a conversion: its shape, and the fields of `config.json` that follow from nothing else."""

    shape: Shape
    fields: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None  # None: the source's own architecture, which stock engines load


Folded = tuple[Mapping[Site, Roles], Mapping[Site, Any]]
"""The new roles of a group of sites, and measurements of each site for kvfold.json."""


@dataclass(frozen=True)
class Trained:
    """The result of a method's stages: its shape, the new roles, and measurements for kvfold.json."""

    shape: Shape
    roles: Mapping[Site, Roles]
    found: Mapping[str, Any] = field(default_factory=dict)


class Method(Generic[C]):
    """A way to make attention cheaper. A subclass defines `student`, `convert` (or `fold`) and `lossless`, and
    `example` where `lossless` changes nothing.

    All that a caller uses of a method is here, with a default. An instance holds no state.
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

    def filled(self, config: C, shape: Shape) -> C:
        """Settings with the sizes that were left out, where the method has defaults for them."""
        return config

    def student(self, config: C, shape: Shape) -> Student:
        """The student's shape, known before any tensor is read."""
        raise NotImplementedError

    def cache_spec(self, config: C, shape: Shape) -> CacheSpec:
        """What the student caches, to the byte."""
        return grouped_cache(self.student(config, shape).shape)

    def groups(self, config: C, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """The sites that are converted together, in order. A site in no group is copied as it is."""
        return [(site,) for site in shape.cached_sites]

    def notes(self, config: C, shape: Shape) -> Sequence[str]:
        """Warnings for the plan."""
        return ()

    def lossless(self, shape: Shape) -> C:
        """Settings at which the student equals the teacher."""
        raise NotImplementedError

    def example(self, shape: Shape) -> C:
        """Small settings that change this shape. The contract tests convert with them."""
        return self.lossless(shape)

    def decoder_layers(self, config: C) -> int | None:
        """The decoder layers that the source has when it is converted, if more than its own.

        Shapes, tensors and answers of calibration are then those of the deeper model, which computes the same.
        """
        return None

    # --- calibration

    def needs(self, config: C, shape: Shape) -> Sequence[Question]:
        """The requests that calibration must answer."""
        return ()

    def compute(self, site: Site, tensors: SiteTensors, answers: Answers, config: C) -> Mapping[str, Tensor]:
        """The answer to `Computed(site)`: what the method computes for a site before `resolve`."""
        raise NotImplementedError

    def with_heads(self, config: C, heads: int) -> C:
        """Settings with `heads` key/value heads at every site. FoldedKL is measured under them, site by site."""
        raise NotImplementedError

    def alone(self, config: C, shape: Shape, sites: Sequence[Site]) -> C:
        """Settings that convert these sites together and no others. ConvertedKL is measured under them."""
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
        return self.fold(group, answers, config)[0]

    def fold(self, group: Mapping[Site, SiteTensors], answers: Answers, config: C) -> Folded:
        """The roles of `convert`, and measurements of each site for kvfold.json. Define it in place of `convert`."""
        return self.convert(group, answers, config), {}

    def repairs(self, config: C) -> Sequence[str]:
        """The roles that are refitted after conversion, unless the user names others."""
        return ()

    def stages(self, config: C) -> Sequence[Stage]:
        """The stages of uptraining. Empty: one stage on every parameter, with the user's losses."""
        return ()

    def final(self, config: C, shape: Shape) -> Shape:
        """The student's shape after the stages, as far as it is known before them."""
        return self.student(config, shape).shape

    def begin(self, student: Learner, config: C) -> None:
        """Change the model before the first stage. Its weights are not read yet."""

    def during(self, stage: str, student: Learner, share: float, config: C) -> Tensor | None:
        """Set what changes while a `scheduled` stage runs, and return a term that is added to its loss.

        `share`, in [0, 1), is the part of the stage's steps that is done. What it sets is a function of `share`, so
        that a resumed run continues alike.
        """
        return None

    def settled(self, stage: str, student: Learner, config: C) -> bool:
        """Whether a `scheduled` stage is over before its share of the steps, which the stage after it then gets.

        It is asked before each step, on all ranks, and decides by weights and buffers alone, so that a resumed run
        ends the stage at the same step.
        """
        return False

    def end(self, finish: str, student: Learner, config: C) -> None:
        """Change the model at the end of a stage that names a `finish`.

        A resumed run calls it before the saved weights and buffers are read: what it decides must lie in these.
        """

    def trained(self, student: Learner, config: C) -> Trained | None:
        """The student that the stages made, if its shape is not that of the conversion. All ranks call it."""
        return None


Limit = tuple[str, Callable[[Site, Attention], bool]]
"""A fact of a site that a method does not support: the reason, and whether the site has it."""


def refuse(shape: Shape, where: str, limits: Sequence[Limit], *, next: str = "choose gqa") -> None:
    """Raise SettingError for the first site that a limit holds for."""
    for site, attention in shape.sites.items():
        for reason, holds in limits:
            if holds(site, attention):
                raise SettingError(f"{site}: {reason}", where=where, next=next)


def refuse_mixed_heads(shape: Shape, where: str) -> None:
    """Raise SettingError for a shape whose sites differ in their key/value heads."""
    heads = {attention.num_key_value_heads for attention in shape.sites.values()}
    if len(heads) > 1:
        raise SettingError(
            "layers differ in their key/value heads",
            where=where,
            got=f"{min(heads)} to {max(heads)}",
            next="convert a checkpoint with one number for all layers",
        )


def check_ratio(shape: Shape, where: str, ratio: float, chosen: Mapping[str, object], needed: int, least: str) -> None:
    """Raise SettingError for a ratio that cannot be the size of a student's cache.

    `chosen` are the settings that a ratio stands for, which must be None beside it. `needed` elements per token are the
    smallest cache, and `least` says in words what it holds.
    """
    for name, value in chosen.items():
        if value is not None:
            raise SettingError(f"ratio {ratio:g} chooses {name}", where=where, next="leave out one of them")
    whole = root_elements(shape)
    if not needed / whole <= ratio <= 1:
        raise SettingError(
            "ratio is out of range",
            where=where,
            got=f"ratio {ratio:g}",
            allowed=f"{-(-needed * 10_000 // whole) / 10_000:g} ({least}) to 1",
        )


def note_normed_keys(shape: Shape, init: str) -> list[str]:
    """The note on merging keys that are normed before the rotation, for a shape that has them."""
    if all(attention.norms != "pre_rope" for attention in shape.sites.values()):
        return []
    return [
        f"init {init}: keys are normed before they are rotated, so merged keys are matched by a rotation of each plane "
        "and no scale; values, o and repair are as in other models"
    ]
