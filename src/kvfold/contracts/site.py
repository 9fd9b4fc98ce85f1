"""Sites, roles and shapes: the words in which methods and families speak of an attention, without a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


Kind = Literal["self", "cross", "encoder"]


KINDS: tuple[Kind, ...] = ("self", "cross", "encoder")


Roles = dict[str, "Tensor"]

"""The tensors of one site by role: `q` (HE, D), `k` and `v` (GE, D), `o` (D, HE), `q_bias`, `k_norm`, ..."""


REPAIRABLE = ("q", "o", "gate", "up", "down")

"""The weights of a layer that a repair can refit, in its order (`kvfold.repair.layers`)."""


QUERIES = "queries"

"""What `fold` tells of a site whose query heads it reordered: in each place, the head of the source."""


WHOLE = frozenset({"planes"})

"""Roles of whole numbers: saved as int64, never trained, and counted with no parameters."""


DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, order=True)
class Site:
    """One attention of one layer."""

    layer: int
    kind: Kind = "self"

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.kind == "self" else f"layer {self.layer} ({self.kind})"


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a site: rotated head dims, base, layout and scaling as the config states them."""

    dims: int
    theta: float
    half_split: bool = True
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Linear:
    """Linear attention of a site: `attention.linear` has the formula that these are the settings of."""

    features: Literal["relu", "hedgehog", "none"]
    feature_dim: int  # numbers of a feature vector; 0 without features
    rope: Literal["before", "after"]  # rotated before or after its features
    norm: Literal["groupnorm", "denominator"]
    decay: Literal["none", "slopes", "retnet"]
    window: int  # last tokens, itself included, that a query sees by softmax
    sinks: int  # first tokens that all see so


@dataclass(frozen=True)
class Attention:
    """The shape of one site: head counts, widths, and the facts that bound what a method may do."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    biases: frozenset[str] = frozenset()  # of "q", "k", "v", "o"
    norms: Literal["none", "pre_rope", "all_heads"] = "none"  # q and k before rotation: each head, or all at once
    rope: Rope | None = None
    window: int | None = None  # tokens that a query may look back on, itself included
    scale: float | None = None  # of the logits; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # logits z are `c tanh(z / c)`; None: as they are
    permutable: bool = True  # may heads change places? (T5's decoder self-attention: no)
    source: int | None = None  # layer whose keys and values it reads, with that layer's heads; None: its own
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # role shapes of other runtimes
    without: frozenset[str] = frozenset()  # roles that another runtime does not have
    kept: Mapping[str, int] | None = None  # elements of a token in its cache, by name; None: keys and values of heads
    read: int | None = None  # of these, what one query head multiplies with; None: `2 head_dim`
    linear: Linear | None = None  # what it does with tokens behind a window; None: softmax over all
    encoder_size: int | None = None  # of cross-attention: width of the encoder's output; None: `hidden_size`

    @property
    def input_width(self) -> int:
        """Width of what keys and values are made of."""
        return self.hidden_size if self.encoder_size is None else self.encoder_size

    @property
    def query_group(self) -> int:
        """How many query heads read one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def roles(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the site's tensors by role, as a checkpoint stores them (out, in).

        One that reads another layer's keys and values has none for making its own.
        """
        wide, narrow = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        rows = {"q": wide, "k": narrow, "v": narrow, "o": self.hidden_size}
        columns = {"q": self.hidden_size, "k": self.input_width, "v": self.input_width, "o": wide}
        shapes: dict[str, tuple[int, ...]] = {role: (out, columns[role]) for role, out in rows.items()}
        shapes |= {f"{role}_bias": (rows[role],) for role in rows if role in self.biases}
        if self.norms != "none":
            each = self.norms == "pre_rope"
            shapes |= {f"{role}_norm": (self.head_dim,) if each else (rows[role],) for role in "qk"}
        if self.source is not None:
            shapes = {role: shape for role, shape in shapes.items() if role[0] not in "kv"}
        return {role: shape for role, shape in shapes.items() if role not in self.without} | dict(self.extra)

    @property
    def parameters(self) -> int:
        """Parameters of the site."""
        return sum(math.prod(shape) for role, shape in self.roles().items() if role not in WHOLE)

    @property
    def logit_scale(self) -> float:
        """What inner products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def multiplied(self, context: int) -> int:
        """Cached numbers that one query head multiplies with for a token after `context` others."""
        if self.linear is None:
            return (self.read or 2 * self.head_dim) * min(context, self.window or context)
        near = min(context, self.linear.window + self.linear.sinks)
        return 2 * self.head_dim * near + self.linear.feature_dim * self.head_dim

    @property
    def cached(self) -> Mapping[str, int]:
        """Elements that the site keeps of a token, by name."""
        width = self.num_key_value_heads * self.head_dim
        return {"k": width, "v": width} if self.kept is None else self.kept


@dataclass(frozen=True)
class Shape:
    """The shape of a whole model, read from `config.json` alone."""

    family: str
    model_type: str
    sites: Mapping[Site, Attention]
    hidden_size: int
    vocab_size: int
    num_layers: int
    parameters: int
    dtype: str
    max_positions: int
    encoder_parameters: int = 0  # of all parameters: read once for an input, and not for each token that is written
    root_elements: int | None = field(default=None, compare=False)  # cached per token by its root teacher

    @property
    def owners(self) -> dict[int, int]:
        """Layers whose keys and values others read too, with the elements of both for one token; most models: none."""
        return {
            attention.source: 2 * attention.num_key_value_heads * attention.head_dim
            for attention in self.sites.values()
            if attention.source is not None and attention.kept is None
        }

    def with_sites(self, changed: Mapping[Site, Attention]) -> Shape:
        """The same model with other attentions at these sites; the parameter count follows."""
        parameters = self.parameters
        for site, attention in changed.items():
            parameters += attention.parameters - self.sites[site].parameters
        return replace(self, sites={**self.sites, **changed}, parameters=parameters)


@dataclass(frozen=True)
class SiteTensors:
    """What a method is handed of one site: its shape, and its tensors by role."""

    attention: Attention
    roles: Roles
