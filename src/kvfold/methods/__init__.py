"""Methods: how an attention is made cheaper. Each file of this package is one, with its instance `METHOD`.

`register` adds one from elsewhere. CONTRIBUTING.md walks through writing a method.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from kvfold.contracts import runtimes
from kvfold.contracts.method import Method
from kvfold.contracts.site import Shape
from kvfold.errors import SettingError, did_you_mean

_PLUGINS: dict[str, Method[Any]] = {}


def register(name: str, method: Method[Any]) -> None:
    """Add a method that does not live in this package."""
    _PLUGINS[name] = method


@cache
def _builtin() -> dict[str, Method[Any]]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in names}


def all_methods() -> dict[str, Method[Any]]:
    """Every method by name."""
    return {**_builtin(), **_PLUGINS}


def get(name: str) -> Method[Any]:
    """The method of this name. Raises SettingError, with the nearest name."""
    methods = all_methods()
    if name not in methods:
        raise SettingError(
            f"method {name!r} is not known", allowed=", ".join(methods), next=did_you_mean(name, methods)
        )
    return methods[name]


def check(name: str, config: Any, shape: Shape) -> None:
    """Raise SettingError for a source that this method cannot convert with these settings.

    Sites whose keys and values another method has replaced are such a source. Raises UnsupportedModel for a student
    for which no classes exist.
    """
    for site in (site for group in get(name).groups(config, shape) for site in group if site in shape.sites):
        if shape.sites[site].kept is not None:
            raise SettingError(
                f"{site} caches {' and '.join(shape.sites[site].cached)} already, not keys and values of heads",
                where=name,
                next="convert the checkpoint that it was made from",
            )
        if shape.sites[site].value_heads is not None:
            raise SettingError(
                f"{site} groups its value heads apart from its key heads",
                where=name,
                next="convert the checkpoint that it was made from",
            )
    config.check(shape)
    student = get(name).student(config, shape)
    if student.model_type is None:
        runtimes.check(student.shape, name)
