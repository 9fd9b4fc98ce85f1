"""The config.json of a student: the source's own with other fields, read back before a tensor is.

The fields that a family writes for a student must describe that student when they are read, and name a class that
exists. Otherwise the student would not load, or load as another model. `plan` and `convert` make the config here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvfold import methods
from kvfold.contracts.family import Family, with_fields
from kvfold.contracts.method import Student
from kvfold.contracts.site import Shape
from kvfold.disk.sidecar import without_code
from kvfold.errors import UnsupportedModel
from kvfold.families import source_family


def student_config(
    config: Mapping[str, Any], family: Family, shape: Shape, student: Student, *, method: str, dtype: str = "source"
) -> dict[str, Any]:
    """The config.json of the student that `method` makes of a source.

    It is the source's except for the fields that the method changes or drops, and `auto_map`. Raises UnsupportedModel
    if no architecture of the family expresses the student.
    """
    made = _changed(config, family, shape, student, method)
    _check_round_trip(made, family, student, method)
    if dtype != "source":
        names = ("dtype", "torch_dtype")
        changed = {key: dtype for key in names if key in config} or {"dtype": dtype}
        parts = {part: value for part, value in config.items() if isinstance(value, Mapping)}
        changed |= {f"{part}.{key}": dtype for part, value in parts.items() for key in names if key in value}
        made = with_fields(made, changed)
    return made


def rehoused(
    config: Mapping[str, Any], family: Family, shape: Shape, method: str, settings: Any
) -> Mapping[str, Any] | None:
    """The source's config.json in the architecture that its student needs, where that is another; else None.

    The method checks its settings there. Raises UnsupportedModel for a source whose function has no form there, and as
    `methods.check` does.
    """
    other, refused, there = None, None, shape
    if family.rehouse is not None:
        try:
            other = family.rehouse(config).config
            there = dataclasses.replace(source_family(other).shape(other), root_elements=shape.root_elements)
        except UnsupportedModel as error:
            refused = error
    methods.check(method, settings, there)
    if methods.get(method).student(settings, there).shape == there:
        return None
    if refused is not None:
        raise refused
    return other


def _changed(config: Mapping[str, Any], family: Family, shape: Shape, student: Student, method: str) -> dict[str, Any]:
    """The source's config.json with the student's fields."""
    try:
        before, after = family.fields(shape), family.fields(student.shape) | dict(student.fields)
    except (KeyError, AttributeError, TypeError) as error:  # a shape that the family cannot express
        raise _inexpressible(family, method, str(student.model_type or "no model type of it")) from error
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    if student.model_type:
        changed["model_type"] = student.model_type
    if config.get("architectures") and config["architectures"] != after.get("architectures"):
        changed["architectures"] = after["architectures"]  # also where the source has an older name for it
    kept = {key: value for key, value in config.items() if key in after or key not in before}
    return without_code(with_fields(kept, changed))


def _check_round_trip(made: Mapping[str, Any], family: Family, student: Student, method: str) -> None:
    """Raise UnsupportedModel if a student's config.json describes another model, or names no known class."""
    model_type, named = str(made["model_type"]), made.get("architectures") or []
    if model_type not in family.architectures or any(name != family.architectures[model_type] for name in named):
        raise _inexpressible(family, method, f"{model_type}, {', '.join(map(str, named))}")
    try:
        found = source_family(made).shape(made)  # as it will be opened
    except (UnsupportedModel, KeyError, TypeError, ValueError) as error:
        raise _inexpressible(family, method, f"{model_type}: {error}") from error
    if dataclasses.replace(found, dtype=student.shape.dtype) != student.shape:
        raise _inexpressible(family, method, f"{model_type}, which describes another model")


def _inexpressible(family: Family, method: str, got: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{method}: no architecture of family {family.name} expresses this student",
        got=got,
        allowed=", ".join(family.architectures),
        next="choose other settings or another method",
    )
