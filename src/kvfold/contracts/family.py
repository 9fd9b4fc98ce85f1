"""The contract of a family: where an architecture keeps its attention, and what config.json says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvfold.contracts.config import Fields
from kvfold.contracts.site import Shape, Site

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
    check: Callable[
        [Fields], None
    ]  # is every field of config.json that is read what it may be? see `kvfold.contracts.config`
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
