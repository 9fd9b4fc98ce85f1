"""A method's example as a user gives it, the families of costly checks, and architectures that share a family."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.runtimes import PAIRS
from kvfold.contracts.site import Shape
from kvfold.families import all_families

CORE = ("llama", "qwen2", "qwen3", "olmo2", "phi", "gpt_neox", "smollm3", "cohere", "t5", "bart", "t5gemma")
"""Families that differ most. Checks that cost run on all of these, and on each of the others only now and then."""


def example(method: Method[Any], shape: Shape) -> dict[str, Any]:
    """The settings of a method's example that differ from their defaults."""
    made = method.example(shape)
    usual = {each.name: each.default for each in fields(made)}
    return {name: value for name, value in spelled(made).items() if value != usual[name]}


def paired() -> dict[str, tuple[str, dict[str, Any]]]:
    """The encoder-decoders that are not the first of their family, as its `tiny()` with other fields."""
    return {
        stock: (family.name, {"model_type": stock, "architectures": [family.architectures[stock]]})
        for family in all_families().values()
        for stock in family.model_types
        if stock in PAIRS.models and stock != family.tiny()["model_type"]
    }
