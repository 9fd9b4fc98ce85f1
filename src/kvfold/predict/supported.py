"""What kvfold takes: each family with the methods that convert it, the student, and the engines that load that.

Everything is computed from the small config.json that a family has for tests, as `plan` computes it for a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvfold import methods
from kvfold.contracts import runtimes
from kvfold.contracts.family import Family
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.runtimes import OWN
from kvfold.contracts.site import Shape
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.predict.engines import NOT_RUN, engines
from kvfold.predict.student_config import Draft, draft, student_config

COLUMNS = ("architecture", "checkpoints", "methods", "student with fewer heads", "heads by layer", "engines")


@dataclass(frozen=True)
class Supported:
    """A family, and what becomes of its checkpoints."""

    model_types: tuple[str, ...]  # of stock transformers
    about: str
    examples: tuple[str, ...]  # names of checkpoints on the Hub
    methods: tuple[str, ...]
    student: str  # the class of a student of gqa with one number of heads
    by_layer: bool  # whether layers may differ in their heads
    engines: tuple[str, ...]  # that load such a student

    @property
    def row(self) -> tuple[str, ...]:
        """One line of the table, in the order of `COLUMNS`."""
        lists = (self.model_types, self.examples, self.methods)
        return (*map(", ".join, lists), self.student, "yes" if self.by_layer else "no", ", ".join(self.engines))


def supported() -> list[Supported]:
    """Every family that can be converted, in order of names: not those in which students alone are written."""
    return [_of(family) for family in all_families().values() if family.adopt is None]


def _of(family: Family) -> Supported:
    found = {name: each for name in methods.all_methods() if (each := _draft(family, name)) is not None}
    folded = found["gqa"]
    made = student_config(folded.config, folded.family, folded.shape, folded.student, method="gqa")
    loaded = [each for each in engines(folded.student, folded.config) if each.loads]
    return Supported(
        tuple(name for name in family.model_types if not name.startswith(OWN)),
        family.about,
        family.examples,
        tuple(name for name in found if name != "identity"),
        made["architectures"][0],
        _by_layer(folded.shape),
        tuple(f"{each.name} (not run)" if each.checked.startswith(NOT_RUN) else each.name for each in loaded),
    )


def _by_layer(shape: Shape) -> bool:
    """Whether there are classes for a student whose layers differ in their heads."""
    site = shape.cached_sites[0]
    try:
        runtimes.check(shape.with_sites({site: replace(shape.sites[site], num_key_value_heads=1)}), "gqa")
    except UnsupportedModel:
        return False
    return True


def _draft(family: Family, name: str) -> Draft | None:
    """The student of a method's example settings; None where the method refuses the family."""
    config = family.tiny()
    shape, method = family.shape(config), methods.get(name)
    try:
        methods.check(name, method.lossless(shape), shape)
        made = draft(config, family, shape, name, spelled(method.example(shape)))
        student_config(made.config, made.family, made.shape, made.student, method=name)
    except (SettingError, UnsupportedModel):
        return None
    return made
