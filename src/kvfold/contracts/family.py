"""The contract of a family: where an architecture keeps its weights, and how config.json describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfold.contracts.config import Fields
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention, Roles, Shape, Site
from kvfold.contracts.stacked import Stacked

if TYPE_CHECKING:
    from torch import Tensor

Json = Mapping[str, Any]


MLP = ("gate", "up", "act", "down")
"""The modules of an MLP: `down(act(gate x) * up x)`, or `down(act(up x))` without a gate."""


@dataclass(frozen=True)
class Body:
    """Module paths of what is not attention, as `named_modules` of transformers spells them.

    `embedding` names the tensor that a tied output projection equals; it is empty where transformers ties more than
    these two. `layers` are those of the decoder, and `norm` is that of a decoder alone. Paths of `mlp` and `after` are
    relative to a layer: `mlp` has the parts of `MLP` that the architecture has, none where it has experts or an MLP
    that is not known, and of parts that share a tensor that tensor;
    `after` has the norms of what the attentions, by kind, and `mlp` add to the residual stream, for architectures that
    norm there; with `post_norm`, they norm the stream with what was added.
    `stacked` has the parameters of a layer that checkpoints store in other tensors.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    mlp: Mapping[str, str | Packed] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    post_norm: bool = False
    stacked: Mapping[str, Stacked] = field(default_factory=dict)
    crossing: tuple[str, ...] = ()  # norms of the branch of cross-attention, relative to a layer
    residual: str = ""  # field of config.json: the factor of what attention and MLP add to the residual stream

    def inside(self, layer: int, path: str = "") -> str:
        """Path of a layer, or of a module in it."""
        return f"{self.layers}.{layer}.{path}".rstrip(".")


