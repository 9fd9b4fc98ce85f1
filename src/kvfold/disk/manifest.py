"""`kvfold.json` as it is read: every field that anything looks at is checked once, when the file is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import pydantic

from kvfold.disk.output import MANIFEST
from kvfold.errors import CheckpointError, UnsupportedModel
from kvfold.families import family_of
from kvfold.inputs import load_json

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
    lost: Any = None  # what it is, its method says: a number, a list, or a mapping


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


class _Step(_Part):
    stage: str
    settings: dict[str, Any]
    source: str | None
    tokens: _Count | None = None
    seed: int | None = None
    calibration: str | None = None
    wall_seconds: _Number | None = None
    versions: dict[str, Any] = {}
    found: _Found | None = None


class _Lineage(_Part):
    inputs: str
    hash: str | None
    root: _Root
    steps: list[_Step]
    tokenizer: str | None = None


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The lineage of a checkpoint, None where it has none.

    Raises CheckpointError for one that is damaged, or of a newer format.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    lineage = load_json(path)
    found = lineage.get("format") if isinstance(lineage, dict) else None
    if isinstance(found, int) and not isinstance(found, bool) and found > FORMAT:
        raise CheckpointError(
            f"is a lineage of format {found}, and this kvfold reads format {FORMAT}",
            where=path,
            next="use a newer kvfold, or delete it to start a new lineage",
        )
    if not isinstance(lineage, dict) or found != FORMAT or isinstance(found, bool):
        raise _damaged(path, f"is not a lineage of format {FORMAT}")
    try:
        _Lineage.model_validate(lineage)
    except pydantic.ValidationError as failure:
        first = failure.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(path, f"{place}: {first['msg']}", got=repr(first["input"])) from failure
    _check_steps(path, lineage)
    config = lineage["root"].get("config")
    try:
        if config is not None:
            family_of(config, f"{path}: root.config").shape(config)
    except UnsupportedModel as failure:
        raise _damaged(path, f"root.config: {failure.what}", got=failure.got, allowed=failure.allowed) from failure
    return dict(lineage)


def _check_steps(path: Path, lineage: dict[str, Any]) -> None:
    """Check what a step has because of its kind."""
    for number, step in enumerate(lineage["steps"]):
        settings, found = step["settings"], step.get("found") or {}
        length = settings.get("sequence_length")
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise _damaged(path, f"steps.{number}.settings.sequence_length is no length", got=repr(length))
        if step["stage"] == "convert" and not isinstance(settings.get("method"), str):
            raise _damaged(path, f"steps.{number}.settings has no method", got=repr(settings.get("method")))
        for first, second in (("mix", "uniform"), ("chosen", "alike")):
            if first in found and any(found.get(name) is None for name in (first, second, "budget")):
                raise _damaged(path, f"steps.{number}.found has {first} without {second} and budget")
        for name, site in (found.get("sites") or {}).items():
            lost, planes = site.get("lost"), site.get("planes", [])
            if ("planes" in site and (planes is None or type(lost) not in (int, float))) or (
                site.get("lossless") and not isinstance(lost, list)
            ):
                raise _damaged(path, f"steps.{number}.found.sites.{name} does not say what was lost")


def _damaged(path: Path, what: str, **more: Any) -> CheckpointError:
    return CheckpointError(what, where=path, next="restore it, or delete it to start a new one", **more)
