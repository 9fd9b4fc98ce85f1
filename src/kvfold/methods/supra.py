"""supra: softmax attention replaced by linear attention, whose cache is a state of a fixed size.

Mercat et al. 2024, arXiv 2405.06640 (SUPRA), and Zhang et al. 2024, arXiv 2410.10254 (LoLCATs). A score becomes a
product of features of the query and of the key, and with that all keys and values of the past one sum
(`attention.linear`):

    o_t = norm( sum_j gamma^(t-j) phi(q_t).phi(k_j) v_j ) = norm( phi(q_t) S_t ),   S_t = gamma S_(t-1) + phi(k_t) v_t^T

    preset  supra   phi(x) = rotate(relu(W x + b)), gamma fixed for each key head, GroupNorm in place of the denominator
            hybrid  softmax over the last `window` tokens and the first `sinks`, features [softmax(W x), softmax(-W x)]
                    (Hedgehog, arXiv 2402.04347) of rotated x for all others, one denominator, a learned gate between

Every part is a setting of its own; `features none` leaves the window and the sinks alone, which is what both must beat
(arXiv 2309.17453). W begins as the identity. Weights of features sum to far more than those of a softmax: with the
window's `gate` as LoLCATs starts it an untrained student is worse than its window alone, with ours it is not.

Cached per sequence and layer, whatever its length: of each key head `feature_dim x head_dim` numbers in float32 (and
`feature_dim` for the denominator), and the keys and values of window and sinks. Query heads of a group share keys,
values, the keys' map and the decay, so they share the sums too. Below some length that is more than the cache that it
replaces: a plan says which. Uptraining by default teaches the maps of `hybrid` the teacher's attention outputs first.

Lossless while nothing has left the window: a window as long as the text is the teacher. `keep_layers` leaves layers as
they are: a list, or `auto:N`, the N whose copies of what was read long ago suffer most when they see a window alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers, Question, RecallDrop
from kvfold.contracts.runtimes import with_linear
from kvfold.contracts.site import DTYPE_BYTES, Attention, Linear, Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import Stage
from kvfold.errors import SettingError

if TYPE_CHECKING:
    pass

PRESET: Literal["preset"] = "preset"
AUTO = "auto:"

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "supra": {
        "features": "relu",
        "rope": "after",
        "norm": "groupnorm",
        "decay": "slopes",
        "window": 0,
        "sinks": 0,
    },
    "hybrid": {
        "features": "hedgehog",
        "rope": "before",
        "norm": "denominator",
        "decay": "none",
        "window": 64,
        "sinks": 4,
    },
}


@dataclass(frozen=True)
class Config:
    """A preset, and what differs from it."""

    preset: Literal["supra", "hybrid"] = field(
        default="supra", metadata={"help": "supra (as published), or hybrid (a softmax window beside the sums)."}
    )
    features: Literal["preset", "relu", "hedgehog", "none"] = field(
        default=PRESET, metadata={"help": "What scores are products of; none: the window and the sinks alone."}
    )
    feature_dim: int | None = field(
        default=None, metadata={"help": "Numbers of a feature vector; the head's width, twice that for hedgehog."}
    )
    rope: Literal["preset", "before", "after"] = field(
        default=PRESET, metadata={"help": "Rotate before features are made, or the features."}
    )
    norm: Literal["preset", "groupnorm", "denominator"] = field(
        default=PRESET, metadata={"help": "What the sum of values is divided by."}
    )
    decay: Literal["preset", "none", "slopes", "retnet"] = field(
        default=PRESET, metadata={"help": "How the past fades, by key head: not, as in ALiBi, or as in RetNet."}
    )
    window: int | None = field(default=None, metadata={"help": "Last tokens that are seen by softmax; 64 for hybrid."})
    sinks: int | None = field(default=None, metadata={"help": "First tokens that are too; 4 for hybrid."})
    gate: float = field(
        default=50.0, metadata={"help": "What the window counts before training, beside features; LoLCATs: 0.1."}
    )
    keep_layers: str | int | None = field(
        default=None, metadata={"help": "Layers that stay softmax: 0,5 or auto:2 (those that copying needs most)."}
    )
    recall_tokens: int = field(
        default=16_384, metadata={"help": "Tokens of copies that --keep-layers auto measures each layer on."}
    )

    def check(self, shape: Shape) -> None:
        """Refuse sources whose attention bounds itself or is shared, and settings that contradict each other."""
        for site, attention in shape.sites.items():
            _check_site(site, attention)
        if len({attention.num_key_value_heads for attention in shape.sites.values()}) > 1:
            raise SettingError(
                "layers differ in their key/value heads",
                where="supra",
                next="convert a checkpoint with one number for all layers",
            )
        if self.recall_tokens < 1:
            raise SettingError(
                f"recall_tokens {self.recall_tokens} measure nothing", where="supra", allowed="1 or more"
            )
        if not 0 < self.gate < math.inf:
            raise SettingError(f"gate {self.gate:g} cannot be", where="supra", allowed="a positive number")
        if not METHOD.groups(self, shape):
            raise SettingError(
                f"keep_layers {self.keep_layers} leaves no layer to convert", where="supra", next="leave one out"
            )
        head_dim = next(iter(shape.sites.values())).head_dim
        _check_parts(_linear(self, head_dim), head_dim, self.feature_dim)


def _check_site(site: Site, attention: Attention) -> None:
    problem = None
    if site.kind != "self" or attention.rope is None:
        problem = "only the causal self-attention of a decoder with RoPE can be"
    elif attention.source is not None:
        problem = f"keys and values are those of layer {attention.source}"
    elif attention.softcap is not None:
        problem = "logits are capped softly, and its attention has no cap"
    elif attention.window is not None:
        problem = f"a sliding window of {attention.window} tokens bounds its cache already"
    if problem:
        raise SettingError(f"{site} cannot be linear: {problem}", where="supra", next="choose gqa")


def _check_parts(linear: Linear, head_dim: int, said: int | None) -> None:
    """Refuse parts that do not go together."""
    problem = None
    for name in ("window", "sinks"):
        if getattr(linear, name) < 0:
            raise SettingError(f"{name} {getattr(linear, name)} cannot be", where="supra", allowed="0 or more")
    if linear.sinks and not linear.window:
        problem = f"sinks {linear.sinks} stand beside a window, and window is 0"
    elif linear.features == "none" and not linear.window:
        problem = "features none leave the window alone, and window is 0"
    elif linear.features != "none" and linear.norm == "groupnorm" and linear.window:
        problem = f"norm groupnorm has no denominator that a window {linear.window} could share"
    elif linear.features != "none" and linear.rope == "after" and linear.norm == "denominator":
        problem = "norm denominator needs positive scores, and with rope after features they have either sign"
    elif said is not None and (said < 1 or linear.features == "none"):
        problem = f"feature_dim {said} cannot be of features {linear.features}"
    elif linear.rope == "after" and linear.feature_dim not in (0, head_dim):
        problem = f"feature_dim {said} cannot be rotated as heads of {head_dim} are"
    elif linear.features == "hedgehog" and linear.feature_dim % 2:
        problem = f"feature_dim {said} is odd, and hedgehog takes both signs of each number"
    if problem:
        raise SettingError(problem, where="supra", next="leave one of them to the preset, or say --preset hybrid")


def _linear(config: Config, head_dim: int) -> Linear:
    """The settings with what the preset says of the rest."""
    said = {name: getattr(config, name) for name in PRESETS[config.preset]}
    found = {**PRESETS[config.preset], **{name: value for name, value in said.items() if value not in (PRESET, None)}}
    if found["features"] == "none":  # nothing is rotated, normed or forgotten: one name for one student
        found |= {name: PRESETS["hybrid"][name] for name in ("rope", "norm", "decay")}
    width = {"relu": head_dim, "hedgehog": 2 * head_dim, "none": 0}[found["features"]]
    if config.feature_dim is not None and found["features"] != "none":
        width = config.feature_dim
    return Linear(feature_dim=width, **found)


def kept(config: Config, shape: Shape) -> set[int]:
    """The layers that stay as they are; of `auto`, before it is resolved, the last ones.

    Raises SettingError for what is no list of layers.
    """
    text = "" if config.keep_layers is None else str(config.keep_layers).strip()
    layers = len(shape.sites)
    if text.startswith(AUTO):
        count = text.removeprefix(AUTO)
        if not count.isdecimal() or not 1 <= int(count) < layers:
            raise SettingError(
                f"keep_layers {text} cannot be", where="supra", allowed=f"auto:1 to auto:{layers - 1}, or a list"
            )
        return set(range(layers - int(count), layers))
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdecimal() and int(word) < layers for word in words):
        raise SettingError(
            f"keep_layers {text} cannot be",
            where="supra",
            allowed=f"layers 0 to {layers - 1} between commas, or auto:2",
        )
    return {int(word) for word in words}


# --- the contract ----------------------------------------------------------------------------------------------------


def _chooses(config: Config) -> bool:
    return str(config.keep_layers).startswith(AUTO)


def break_even(before: CacheSpec, after: CacheSpec, itemsize: int) -> int:
    """The smallest length from which on one cache is no larger than the other, in tokens."""

    def smaller(length: int) -> bool:
        return after.bytes(length, itemsize=itemsize) <= before.bytes(length, itemsize=itemsize)

    low, high = 0, 1
    while not smaller(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if smaller(middle) else (middle, high)
    return high


class SUPRA(Method[Config]):
    """Linear attention with a state of fixed size, behind a softmax window where one is kept."""

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Ask what copying loses where a layer sees its window alone, when layers are to be chosen by that."""
        if not _chooses(config):
            return ()
        linear = _linear(config, next(iter(shape.sites.values())).head_dim)
        near = max(linear.window, 1)
        return [RecallDrop(site, near, linear.sinks, config.recall_tokens) for site in sorted(shape.sites)]

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out what the preset says, and which layers stay."""
        linear = _linear(config, next(iter(shape.sites.values())).head_dim)
        keep = config.keep_layers
        if _chooses(config):
            asked = [each for each in self.needs(config, shape) if isinstance(each, RecallDrop)]
            drops = {each.site.layer: float(answers[each]["drop"]) for each in asked}
            most = sorted(drops, key=lambda layer: (-drops[layer], layer))[: len(kept(config, shape))]
            keep = ",".join(map(str, sorted(most)))
        return replace(
            config,
            features=linear.features,
            feature_dim=linear.feature_dim or None,
            rope=linear.rope,
            norm=linear.norm,
            decay=linear.decay,
            window=linear.window,
            sinks=linear.sinks,
            keep_layers=keep,
        )

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """What copying loses by each layer, in nats a token, where that was asked."""
        if not _chooses(config):
            return {}
        drops = {each: answers[each]["drop"] for each in self.needs(config, shape) if isinstance(each, RecallDrop)}
        return {"recall_drops": {str(each.site): float(drop) for each, drop in drops.items()}}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """From which length on the student's cache is smaller, and that layers are not chosen yet."""
        after, before = self.cache_spec(config, shape), grouped_cache(shape)
        itemsize = DTYPE_BYTES[shape.dtype]
        constant = after.bytes(0, itemsize=itemsize)
        said = []
        if (length := break_even(before, after, itemsize)) > 1:
            said.append(
                f"below {length:,} tokens the cache is larger than the one that it replaces: sums take {constant:,} "
                "bytes a sequence at any length"
            )
        if _chooses(config):
            said.append(
                f"keep_layers {config.keep_layers}: which ones is measured when it is converted, the bytes are these"
            )
        return said

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """Take every site alone, but for those that stay."""
        stay = kept(config, shape)
        return [(site,) for site in sorted(shape.sites) if site.layer not in stay]

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model with linear attention in those layers, an architecture of our own."""
        changed = {}
        for (site,) in self.groups(config, shape):
            attention = shape.sites[site]
            changed[site] = with_linear(attention, _linear(config, attention.head_dim))
        return Student(shape.with_sites(changed))

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Add the maps, which begin as the identity, and the gate."""
        import torch

        made: dict[Site, Roles] = {}
        for site, tensors in group.items():
            attention = tensors.attention
            roles = dict(tensors.roles)
            for role, shape in with_linear(attention, _linear(config, attention.head_dim)).extra.items():
                if role == "window_gate":
                    roles[role] = torch.full(shape, config.gate, dtype=torch.float64).log()
                elif role == "phi_bias":
                    roles[role] = torch.zeros(shape, dtype=torch.float64)
                else:
                    heads = attention.num_attention_heads if role == "phi_q" else attention.num_key_value_heads
                    eye_FE = torch.eye(shape[0] // heads, attention.head_dim, dtype=torch.float64)
                    roles[role] = eye_FE.repeat(heads, 1)
            made[site] = roles
        return made

    def stages(self, config: Config) -> Sequence[Stage]:
        """Leave `supra` to the user, as published: one objective on everything. `hybrid`: attention outputs first.

        Maps and gates alone learn those, each layer on what the teacher's reads, at ten times the learning rate; then
        everything learns what the teacher says.
        """
        if config.preset == "supra":
            return ()
        last = Stage("distil", 0.75, {"kl": 1.0, "ce": 0.3})
        features = PRESETS[config.preset]["features"] if config.features == PRESET else config.features
        if features == "none":
            return (replace(last, share=1.0),)
        maps = ("phi", "phi_bias") if features == "relu" else ("phi_q", "phi_k")
        window = PRESETS[config.preset]["window"] if config.window is None else config.window
        learns = (*maps, "window_gate") if window else maps
        rates = dict.fromkeys(learns, 10.0)
        return Stage("transfer", 0.25, {"attention": 1.0}, learns, rates=rates, taught=True), last

    def lossless(self, shape: Shape) -> Config:
        """Keep a window over everything that the model can read."""
        return Config(preset="hybrid", window=shape.max_positions)

    def example(self, shape: Shape) -> Config:
        """A short window and two sinks."""
        return Config(preset="hybrid", window=3, sinks=2)


METHOD = SUPRA()