@dataclass(frozen=True)
class Expressed:
    """A tensor as a function of tensors of another architecture; without `make`, the one that `sources` names."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Rehoused:
    """The same function in another stock architecture: its config.json, and its tensors by name."""

    config: Json
    tensors: Mapping[str, Expressed]


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its weights, and how `config.json` describes them."""

    name: str
    architectures: Mapping[str, str]  # model_type -> the class of that name in transformers or `kvfold.hf`
    about: str
    attention: Mapping[str, str]  # kind -> module path of a site, with {layer}
    tensors: Mapping[str, str | Packed]  # role -> tensor below that module, its own or one that several roles share
    check: Callable[[Fields], None]  # refuses fields that the family cannot take: see `kvfold.contracts.config`
    shape: Callable[[Json], Shape]  # a checked config.json -> Shape; raises UnsupportedModel
    fields: Callable[[Shape], dict[str, Any]]  # a student's Shape -> its fields of config.json: see `with_fields`
    tiny: Callable[[], dict[str, Any]]  # a config.json of a few thousand parameters, for tests
    body: Body = Body()
    aliases: tuple[str, ...] = ()  # older names of the architectures
    examples: tuple[str, ...] = ()  # names of checkpoints on the Hub
    encoder_decoder: bool = False
    audio: bool = False  # the encoder reads sound
    heads_first: bool = False  # whether norms of q and k read (B, H, T, E), and not (B, T, H, E)
    ties: bool = False  # whether the output projection is the embedding where config.json is silent
    interface: bool = True  # whether its stock classes call the attention functions of transformers, and so kvfold's
    renamed: Mapping[str, str] = field(default_factory=dict)  # first part of a name in the model -> on disk
    prefix: str = ""  # of all names but the head's, which files of a model without its head lack
    buffers: str = ""  # pattern of names of tensors that are no parameters, such as masks
    spellings: Mapping[str, str] = field(default_factory=dict)  # first part of a name in older files -> in the model
    dropped: Callable[[Json], tuple[str, ...]] = lambda config: ()  # prefixes of tensors that a student leaves out
    adopt: Callable[[Json], Json] | None = None  # config.json of a source in another architecture -> in this one
    depth: str = ""  # field of config.json with the number of decoder layers, where layers can be added
    rehouse: Callable[[Json], Rehoused] | None = None  # of one whose config.json cannot say what students need
    body_of: Callable[[Json], Body] | None = None  # where the body depends on config.json; None: `body`

    @property
    def model_types(self) -> tuple[str, ...]:
        """The `model_type` of each of its architectures."""
        return tuple(self.architectures)

    def tied(self, config: Json) -> bool:
        """Whether the output projection is the decoder's embedding."""
        return bool(config.get("tie_word_embeddings", self.ties or self.encoder_decoder))

    def module(self, site: Site) -> str:
        """Path of the attention module of a site."""
        return self.attention[site.kind].format(layer=site.layer)

    def branch(self, site: Site) -> tuple[str, ...]:
        """Paths of a cross-attention and of the norms of its branch."""
        return self.module(site), *(self.body.inside(site.layer, name) for name in self.body.crossing)

    def tensor(self, site: Site, role: str) -> str:
        """Name of the tensor of a role, of the layer's MLP too; a role that no source has is named after itself."""
        packed = self.packed(role)
        if role in self.body.mlp:
            path = f"{self.body.mlp[role]}.weight" if packed is None else packed.name
            return self.body.inside(site.layer, path)
        return f"{self.module(site)}.{self.tensors.get(role, f'{role}.weight') if packed is None else packed.name}"

    def alone(self, site: Site, role: str) -> str:
        """Name of the weight of a role in a layer whose packed maps are split (`kvfold.hf.layers`)."""
        name = self.tensor(site, role)
        return name if self.packed(role) is None else f"{name.rpartition('.')[0]}.{role}.weight"

    def on_disk(self, name: str) -> str:
        """The name under which a checkpoint stores a parameter of the model."""
        found = next((prefix for prefix in self.renamed if name.startswith(prefix)), None)
        return name if found is None else self.renamed[found] + name.removeprefix(found)

    def canonical(self, name: str) -> str:
        """The name in the model of a tensor that files may name otherwise."""
        found = next((older for older in self.spellings if name.startswith(older)), None)
        return name if found is None else self.spellings[found] + name.removeprefix(found)

    def stacked(self, name: str) -> Stacked | None:
        """The tensors that hold a parameter of the model, where a checkpoint stores it in others."""
        layer, _, path = name.removeprefix(f"{self.body.layers}.").partition(".")
        found = self.body.stacked.get(path) if name.startswith(self.body.layers) else None
        return found and found.below(f"{self.body.layers}.{layer}.")

    def packed(self, role: str) -> Packed | None:
        """The layout of the tensor that a role shares with others; None for a role with a tensor of its own."""
        found = self.body.mlp.get(role, self.tensors.get(role))
        return found if isinstance(found, Packed) else None

    def stored(self, site: Site, attention: Attention) -> dict[str, tuple[str, ...]]:
        """The tensors of a site of this shape by name, and the roles that each holds."""
        found: dict[str, tuple[str, ...]] = {}
        for role in attention.roles():
            name = self.tensor(site, role)
            found[name] = (*found.get(name, ()), role)
        return found

    def joined(self, attention: Attention, roles: Roles) -> Tensor:
        """The tensor that holds these roles."""
        role = next(iter(roles))
        packed = self.packed(role)
        return roles[role] if packed is None else packed.whole(roles, attention)

    def form(self, attention: Attention, roles: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of a tensor that holds these roles."""
        shapes = {role: attention.roles()[role] for role in roles}
        packed = self.packed(roles[0])
        return shapes[roles[0]] if packed is None else packed.form(shapes)


AUTO_MAP = "auto_map"
"""The key of config.json, tokenizer_config.json and others that names code in the same folder."""


def without_code(config: Json) -> dict[str, Any]:
    """A config.json without `auto_map`, also in nested configs."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != AUTO_MAP
    }


def with_fields(config: Json, fields: Json) -> dict[str, Any]:
    """A config.json with these fields; `decoder.num_key_value_heads` is a field of the part `decoder`."""
    made = dict(config)
    for name, value in fields.items():
        part, _, own = name.rpartition(".")
        made |= {part: {**made[part], own: value}} if part else {own: value}
    return made
