"""The config.json of a student: the source's own with other fields, read back before a tensor is.

The fields that a family writes for a student must describe that student when they are read, and name a class that
exists. Otherwise the student would not load, or load as another model. `plan` and `convert` make the config here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvfold import methods
from kvfold.contracts.family import Family, with_fields, without_code
from kvfold.contracts.method import Method, Student
from kvfold.contracts.site import Shape
from kvfold.disk.deepened import deeper
from kvfold.errors import UnsupportedModel
from kvfold.families import all_families, source_family
from kvfold.settings import decode


@dataclass(frozen=True)
class Draft:
    """A source with the architecture and layers that its student needs, a method with its settings, and the student."""

    config: Mapping[str, Any]
    family: Family
    shape: Shape
    method: Method[Any]
    settings: Any
    student: Student


def draft(config: Mapping[str, Any], family: Family, shape: Shape, method: str, given: Mapping[str, Any]) -> Draft:
    """Decode and check the settings of a method for a source, and lay out the student.

    Raises SettingError for settings that do not fit, and UnsupportedModel for a source whose function has no form in
    the architecture that its student needs.
    """
    chosen = methods.get(method)
    settings = decode(chosen.Config, given, method)
    layers = chosen.decoder_layers(settings)
    if layers is not None and layers != shape.num_layers:
        config = deeper(config, family, shape, layers, method)
        shape = replace(family.shape(config), root_elements=shape.root_elements)
    other, there, refused = config, shape, None
    if family.rehouse is not None:
        try:
            other = family.rehouse(config).config
            there = replace(source_family(other).shape(other), root_elements=shape.root_elements)
        except UnsupportedModel as error:
            refused = error
    settings = chosen.filled(settings, there)
    methods.check(method, settings, there)
    student = chosen.student(settings, there)
    if student.shape == there:  # a copy, which needs no other architecture
        return Draft(config, family, shape, chosen, settings, chosen.student(settings, shape))
    if refused is not None:
        raise refused
    return Draft(other, source_family(other), there, chosen, settings, student)


def student_config(
    config: Mapping[str, Any], family: Family, shape: Shape, student: Student, *, method: str, dtype: str = "source"
) -> dict[str, Any]:
    """The config.json of the student that `method` makes of a source.

    It is the source's except for the fields that the method changes or drops, and `auto_map`. Raises UnsupportedModel
    if no architecture of the family expresses the student.
    """
    made: dict[str, Any] = {}
    target, before = student_family(family, student), {}
    try:
        if target is not family and target.adopt is not None:
            config = target.adopt(config)
        else:
            before = family.fields(shape)
        made = _changed(config, before, target.fields(student.shape) | dict(student.fields), student.model_type, dtype)
    except (KeyError, AttributeError, TypeError):  # a shape that the family cannot express
        fault: str | None = str(student.model_type or "no model type of it")
    else:
        fault = _fault(made, target, student)
    if fault:
        raise UnsupportedModel(
            f"{method}: no architecture of family {target.name} expresses this student",
            got=fault,
            allowed=", ".join(target.architectures),
            next="choose other settings or another method",
        )
    return made


def student_family(family: Family, student: Student) -> Family:
    """The family of the student of a source of `family`: its own, unless the student is of another architecture."""
    return family if student.shape.family == family.name else all_families()[student.shape.family]


def _changed(
    config: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    model_type: str | None,
    dtype: str,
) -> dict[str, Any]:
    """A config.json with the student's fields, `after`, in place of the source's, `before`."""
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    if model_type:
        changed["model_type"] = model_type
    if config.get("architectures") and config["architectures"] != after.get("architectures"):
        changed["architectures"] = after["architectures"]  # also where the source has an older name for it
    if dtype != "source":
        names = ("dtype", "torch_dtype")
        changed |= {key: dtype for key in names if key in config} or {"dtype": dtype}
        parts = {part: value for part, value in config.items() if isinstance(value, Mapping)}
        changed |= {f"{part}.{key}": dtype for part, value in parts.items() for key in names if key in value}
    kept = {key: value for key, value in config.items() if key in after or key not in before}
    return without_code(with_fields(kept, changed))


def _fault(made: Mapping[str, Any], family: Family, student: Student) -> str | None:
    """What is wrong with a student's config.json that describes another model, or names no known class; else None."""
    model_type, named = str(made["model_type"]), made.get("architectures") or []
    if model_type not in family.architectures or any(name != family.architectures[model_type] for name in named):
        return f"{model_type}, {', '.join(map(str, named))}"
    try:
        found = source_family(made).shape(made)  # as it will be opened
    except (UnsupportedModel, KeyError, TypeError, ValueError) as error:
        return f"{model_type}: {error}"
    same = replace(found, dtype=student.shape.dtype) == student.shape
    return None if same else f"{model_type}, which describes another model"
