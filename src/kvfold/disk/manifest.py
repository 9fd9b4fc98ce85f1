"""The schema of `kvfold.json`: every field that kvfold uses is checked once, when the file is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic

from kvfold.disk.output import MANIFEST
from kvfold.errors import CheckpointError, UnsupportedModel
from kvfold.families import family_of
from kvfold.inputs import first_fault, load_json

FORMAT = 1  # of kvfold.json

_Count = Annotated[int, pydantic.Field(ge=0)]
_Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Root(_Part):
    hash: str
    name: str
    config: dict[str, Any] | None = None
    parameters: _Count | None = None


class _Site(_Part):
    planes: Annotated[list[list[int]], pydantic.Field(min_length=1)] | None = None
    lossless: list[Any] | None = None
    lost: Any = None  # a number, a list or a mapping: the method decides

    @pydantic.model_validator(mode="after")
    def _names_its_loss(self) -> Self:
        measured = type(self.lost) in (int, float) and self.planes is not None
        if ("planes" in self.model_fields_set and not measured) or (self.lossless and not isinstance(self.lost, list)):
            raise ValueError("does not name what was lost")
        return self


class _Heads(_Part):
    kv_heads: Any
    kl: _Number


class _Layers(_Part):
    layout: Any
    kl: _Number


class _Found(_Part):
    budget: _Number | None = None
    mix: _Heads | None = None
    uniform: _Heads | None = None
    chosen: _Layers | None = None
    alike: _Layers | None = None
    sites: dict[str, _Site] | None = None

    @pydantic.model_validator(mode="after")
    def _compares(self) -> Self:
        for first, second in (("mix", "uniform"), ("chosen", "alike")):
            pair = getattr(self, first), getattr(self, second), self.budget
            if first in self.model_fields_set and None in pair:
                raise ValueError(f"has {first} without {second} and budget")
        return self


class _Settings(_Part):
    method: Any = None
    sequence_length: Annotated[int, pydantic.Field(ge=1)] | None = None


class _Step(_Part):
    stage: str
    settings: _Settings
    source: str | None
    tokens: _Count | None = None
    seed: int | None = None
    calibration: str | None = None
    wall_seconds: _Number | None = None
    versions: dict[str, Any] = {}
    found: _Found | None = None

    @pydantic.model_validator(mode="after")
    def _names_its_method(self) -> Self:
        if self.stage == "convert" and not isinstance(self.settings.method, str):
            raise ValueError("is a conversion without a method")
        return self


class _Lineage(_Part):
    inputs: str
    hash: str | None
    root: _Root
    steps: list[_Step]
    tokenizer: str | None = None


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage of a checkpoint, or None if it has none.

    Raises CheckpointError for one that is damaged or of a newer format.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    lineage = load_json(path)
    found = lineage.get("format") if isinstance(lineage, dict) else None
    if type(found) is int and found > FORMAT:
        what = f"is a lineage of format {found}, and this kvfold reads format {FORMAT}"
        raise CheckpointError(what, where=path, next="use a newer kvfold, or delete it to start a new lineage")
    if type(found) is not int or found != FORMAT:
        raise _damaged(path, f"is not a lineage of format {FORMAT}")
    try:
        _Lineage.model_validate(lineage)
    except pydantic.ValidationError as failure:
        place, problem, got = first_fault(failure)
        raise _damaged(path, f"{place}: {problem}", got=got) from failure
    config = lineage["root"].get("config")
    try:
        if config is not None:
            family_of(config, f"{path}: root.config").shape(config)
    except UnsupportedModel as failure:
        raise _damaged(path, f"root.config: {failure.what}", got=failure.got, allowed=failure.allowed) from failure
    return dict(lineage)


def _damaged(path: Path, what: str, **more: Any) -> CheckpointError:
    return CheckpointError(what, where=path, next="restore it, or delete it to start a new one", **more)
