"""Layers of two types, `sliding_attention` and `full_attention`, which may also be rotated differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvfold.contracts.config import POSITIONS, Fields, Rule, number
from kvfold.contracts.family import Json

SLIDING, FULL = KINDS = ("sliding_attention", "full_attention")

WINDOW = POSITIONS.or_null

_MAPPING = Rule(dict[str, Any], "a mapping").or_null


def types_of(config: Json, every: int) -> list[str]:
    """`layer_types`; where config.json is silent, every `every`-th layer is full."""
    layers = range(config["num_hidden_layers"])
    return config.get("layer_types") or [KINDS[(layer + 1) % every == 0] for layer in layers]


def windows_of(config: Json, types: Sequence[str], default: int) -> dict[str, Any]:
    """The window of each layer, and the names of types: fields of a `Layout`."""
    window = config.get("sliding_window", default)
    return {"windows": [window if each == SLIDING else None for each in types], "kinds": KINDS}


def check_window(fields: Fields, types: Sequence[str]) -> None:
    """Refuse layers with a window where config.json says that there is none, with UnsupportedModel."""
    if SLIDING in types and fields.config.get("sliding_window", 1) is None:
        raise fields.refusal(
            "sliding_window must be a positive whole number, for layers of sliding_attention", got=None
        )


# --- rotation by type -----------------------------------------------------------------------------------------------


def check_rotations(fields: Fields) -> None:
    """Refuse `rope_parameters` that are not one mapping for each type of layer, with UnsupportedModel."""
    thetas = ("rope_theta", "rope_local_base_freq")
    fields.check({"rope_parameters": _MAPPING, "rope_scaling": _MAPPING, **dict.fromkeys(thetas, number(1, 1e15))})
    stated = Fields(fields.get("rope_parameters", {}), fields.where, f"{fields.part}rope_parameters.")
    if other := sorted(stated.config.keys() - set(KINDS)):
        raise stated.refusal(f"{other[0]} is not a type of layer", allowed=", ".join(KINDS))
    stated.check(dict.fromkeys(KINDS, _MAPPING))


def rotations_of(config: Json, types: Sequence[str], full: float, sliding: float, older: str = "") -> dict[str, Any]:
    """The rotation of each layer: a field of a `Layout`.

    `rope_parameters` has one mapping for each type. Older configs have `rope_scaling` and `rope_theta` for full layers,
    and a field named `older` for the base of the others. `full` and `sliding` are the bases where config.json is
    silent.
    """
    stated = config.get("rope_parameters") or {}
    whole = {
        "rope_theta": config.get("rope_theta", full),
        **(stated.get(FULL) or {}),
        **(config.get("rope_scaling") or {}),
    }
    near = {"rope_theta": config.get(older, sliding), **(stated.get(SLIDING) or {})}
    fields = {
        kind: {"rope_parameters": each, "rope_scaling": None, "rope_theta": each["rope_theta"]}
        for kind, each in ((FULL, whole), (SLIDING, near))
    }
    return {"rotations": [fields[kind] for kind in types if kind in fields]}
