"""identity: the control. Nothing changes, so whatever moves a number is not the method.

The student is the teacher: `q, k, v, o` are copied, the cache keeps `2 G E` elements per token and layer, and
every setting is lossless. Uptrained on the same tokens it is the control that every other method is held
against: what more training alone would have brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.methods import Student
from kvfold.shape import Answers, CacheSpec, Request, Roles, Shape, Site, SiteTensors, Stage, grouped_cache

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Config:
    """No settings."""

    def check(self, shape: Shape) -> None:
        """Accept every shape."""


def needs(config: Config, shape: Shape) -> Sequence[Request]:
    """Ask nothing."""
    return ()


def resolve(config: Config, shape: Shape, answers: Answers) -> Config:
    """Return the settings as they are."""
    return config


def groups(config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
    """Convert no site: all are copied."""
    return ()


def student(config: Config, shape: Shape) -> Student:
    """Return the teacher's own shape."""
    return Student(shape)


def cache_spec(config: Config, shape: Shape) -> CacheSpec:
    """Return the teacher's own cache."""
    return grouped_cache(shape)


def convert(group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
    """Return the roles as they are."""
    return {site: tensors.roles for site, tensors in group.items()}


def stages(config: Config) -> Sequence[Stage]:
    """Leave uptraining to the user."""
    return ()


def end(finish: str, student: nn.Module, config: Config) -> None:
    """Do nothing: no stage of this method ends in a change."""


def lossless(shape: Shape) -> Config:
    """Return the only setting there is."""
    return Config()
