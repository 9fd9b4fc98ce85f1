"""Strict decoding of flags and YAML into the settings dataclasses of the stages."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from kvfold.errors import SettingError, did_you_mean
from kvfold.inputs import LARGEST, load_yaml

T = TypeVar("T")


def setting(default: T, help: str, **more: str) -> T:
    """A field of a settings dataclass: its default, and the help of its flag (`group`: the panel it stands in)."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


SEEDS = 2**32  # seeds are below this: generators take them, also times a million and a step


MOST = 2**31 - 1  # tokens, sequences, rounds: an index of this many still fits
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGBT])")
_FACTOR = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def decode(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """Build a settings dataclass from a mapping; `where` begins the line of an error.

    Raises SettingError for an unknown key (with the nearest known one), a missing key, a value of the wrong type, and
    a number that is not finite or exceeds 64 bits.
    """
    hints = typing.get_type_hints(cls)
    known = {each.name: each for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise SettingError(
                f"unknown setting {key!r}",
                where=where,
                allowed=None if near else ", ".join(known) or "none",
                next=near,
            )
    for name, each in known.items():
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise SettingError(f"{name} is needed", where=where, next=each.metadata.get("help"))
    values = {}
    for key, value in given.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            values[key] = decode(typing.cast(type[Any], hints[key]), value, f"{where}.{key}")
            continue
        try:
            values[key] = pydantic.TypeAdapter(hints[key]).validate_python(_plain(value, hints[key]))
        except pydantic.ValidationError as error:
            raise SettingError(f"{key} cannot be {value!r}", where=where, allowed=describe(hints[key])) from error
        if not _fits(values[key]):
            raise SettingError(
                f"{key} cannot be {value!r}", where=where, allowed=f"finite numbers of at most {LARGEST:,}, plain text"
            )
    return cls(**values)


def _fits(value: Any) -> bool:
    """Whether a value is finite, fits into 64 bits and can name a file."""
    if isinstance(value, tuple | list):
        return all(map(_fits, value))
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) <= LARGEST
    return not isinstance(value, str) or "\0" not in value


def differing(settings: Any) -> dict[str, Any]:
    """The settings that differ from their default: an identity that a new setting does not change."""
    return {
        each.name: value
        for each in dataclasses.fields(settings)
        if (value := getattr(settings, each.name)) != each.default
        and (each.default_factory is dataclasses.MISSING or value != each.default_factory())
    }


def check_range(settings: Any, where: str | None, least: float, most: float, *names: str) -> None:
    """Check that these fields, unless None, lie between `least` and `most`. Raises SettingError."""
    for name in names:
        value = getattr(settings, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not each >= least:
                raise SettingError(f"{name} must be at least {least:g}", where=where, got=value)
            if each is not None and not each <= most:
                raise SettingError(f"{name} must be at most {most:,}", where=where, got=value)


def _plain(value: Any, hint: Any) -> Any:
    """A value for pydantic from `20M`, `1e-3` or `1,2,4`. Booleans are never numbers."""
    kinds = _kinds(hint)
    item = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple), None)
    if isinstance(value, bool):
        return value if bool in kinds else object()
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("none", "null") and type(None) in kinds and item is not str:
            return None
        if item is not None:
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif int in kinds and str not in kinds and (count := _COUNT.fullmatch(text)):
            number = float(count[1]) * _FACTOR[count[2]]
            return round(number) if math.isfinite(number) else text
    if item is not None:
        return tuple(_plain(each, item) for each in (value if isinstance(value, list | tuple) else [value]))
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def describe(hint: Any) -> str:
    """The allowed values of a type: `a whole number`, `mean, first, random`."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    parts = []
    for kind in _kinds(hint):
        if typing.get_origin(kind) is typing.Literal:
            parts.append(", ".join(map(str, typing.get_args(kind))))
        elif typing.get_origin(kind) is collections.abc.Mapping:
            parts.append("a section of keys")
        elif typing.get_origin(kind) is tuple:
            parts.append(f"{words.get(typing.get_args(kind)[0], 'a section').removeprefix('a ')}s between commas")
        else:
            parts.append(words.get(kind) or _in_words(kind))
    return " or ".join(parts)


def _in_words(kind: Any) -> str:
    """A type of kvfold's own: its docstring begins with what it holds."""
    first = kind.__doc__.partition(".")[0]
    return str(first[:1].lower() + first[1:])


def metavar(hint: Any) -> str:
    """The values of a type as a flag's help shows them: `N`, `X`, `TEXT`, `mean|first|random`, `N,N`."""
    short = {int: "N", float: "X"}
    kind = next(each for each in _kinds(hint) if each is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return ",".join([short.get(typing.get_args(kind)[0], "TEXT")] * 2)
    return short.get(kind, "TEXT")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file with keys at its top level. Raises SettingError for any other file."""
    path = Path(path)
    content = load_yaml(path, error=SettingError)
    if not isinstance(content, dict):
        raise SettingError("is not a recipe: it has no keys at its top level", where=path)
    return content
