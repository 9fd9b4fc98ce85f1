"""The words that methods, families and runtimes share: sites, shapes, roles, cache bytes, requests.

Nothing here holds a tensor or imports torch: a plan is made of these words alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from kvfold.errors import SettingError, choices, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["self", "cross", "encoder"]
KINDS: tuple[Kind, ...] = ("self", "cross", "encoder")

Roles = dict[str, "Tensor"]
"""The tensors of one site by role: `q` (HE, D), `k` and `v` (GE, D), `o` (D, HE), `q_bias`, `k_norm`, ..."""

REPAIRABLE = ("q", "o", "gate", "up", "down")
"""The weights of a layer that a repair can refit, in its order (`kvfold.repair`)."""

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
    norms: Literal["none", "pre_rope", "post_rope"] = "none"  # where q and k are normed
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
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
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


@dataclass(frozen=True)
class Slot:
    """One thing that a site keeps while decoding, in elements; slots of one `storage` are counted once."""

    storage: str
    per_token: int = 0
    constant: int = 0
    per_encoder_token: int = 0
    window: int | None = None  # the cache never holds more tokens than this
    wide: bool = False  # at least 4 bytes an element, whatever the format of the cache

    def elements(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Elements that one sequence of `tokens` keeps alive here."""
        held = tokens if self.window is None else min(tokens, self.window)
        return self.constant + self.per_token * held + self.per_encoder_token * encoder_tokens


@dataclass(frozen=True)
class CacheSpec:
    """What a model's cache holds: bytes = constant + per decoder token + per encoder token."""

    slots: tuple[Slot, ...]

    def _unique(self) -> list[Slot]:
        return list({slot.storage: slot for slot in self.slots}.values())

    def elements(self, tokens: int, encoder_tokens: int = 0) -> int:
        """Elements that one sequence of `tokens` keeps alive."""
        return sum(slot.elements(tokens, encoder_tokens) for slot in self._unique())

    def bytes(self, tokens: int, *, batch: int = 1, itemsize: int = 2, encoder_tokens: int = 0) -> int:
        """Bytes of the cache of `batch` sequences of `tokens` at `itemsize` bytes an element."""
        return batch * sum(
            slot.elements(tokens, encoder_tokens) * (max(itemsize, 4) if slot.wide else itemsize)
            for slot in self._unique()
        )

    def bytes_per_token(self, itemsize: int = 2, tokens: int = 1) -> int:
        """The decoder's cache by the token of a text of `tokens`, over which windows and constants are spread."""
        return round(self.bytes(tokens, itemsize=itemsize) / tokens)

    def bytes_per_encoder_token(self, itemsize: int = 2) -> int:
        """Bytes that one more token of an encoder's input adds."""
        return itemsize * sum(slot.per_encoder_token for slot in self._unique())


def with_latent(attention: Attention, planes: int, width: int) -> Attention:
    """The same site with latent keys and values: of each key head `planes` rotated planes, and one latent for the rest.

    Roles: `k_rope` (2 planes G, D) makes the rotated coordinates; `kv_down` (R, D) the latent; `k_up` and `v_up` what
    it says of unrotated keys and of values; `planes` (G, planes) names the frequencies that each key head keeps. Heads
    of `q` begin with their rotated coordinates. There is no bias of unrotated keys, which would move all logits alike.
    """
    hidden, groups, rotated = attention.hidden_size, attention.num_key_value_heads, 2 * planes
    free = attention.head_dim - rotated
    extra: dict[str, tuple[int, ...]] = {"k_rope": (groups * rotated, hidden), "kv_down": (width, hidden)}
    if "k" in attention.biases:
        extra["k_rope_bias"] = (groups * rotated,)
    if free:
        extra["k_up"] = (groups * free, width)
    extra |= {"v_up": (groups * attention.head_dim, width), "v_up_bias": (groups * attention.head_dim,)}
    return replace(
        attention,
        extra={**extra, "planes": (groups, planes)},
        without=frozenset({"k", "v", "k_bias", "v_bias"}),
        kept={"rotated": groups * rotated, "latent": width},
        read=rotated + 2 * width,
        rope=attention.rope and replace(attention.rope, dims=rotated),
    )


