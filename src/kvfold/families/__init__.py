"""Families: where a model architecture keeps its weights. Discovered in the modules of this folder.

A module has one frozen `FAMILY`, or `FAMILIES`, a tuple of them. CONTRIBUTING.md walks through adding one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from kvfold.contracts.config import Fields, check_common
from kvfold.contracts.family import Family, Json
from kvfold.errors import UnsupportedModel, did_you_mean


@cache
def _modules() -> dict[str, dict[str, Family]]:
    """The modules of this package, each with its families by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules: dict[str, Any] = {name: vars(importlib.import_module(f"{__name__}.{name}")) for name in names}
    return {
        name: {family.name: family for family in module.get("FAMILIES") or (module["FAMILY"],)}
        for name, module in modules.items()
    }


@cache
def all_families() -> dict[str, Family]:
    """Every family by name."""
    found = {name: family for families in _modules().values() for name, family in families.items()}
    return dict(sorted(found.items()))


def module_of(family: str) -> str:
    """The module of this package that defines a family."""
    return next(module for module, families in _modules().items() if family in families)


_QUANTISED = ("quantization_config", "compression_config", "quant_config", "quantization")

"""Fields of config.json that describe quantised weights: transformers, compressed-tensors, older AWQ, MLX."""


def _quantised(config: Json) -> str | None:
    """How the weights are quantised, also those of nested configs; None if they are not."""
    for name in _QUANTISED:
        if stated := config.get(name):
            kind = stated.get("quant_method") or stated.get("quant_type") if isinstance(stated, Mapping) else stated
            return kind if isinstance(kind, str) else f"by its {name}"
    parts = (each for each in config.values() if isinstance(each, Mapping))
    return next((kind for each in parts if (kind := _quantised(each))), None)


MXFP4 = (
    "write it in bfloat16 first: from_pretrained(SRC, quantization_config=Mxfp4Config(dequantize=True), "
    "dtype='bfloat16').save_pretrained(OUT) with transformers, then convert OUT"
)
"""The remedy for checkpoints that exist in this format alone, such as gpt-oss."""


def family_of(config: Json, where: object = "config.json") -> Family:
    """The family of a `config.json`, whose fields are checked; `where` names the file in errors.

    Raises UnsupportedModel, also for quantised weights.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModel("config.json has no model_type", next="is this a transformers checkpoint?")
    if kind := _quantised(config):
        raise UnsupportedModel(
            f"the weights are quantised ({kind}); folding needs the numbers that quantising threw away",
            next=MXFP4 if kind == "mxfp4" else "convert the unquantised checkpoint, and quantise the student",
        )
    families = all_families()
    known = {kind: family for family in families.values() for kind in family.model_types}
    if model_type not in known:
        raise UnsupportedModel(
            f"architecture {model_type!r} is not supported",
            allowed=", ".join(sorted(known)),
            next=did_you_mean(model_type, known),
        )
    fields, family = Fields(config, where), known[model_type]
    check_common(fields)
    family.check(fields)
    return family if family.body_of is None else replace(family, body=family.body_of(config))


def source_family(config: Json, where: object = None) -> Family:
    """The family of a checkpoint of a language model.

    Raises UnsupportedModel as `family_of` does, and for an architecture without a language model's head.
    """
    family = family_of(config, where or "config.json")
    named = config.get("architectures") or []
    allowed = family.architectures[config["model_type"]]
    known = {name.lower() for name in (*family.architectures.values(), *family.aliases)}
    for name in named if isinstance(named, list) else [named]:
        if str(name).lower() not in known:
            raise UnsupportedModel(
                f"architecture {name} is not one with a language model's head",
                where=where,
                allowed=allowed,
                next="convert the language model that it was made from",
            )
    return family
