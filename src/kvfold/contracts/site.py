"""Sites, roles and shapes: what methods and families know of an attention, without its tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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
"""Key of a site's measurements, where `fold` reordered query heads: in each place, the head of the source."""

WHOLE = frozenset({"planes"})
"""Roles of whole numbers: saved as int64, never trained, not counted as parameters."""

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
    """Rotary positions of a site: number of rotated coordinates, base, layout, and scaling as the config states it."""

    dims: int
    theta: float
    half_split: bool = True
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Linear:
    """Linear attention of a site. `kvfold.attention.linear` has the formula."""

    features: Literal["relu", "hedgehog", "none"]
    feature_dim: int  # 0 without features
    rope: Literal["before", "after"]  # rotated before or after the feature map
    norm: Literal["groupnorm", "denominator"]
    decay: Literal["none", "slopes", "retnet"]
    window: int  # last tokens that a query sees by softmax, itself included
    sinks: int  # first tokens that every query sees by softmax


@dataclass(frozen=True)
class Attention:
    """The shape of one site: head counts, widths, and the facts that limit a method."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    biases: frozenset[str] = frozenset()  # of "q", "k", "v", "o"
    norms: Literal["none", "pre_rope", "all_heads"] = "none"  # of q and k before rotation: each head, or all at once
    rope: Rope | None = None
    window: int | None = None  # tokens that a query sees, itself included
    scale: float | None = None  # of the logits; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # c in logits `c tanh(z / c)`; None: no cap
    norm_offset: float = 0.0  # added to the weights of norms, here and behind attention and MLP: 1 in Gemma's
    sinks: bool = False  # each query head has one more logit, whose value is 0: a role (H,)
    value_heads: tuple[int, ...] | None = None  # the value head of each query head; None: that of its key head
    source: int | None = None  # layer whose keys and values it reads, with that layer's head count; None: its own
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # role shapes of other runtimes
    without: frozenset[str] = frozenset()  # roles that another runtime does not have
    kept: Mapping[str, int] | None = None  # elements per token in the cache, by name; None: keys and values of heads
    read: int | None = None  # elements per token that one query head multiplies with; None: `2 head_dim`
    linear: Linear | None = None  # attention to tokens behind a window; None: softmax over all
    encoder_size: int | None = None  # of cross-attention: width of the encoder's output; None: `hidden_size`
    beside: int = 0  # of cross-attention: parameters of the norms of its branch, which go with it
    fades: bool = False  # of cross-attention: a gate multiplies its branch, which uptraining removes

    @property
    def input_width(self) -> int:
        """Width of the input of keys and values."""
        return self.hidden_size if self.encoder_size is None else self.encoder_size

    @property
    def query_group(self) -> int:
        """Query heads per key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_value_heads(self) -> int:
        """Heads of values: as many as of keys, unless their groups are others."""
        return self.num_key_value_heads if self.value_heads is None else 1 + max(self.value_heads)

    def roles(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the site's tensors by role, as a checkpoint stores them (out, in).

        A site that reads another layer's keys and values has no roles for its own.
        """
        wide = self.num_attention_heads * self.head_dim
        rows = {"q": wide, **self._widths, "o": self.hidden_size}
        columns = {"q": self.hidden_size, "k": self.input_width, "v": self.input_width, "o": wide}
        shapes: dict[str, tuple[int, ...]] = {role: (out, columns[role]) for role, out in rows.items()}
        shapes |= {f"{role}_bias": (rows[role],) for role in rows if role in self.biases}
        if self.norms != "none":
            each = self.norms == "pre_rope"
            shapes |= {f"{role}_norm": (self.head_dim,) if each else (rows[role],) for role in "qk"}
        if self.sinks:
            shapes["sinks"] = (self.num_attention_heads,)
        if self.source is not None:
            shapes = {role: shape for role, shape in shapes.items() if role[0] not in "kv"}
        return {role: shape for role, shape in shapes.items() if role not in self.without} | dict(self.extra)

    @property
    def head_roles(self) -> tuple[str, ...]:
        """The roles with `head_dim` rows for each key/value head: `k`, `v`, their biases, a norm over all heads."""
        names = ("k", "v", "k_bias", "v_bias", *(("k_norm",) if self.norms == "all_heads" else ()))
        return tuple(role for role in names if role in self.roles())

    @property
    def parameters(self) -> int:
        """Parameters of the site."""
        return sum(math.prod(shape) for role, shape in self.roles().items() if role not in WHOLE)

    @property
    def logit_scale(self) -> float:
        """Factor of the inner products of queries and keys."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def multiplied(self, context: int) -> int:
        """Cached elements that one query head multiplies with, for a token after `context` others."""
        if self.linear is None:
            return (self.read or 2 * self.head_dim) * min(context, self.window or context)
        near = min(context, self.linear.window + self.linear.sinks)
        return 2 * self.head_dim * near + self.linear.feature_dim * self.head_dim

    @property
    def cached(self) -> Mapping[str, int]:
        """Elements per token in the cache, by name."""
        return self._widths if self.kept is None else self.kept

    @property
    def _widths(self) -> dict[str, int]:
        return {"k": self.num_key_value_heads * self.head_dim, "v": self.num_value_heads * self.head_dim}

    @property
    def cached_elements(self) -> int:
        """Elements per token in the cache."""
        return sum(self.cached.values())


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
    encoder_parameters: int = 0  # of all parameters: read once per input, not once per generated token
    encoder_positions: int | None = None  # of every input; None: as many as its tokens
    root_elements: int | None = field(default=None, compare=False)  # cached per token by its root teacher

    @property
    def cached_sites(self) -> list[Site]:
        """The sites that have a cache: all but those of an encoder."""
        return [site for site in self.sites if site.kind != "encoder"]

    @property
    def crossed(self) -> list[Site]:
        """The cross-attentions, from the first layer on: none in a decoder, not all layers in some students."""
        return sorted(site for site in self.sites if site.kind == "cross")

    @property
    def layer_sparse(self) -> bool:
        """Whether some decoder layers have no cross-attention, or one that fades, while others do."""
        crossed = self.crossed
        return bool(crossed) and (len(crossed) < self.num_layers or any(self.sites[site].fades for site in crossed))

    @property
    def fused(self) -> bool:
        """Whether torch's fused attention computes every site: it has no soft caps, and ignores sinks."""
        return all(attention.softcap is None and not attention.sinks for attention in self.sites.values())

    @property
    def decoupled(self) -> bool:
        """Whether some layer groups its value heads apart from its key heads."""
        return any(attention.value_heads is not None for attention in self.sites.values())

    @property
    def owners(self) -> dict[int, int]:
        """Layers whose keys and values other layers read too -> elements per token. Empty in most models."""
        return {
            attention.source: 2 * attention.num_key_value_heads * attention.head_dim
            for attention in self.sites.values()
            if attention.source is not None and attention.kept is None
        }

    def with_sites(self, changed: Mapping[Site, Attention]) -> Shape:
        """The same model with other attentions at these sites; the parameter count follows."""
        more = sum(attention.parameters - self.sites[site].parameters for site, attention in changed.items())
        return replace(self, sites={**self.sites, **changed}, parameters=self.parameters + more)

    def with_heads(self, heads: Mapping[Site, int]) -> Shape:
        """The same model with these numbers of key/value heads."""
        changed = {site: replace(self.sites[site], num_key_value_heads=count) for site, count in heads.items()}
        return self.with_sites(changed)

    def without(self, removed: Collection[Site]) -> Shape:
        """The same model without these attentions and the norms of their branches."""
        fewer = sum(self.sites[site].parameters + self.sites[site].beside for site in removed)
        left = {site: attention for site, attention in self.sites.items() if site not in removed}
        return replace(self, sites=left, parameters=self.parameters - fewer)


@dataclass(frozen=True)
class SiteTensors:
    """One site as a method receives it: its shape, and its tensors by role."""

    attention: Attention
    roles: Roles
    dtype: str | None = None  # of the student's tensors; None: that of these