def with_encoder_latent(attention: Attention, width: int, layer: int) -> Attention:
    """The same cross-attention over one latent of the encoder's output, which the first layer caches for all.

    Roles: `k` and `v` (G E, R) read keys and values off it, and `v_bias` (G E) is added to these, `k_bias` to those
    whose logits are capped, which would else not feel it; `kv_down` (R, D), in
    the first layer alone, makes it. The encoder's output itself, `R = D`, needs no `kv_down`, and no bias beyond those
    that there were.
    """
    rows, narrow = attention.num_key_value_heads * attention.head_dim, width < attention.input_width
    extra: dict[str, tuple[int, ...]] = {"k": (rows, width), "v": (rows, width)}
    biased = attention.biases & {"k", "v"} | ({"v"} if narrow else set())
    biased |= {"k"} if narrow and attention.softcap is not None else set()
    extra |= {f"{role}_bias": (rows,) for role in sorted(biased)}
    if narrow and layer == 0:
        extra["kv_down"] = (width, attention.input_width)
    kept = {"latent": width}
    return replace(attention, extra=extra, kept=kept, read=2 * width, source=0 if layer else None)


def with_linear(attention: Attention, linear: Linear) -> Attention:
    """The same site with linear attention behind a window.

    Roles: of `relu` one map for each key head, `phi` (G F, E) with `phi_bias`, which keys and their queries share; of
    `hedgehog` one for each query head and one for each key head, `phi_q` (H F / 2, E) and `phi_k` (G F / 2, E); and
    `window_gate` (H,), the logarithm of what the window counts, where both parts stand under one denominator.
    """
    width, heads, groups = attention.head_dim, attention.num_attention_heads, attention.num_key_value_heads
    extra: dict[str, tuple[int, ...]] = {}
    if linear.features == "relu":
        extra = {"phi": (groups * linear.feature_dim, width), "phi_bias": (groups * linear.feature_dim,)}
    if linear.features == "hedgehog":
        half = linear.feature_dim // 2
        extra = {"phi_q": (heads * half, width), "phi_k": (groups * half, width)}
    if extra and linear.window:
        extra["window_gate"] = (heads,)
    kept = {"sums": 0, "window": 2 * groups * width * bool(linear.window + linear.sinks)}
    return replace(attention, extra=extra, kept=kept, linear=linear)


def _linear_slots(name: str, attention: Attention, linear: Linear) -> list[Slot]:
    """What linear attention keeps: the last tokens, the first, and the sums of all others."""
    both = 2 * attention.num_key_value_heads * attention.head_dim
    slots = [
        Slot(f"{name}.{part}", per_token=both, window=count)
        for part, count in (("window", linear.window), ("sinks", linear.sinks))
        if count
    ]
    columns = attention.head_dim + (linear.norm == "denominator")
    sums = attention.num_key_value_heads * linear.feature_dim * columns
    return [*slots, Slot(f"{name}.sums", constant=sums, wide=True)] if sums else slots


def grouped_cache(shape: Shape) -> CacheSpec:
    """The cache of a model whose shape tells it: per site keys and values of its heads, or what else it keeps.

    Sites that read another layer's share its storage.
    """
    slots: list[Slot] = []
    for site, attention in shape.sites.items():
        if site.kind == "encoder":
            continue
        if attention.linear is not None:
            slots += _linear_slots(f"{site.kind}.{site.layer}", attention, attention.linear)
            continue
        for part, width in attention.cached.items():
            name = f"{site.kind}.{site.layer if attention.source is None else attention.source}.{part}"
            if site.kind == "cross":
                slots.append(Slot(name, per_encoder_token=width))
            else:
                # transformers shows `window - 1` tokens of a sliding layer, as a view of a storage that holds `window`
                slots.append(Slot(name, per_token=width, window=attention.window))
    return CacheSpec(tuple(slots))


# --- settings that differ by kind of site: `8`, or `self=8,cross=4` ---------------------------------------------


