"""Families: where a model architecture keeps its attention. One file each, discovered by being here.

A family is a module of this package with one frozen `FAMILY`. CONTRIBUTING.md walks through adding one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from kvfold.errors import UnsupportedModel, did_you_mean
from kvfold.schema import Fields, check_common
from kvfold.shape import Shape, Site

Json = Mapping[str, Any]

MLP = ("gate", "up", "act", "down")
"""The modules of a gated MLP, `down(act(gate x) * up x)`: paths with {layer} in `Family.mlp`."""


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps the tensors of its attention, and what `config.json` says of them."""

    name: str
    architectures: Mapping[str, str]  # model_type -> the class of that name that transformers or `kvfold.hf` has
    about: str
    attention: Mapping[str, str]  # kind -> module path of a site, with {layer}
    tensors: Mapping[str, str]  # role -> tensor name below that module
    check: Callable[[Fields], None]  # is every field of config.json that is read what it may be? see `kvfold.schema`
    shape: Callable[[Json], Shape]  # a checked config.json -> Shape; raises UnsupportedModel
    fields: Callable[[Shape], dict[str, Any]]  # a student's Shape -> what says it in config.json: see `with_fields`
    tiny: Callable[[], dict[str, Any]]  # a config.json of a few thousand parameters, for tests
    mlp: Mapping[str, str] = field(default_factory=dict)  # modules of a gated MLP: see `MLP`; none: it has no such
    embedding: str = ""  # what `lm_head.weight` equals where it is tied; none: transformers says so of two matrices too
    aliases: tuple[str, ...] = ()  # what older config.json call one of the architectures
    encoder_decoder: bool = False  # does it read one text and write another? Its inputs are then two rows of ids

    @property
    def model_types(self) -> tuple[str, ...]:
        """What `config.json` calls its architectures."""
        return tuple(self.architectures)

    def tied(self, config: Json) -> bool:
        """Is the decoder's embedding the output matrix too? Where config.json is silent: as transformers takes it."""
        return bool(config.get("tie_word_embeddings", self.encoder_decoder))

    def module(self, site: Site) -> str:
        """Path of the site's attention module, as `named_modules` of transformers spells it."""
        return self.attention[site.kind].format(layer=site.layer)

    def tensor(self, site: Site, role: str) -> str:
        """Name of the tensor that plays this role; a role that no source has is named after itself."""
        return f"{self.module(site)}.{self.tensors.get(role, f'{role}.weight')}"


def with_fields(config: Json, fields: Json) -> dict[str, Any]:
    """A config.json with these fields; `decoder.num_key_value_heads` is one of its part `decoder`."""
    made = dict(config)
    for name, value in fields.items():
        part, _, own = name.rpartition(".")
        made |= {part: {**made[part], own: value}} if part else {own: value}
    return made


def own_type(model_type: str) -> str:
    """The model type of ours for a stock architecture whose stock classes cannot be what a student is."""
    return f"kvfold_{model_type}"


def stock_type(config: Json) -> str:
    """The stock architecture of a config.json of any kind."""
    name = str(config["model_type"]).removeprefix(own_type(""))
    return name.removeprefix("latent_").removeprefix("linear_")


@cache
def all_families() -> dict[str, Family]:
    """Every family by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    found = [cast(Family, importlib.import_module(f"{__name__}.{name}").FAMILY) for name in names]
    return {family.name: family for family in found}


_QUANTISED = ("quantization_config", "compression_config", "quant_config", "quantization")
"""Where config.json says that weights are quantised: transformers, compressed-tensors, AWQ of old, MLX."""


def _quantised(config: Json) -> str | None:
    """How the weights of a config are quantised, also in its parts; None: they are not."""
    for name in _QUANTISED:
        if said := config.get(name):
            kind = said.get("quant_method") or said.get("quant_type") if isinstance(said, Mapping) else said
            return kind if isinstance(kind, str) else f"by its {name}"
    parts = (each for each in config.values() if isinstance(each, Mapping))
    return next((kind for each in parts if (kind := _quantised(each))), None)


def family_of(config: Json, where: object = "config.json") -> Family:
    """The family that takes this `config.json`, whose fields it checks; `where` names the file in an error.

    Raises UnsupportedModel, also for quantised weights.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModel("config.json has no model_type", next="is this a transformers checkpoint?")
    if kind := _quantised(config):
        raise UnsupportedModel(
            f"the weights are quantised ({kind}); folding needs the numbers that quantising threw away",
            next="convert the unquantised checkpoint, and quantise the student",
        )
    families = all_families()
    known = {kind: family for family in families.values() for kind in family.model_types}
    if model_type not in known:
        raise UnsupportedModel(
            f"architecture {model_type!r} is not supported",
            allowed=", ".join(sorted(known)),
            next=did_you_mean(model_type, known),
        )
    fields = Fields(config, where)
    check_common(fields)
    known[model_type].check(fields)
    return known[model_type]


def source_family(config: Json, where: object = None) -> Family:
    """The family of a checkpoint that is to be read as a language model.

    Raises UnsupportedModel as `family_of` does, and for an architecture with another head, or with none.
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
