"""The schema of `kvfold.json`: every field that kvfold reads is checked once, when the file is opened."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import Shape
from kvfold.disk.output import MANIFEST
from kvfold.errors import CheckpointError, UnsupportedModel
from kvfold.families import family_of
from kvfold.inputs import LARGEST, load_json

FORMAT = 1  # of kvfold.json

Count = Annotated[int, pydantic.Field(ge=0, le=LARGEST)]
Number = Annotated[float, pydantic.Field(ge=-1e100, le=1e100)]  # a figure can draw it


class Part(pydantic.BaseModel):
    """Part of a schema: keys without a field are not read, and may hold anything."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _Root(Part):
    hash: str
    name: str
    config: dict[str, Any] | None = None
    parameters: Count | None = None


class _Site(Part):
    planes: Annotated[list[list[Count]], pydantic.Field(min_length=1)] | None = None
    lossless: list[Any] | None = None
    lost: Any = None  # defined by the method: a number, a list or a mapping

    @pydantic.model_validator(mode="after")
    def _check(self) -> _Site:
        if "planes" in self.model_fields_set and (self.planes is None or type(self.lost) not in (int, float)):
            raise ValueError("planes need a number in `lost`")
        if self.lossless and not isinstance(self.lost, list):
            raise ValueError("lossless groups need a list in `lost`")
        return self


class _Heads(Part):
    kv_heads: Any
    kl: Number


class _Layers(Part):
    layout: Any
    kl: Number


class _Found(Part):
    budget: Number | None = None
    mix: _Heads | None = None
    uniform: _Heads | None = None
    chosen: _Layers | None = None
    alike: _Layers | None = None
    sites: dict[str, _Site] | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> _Found:
        for choice, other in (("mix", "uniform"), ("chosen", "alike")):
            if choice in self.model_fields_set and None in (getattr(self, choice), getattr(self, other), self.budget):
                raise ValueError(f"{choice} needs {other} and budget")
        return self


class _Settings(Part):
    method: str | None = None
    sequence_length: Annotated[int, pydantic.Field(ge=1)] | None = None


class Step(Part):
    """One stage that a checkpoint went through, as records keep it."""

    stage: str
    settings: _Settings | None = None
    tokens: Count | None = None
    seed: int | None = None
    found: _Found | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> Step:
        if self.stage == "convert" and (self.settings is None or self.settings.method is None):
            raise ValueError("a conversion needs its method in settings")
        return self


class _LineageStep(Step):
    settings: _Settings
    source: str | None
    calibration: str | None = None
    wall_seconds: Number | None = None
    versions: dict[str, Any] = {}


class _Lineage(Part):
    inputs: str
    hash: str
    root: _Root
    steps: list[_LineageStep]
    tokenizer: str | None = None


def fault(schema: type[Part], value: object) -> str | None:
    """The first place where a value does not fit a schema, and why; None if it fits."""
    try:
        schema.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {reprlib.repr(first['input'])}"
    return None


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage of a checkpoint; None without one. Raises CheckpointError for a damaged one or a newer format."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    lineage = load_json(path)
    found = lineage.get("format") if isinstance(lineage, dict) else None
    if type(found) is int and found > FORMAT:
        raise CheckpointError(
            f"is a lineage of format {found}, and this kvfold reads format {FORMAT}",
            where=path,
            next="use a newer kvfold, or delete it to start a new lineage",
        )
    if type(found) is not int or found != FORMAT:
        raise _damaged(path, f"is not a lineage of format {FORMAT}")
    if wrong := fault(_Lineage, lineage):
        raise _damaged(path, wrong)
    config = lineage["root"].get("config")
    try:
        if config is not None:
            family_of(config, f"{path}: root.config").shape(config)
    except UnsupportedModel as failure:
        raise _damaged(path, f"root.config: {failure.what}", got=failure.got, allowed=failure.allowed) from failure
    return dict(lineage)


def rooted(shape: Shape, lineage: Mapping[str, Any] | None) -> Shape:
    """The shape of a checkpoint, with the cached elements per token of the root teacher of its lineage."""
    root = root_shape(lineage)
    return shape if root is None else replace(shape, root_elements=grouped_cache(root).elements(1, 1))


def root_shape(lineage: Mapping[str, Any] | None) -> Shape | None:
    """The shape of the root teacher of a lineage; None without one, or if it does not hold its config."""
    config = lineage["root"].get("config") if lineage else None
    return family_of(config).shape(config) if config else None


def _damaged(path: Path, what: str, **more: Any) -> CheckpointError:
    return CheckpointError(what, where=path, next="restore it, or delete it to start a new one", **more)
