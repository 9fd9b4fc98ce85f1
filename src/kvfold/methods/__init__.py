"""Methods: how an attention is made cheaper. One file each, discovered by being here.

A method is a module of this package (or one handed to `register`, as plug-ins and tests do) that satisfies
`Method`. CONTRIBUTING.md walks through adding one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from kvfold.errors import SettingError, did_you_mean
from kvfold.shape import Answers, CacheSpec, Question, Roles, Shape, Site, SiteTensors, Stage

if TYPE_CHECKING:
    from torch import nn


class Config(Protocol):
    """Settings of a method: a frozen dataclass, whose fields become flags."""

    def check(self, shape: Shape) -> None:
        """Refuse, at plan time, what cannot be: SettingError with the range and the remedy."""


@dataclass(frozen=True)
class Student:
    """What a conversion will produce: the new shape, and what `config.json` must say beyond the head counts."""

    shape: Shape
    fields: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None  # None: the source's own architecture, which stock engines load


class Method(Protocol):
    """The contract of a method file. Sites come in groups: most methods take one site at a time.

    A method may also have `repairs(config)`, the roles that are refitted after it; `notes(config, shape)`, lines for a
    plan; `with_heads(config, heads)`, which FoldedKL needs, and `alone(config, shape, sites)`, which ConvertedKL does;
    `reckon(site, tensors, answers, config)`, the answer to Reckoned; `PUBLISHED`, settings of the starts that papers
    have, against which reports hold the others. Two more speak in kvfold.json: `found(config, shape, answers)`, on what
    grounds `resolve` chose; and `fold(group, answers, config)`, which is called instead of `convert` and returns the
    same roles, and what came to light of each site on the way.
    """

    Config: type[Any]

    def needs(self, config: Any, shape: Shape) -> Sequence[Question]:
        """What calibration must answer; empty when the weights say enough."""

    def resolve(self, config: Any, shape: Shape, answers: Answers) -> Any:
        """A `Config` in which nothing is left to choose: it is hashed and saved."""

    def groups(self, config: Any, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """The sites that must be converted together, in order; a site left out is copied as it is."""

    def student(self, config: Any, shape: Shape) -> Student:
        """The shape that comes out, known before any tensor is read."""

    def cache_spec(self, config: Any, shape: Shape) -> CacheSpec:
        """What the student will cache, to the byte."""

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Any) -> Mapping[Site, Roles]:
        """Tensors of one group of sites -> their new roles: pure, deterministic, float64 inside."""

    def stages(self, config: Any) -> Sequence[Stage]:
        """What uptraining does for this method; empty: what the user asked for, on every parameter."""

    def end(self, finish: str, student: nn.Module, config: Any) -> None:
        """Called when a stage that names a `finish` is over: fuse, delete a branch, merge."""

    def lossless(self, shape: Shape) -> Any:
        """A `Config` at which the student must equal the teacher."""


_PLUGINS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Add a method that does not live in this package."""
    _PLUGINS[name] = method


@cache
def _builtin() -> dict[str, Method]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: cast(Method, importlib.import_module(f"{__name__}.{name}")) for name in names}


def all_methods() -> dict[str, Method]:
    """Every method by name."""
    return {**_builtin(), **_PLUGINS}


def get(name: str) -> Method:
    """The method of this name. Raises SettingError, with the nearest name."""
    methods = all_methods()
    if name not in methods:
        raise SettingError(
            f"method {name!r} is not known", allowed=", ".join(methods), next=did_you_mean(name, methods)
        )
    return methods[name]


def check(name: str, config: Any, shape: Shape) -> None:
    """Refuse a source that this method cannot take with these settings.

    Raises SettingError, also for sites whose keys and values another method has replaced already.
    """
    for site in (site for group in get(name).groups(config, shape) for site in group if site in shape.sites):
        if shape.sites[site].kept is not None:
            raise SettingError(
                f"{site} keeps {' and '.join(shape.sites[site].cached)} already, and no keys and values of heads",
                where=name,
                next="convert the checkpoint that it was made from",
            )
    config.check(shape)
