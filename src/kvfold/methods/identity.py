"""identity: the control. Nothing is converted.

The student is the teacher: `q, k, v, o` are copied, the cache keeps `2 G E` elements per token and layer, and every
setting is lossless. Uptrained on the same tokens as a student, it shows what more training alone gains. A copy of a
student with `--repair o,down` is refitted to the root teacher, such as heads that `dha` has handed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers
from kvfold.contracts.site import Roles, Shape, Site, SiteTensors


@dataclass(frozen=True)
class Config:
    """No settings."""

    def check(self, shape: Shape) -> None:
        """Accept every shape."""


class Identity(Method[Config]):
    """The control: nothing is converted."""

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """No site: all are copied."""
        return ()

    def student(self, config: Config, shape: Shape) -> Student:
        """The teacher's own shape."""
        return Student(shape)

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """The roles as they are."""
        return {site: tensors.roles for site, tensors in group.items()}

    def lossless(self, shape: Shape) -> Config:
        """The only setting there is."""
        return Config()


METHOD = Identity()