def per_kind(setting: str | int, kinds: Sequence[Kind], name: str) -> dict[Kind, int]:
    """Read `8` or `self=8,cross=4` as one positive whole number per kind of site.

    Raises SettingError when a kind is unknown or missing, or a number is not a positive whole one.
    """
    text = str(setting).strip()
    pairs = [part.split("=", 1) for part in text.split(",")]
    if all(len(pair) == 1 for pair in pairs) and len(pairs) == 1:
        pairs = [[kind, text] for kind in kinds]
    found: dict[Kind, int] = {}
    for pair in pairs:
        kind = next((known for known in kinds if known == pair[0].strip()), None)
        if len(pair) != 2 or kind is None:
            hint = did_you_mean(pair[0].strip(), kinds)
            raise SettingError(
                f"{name}: cannot read {text!r}",
                allowed=f"a whole number, or {','.join(f'{kind}=N' for kind in kinds)}",
                next=hint,
            )
        if kind in found:
            raise SettingError(f"{name}: {kind} is said twice", got=repr(text))
        if not pair[1].strip().isdecimal() or int(pair[1]) < 1:
            raise SettingError(f"{name}: {pair[1].strip()!r} is not a positive whole number", allowed="1 or more")
        found[kind] = int(pair[1])
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        raise SettingError(f"{name}: nothing said for {choices(missing)}", got=repr(text))
    return found


def divisors(number: int) -> list[int]:
    """All positive divisors, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


# --- what calibration can be asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputGram:
    """Second moments `E[x x^T]` of the input of the site's k and v, q's too but in cross-attention: `gram_DD`, with
    `mean_D`."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8 * (shape.sites[self.site].input_width + 1) * shape.sites[self.site].input_width


@dataclass(frozen=True)
class QueryGram:
    """Second moments of each query head before rotation: `gram_HEE`."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        attention = shape.sites[self.site]
        return 8 * attention.num_attention_heads * attention.head_dim**2


@dataclass(frozen=True)
class AttentionGram:
    """Second moments of the inputs averaged by attention, by that of each head in turn: `gram_DD`, with `mean_D`.

    Heads apart would be `H` times the memory, and made no student better (docs/log.md).
    """

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8 * (shape.sites[self.site].input_width + 1) * shape.sites[self.site].input_width


@dataclass(frozen=True)
class CrossGram:
    """Second moments `E[x_first x_second^T]` between the inputs of two sites: `gram_DD`."""

    first: Site
    second: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8 * shape.sites[self.first].input_width * shape.sites[self.second].input_width


@dataclass(frozen=True)
class SampledPairs:
    """`count` sampled tokens of a site before rotation: `q_NHE`, `k_NGE`, `row_N` of the text and `position_N` in
    it."""

    site: Site
    count: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float32 answer, rows and positions included."""
        attention = shape.sites[self.site]
        heads = attention.num_attention_heads + attention.num_key_value_heads
        return self.count * (4 * heads * attention.head_dim + 16)


Request = InputGram | QueryGram | AttentionGram | CrossGram | SampledPairs
"""What one pass over a text answers."""


@dataclass(frozen=True)
class FoldedKL:
    """KL to the teacher in nats per token when this site alone is folded to `heads` key/value heads: `kl`.

    For methods that have `with_heads`; measured once the requests are answered.
    """

    site: Site
    heads: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


@dataclass(frozen=True)
class ConvertedKL:
    """KL to the teacher in nats per token when these sites are converted together, and no others: `kl`.

    For methods that have `alone(config, shape, sites)`; measured once the requests are answered.
    """

    sites: tuple[Site, ...]

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


@dataclass(frozen=True)
class Reckoned:
    """What a method itself reckons of a site, from its tensors and the answers: what its `reckon` returns."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the answer: a table of a few numbers for each coordinate of the input."""
        attention = shape.sites[self.site]
        return 8 * attention.hidden_size * attention.head_dim


@dataclass(frozen=True)
class RecallDrop:
    """How much worse copies are when this site sees `window` tokens and the first `sinks` alone: `drop`, nats a token.

    Measured on rows whose end repeats their beginning, `tokens` in all, once the requests are answered.
    """

    site: Site
    window: int
    sinks: int
    tokens: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


Question = Request | FoldedKL | ConvertedKL | Reckoned | RecallDrop
Answers = Mapping[Question, Mapping[str, "Tensor"]]


# --- what uptraining does for a method -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stretch of uptraining.

    `share` is its part of all tokens (the shares of a method add up to 1); `losses` weighs `ce`, `kl` and
    `attention` (matching of attention outputs); `trainable` names roles, or is empty for every parameter; `converted`
    leaves out sites that the conversion did not touch, and all that is no attention; `rates` multiplies the learning
    rate by role; `finish` names the `end` of the method to call when it is over. `taught` lets attentions read what the
    teacher's did, where only their outputs are matched.
    """

    name: str
    share: float
    losses: Mapping[str, float]
    trainable: tuple[str, ...] = ()
    converted: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    finish: str | None = None
    taught: bool = False
