"""The example of a method as a user gives it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.site import Shape


def example(method: Method[Any], shape: Shape) -> dict[str, Any]:
    """The settings of a method's example that differ from their defaults."""
    made = method.example(shape)
    usual = {each.name: each.default for each in fields(made)}
    return {name: value for name, value in spelled(made).items() if value != usual[name]}
