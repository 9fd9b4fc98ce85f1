"""identity: the control. Nothing changes, so whatever moves a number is not the method.

The student is the teacher: `q, k, v, o` are copied, the cache keeps `2 G E` elements per token and layer, and
every setting is lossless. Uptrained on the same tokens it is the control that every other method is held
against: what more training alone would have brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers
from kvfold.contracts.site import Roles, Shape, Site, SiteTensors

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Config:
    """No settings."""

    def check(self, shape: Shape) -> None:
        """Accept every shape."""


class Identity(Method[Config]):
    """The control: nothing is converted."""

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """Convert no site: all are copied."""
        return ()

    def student(self, config: Config, shape: Shape) -> Student:
        """Return the teacher's own shape."""
        return Student(shape)

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Return the roles as they are."""
        return {site: tensors.roles for site, tensors in group.items()}

    def lossless(self, shape: Shape) -> Config:
        """Return the only setting there is."""
        return Config()


METHOD = Identity()
