"""supra: softmax attention replaced by linear attention, whose cache is a state of a fixed size.

Mercat et al. 2024, arXiv 2405.06640 (SUPRA), and Zhang et al. 2024, arXiv 2410.10254 (LoLCATs). A score becomes a
product of features of the query and of the key, so that all past keys and values enter one sum (`attention.linear`):

    o_t = norm( sum_j gamma^(t-j) phi(q_t).phi(k_j) v_j ) = norm( phi(q_t) S_t ),   S_t = gamma S_(t-1) + phi(k_t) v_t^T

    preset  supra   phi(x) = rotate(relu(W x + b)), gamma fixed for each key head, GroupNorm in place of the denominator
            hybrid  softmax over the last `window` tokens and the first `sinks`; features [softmax(W x), softmax(-W x)]
                    (Hedgehog, arXiv 2402.04347) of rotated x for all others; one denominator, and a learned gate

Every part is a setting of its own. `features none` leaves the window and the sinks alone (arXiv 2309.17453), the
baseline that the others must beat. W starts as the identity. The weights of features sum to far more than those of a
softmax: with `gate` as LoLCATs starts it, an untrained student is worse than its window alone; with ours it is not.

Cached per sequence and layer, whatever its length: for each key head `feature_dim x head_dim` numbers in float32 (and
`feature_dim` for the denominator), and the keys and values of window and sinks. Query heads of a group share keys,
values, the keys' feature map and the decay, so they share the sums. Below some length this is more than the cache that
it replaces; the plan says which. Copying from far back suffers most. By default uptraining first fits the feature maps
of `hybrid` to the teacher's attention outputs.

Lossless while nothing has left the window: a window as long as the text gives the teacher. `keep_layers` keeps layers
as they are: a list, or `auto:N`, the N layers whose window-only attention hurts copying most.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.method import Limit, Method, Student, refuse, refuse_mixed_heads
from kvfold.contracts.requests import Answers, RecallDrop
from kvfold.contracts.site import DTYPE_BYTES, Attention, Linear, Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import Stage
from kvfold.contracts.student_site import with_linear
from kvfold.errors import SettingError
from kvfold.settings import setting

PRESET: Literal["preset"] = "preset"
AUTO = "auto:"

PRESETS: Mapping[str, Linear] = {
    "supra": Linear("relu", 0, rope="after", norm="groupnorm", decay="slopes", window=0, sinks=0),
    "hybrid": Linear("hedgehog", 0, rope="before", norm="denominator", decay="none", window=64, sinks=4),
}

LIMITS: Sequence[Limit] = (
    (
        "only causal self-attention with RoPE can be linear",
        lambda site, attention: site.kind != "self" or attention.rope is None,
    ),
    ("it reads the keys and values of another layer", lambda _, attention: attention.source is not None),
    ("logits have a soft cap, and linear attention has none", lambda _, attention: attention.softcap is not None),
    ("a sliding window bounds its cache already", lambda _, attention: attention.window is not None),
)


@dataclass(frozen=True)
class Config:
    """A preset, and what differs from it."""

    preset: Literal["supra", "hybrid"] = setting("supra", "As SUPRA published it, or a hybrid with a softmax window.")
    features: Literal["preset", "relu", "hedgehog", "none"] = setting(
        PRESET, "Feature map of queries and keys; none: the window and the sinks alone."
    )
    feature_dim: int | None = setting(
        None, "Width of a feature vector. Default: the head width; for hedgehog twice that."
    )
    rope: Literal["preset", "before", "after"] = setting(
        PRESET, "Apply RoPE before the feature map, or to the features."
    )
    norm: Literal["preset", "groupnorm", "denominator"] = setting(
        PRESET, "What normalises the output: GroupNorm, or the sum of weights."
    )
    decay: Literal["preset", "none", "slopes", "retnet"] = setting(
        PRESET, "Decay of the past by key head: none, slopes (ALiBi), or retnet."
    )
    window: int | None = setting(None, "Last tokens that softmax sees. Default: 0; for hybrid 64.")
    sinks: int | None = setting(None, "First tokens that softmax sees. Default: 0; for hybrid 4.")
    gate: float = setting(50.0, "Initial factor of the window's weights beside the features'; LoLCATs: 0.1.")
    keep_layers: str | int | None = setting(
        None, "Layers that keep softmax attention: 0,5, or auto:2 (the two that copying needs most). Default: none."
    )
    recall_tokens: int = setting(16_384, "Tokens on which --keep-layers auto measures each layer.")

    def check(self, shape: Shape) -> None:
        """Refuse sources whose attention bounds itself or is shared, and settings that contradict each other."""
        refuse(shape, "supra", LIMITS)
        refuse_mixed_heads(shape, "supra")
        if self.recall_tokens < 1:
            raise SettingError("recall_tokens must be at least 1", where="supra", got=self.recall_tokens)
        if not 0 < self.gate < math.inf:
            raise SettingError("gate must be a positive number", where="supra", got=f"{self.gate:g}")
        if not METHOD.groups(self, shape):
            raise SettingError(
                f"keep_layers {self.keep_layers} leaves no layer to convert", where="supra", next="leave one out"
            )
        attention = next(iter(shape.sites.values()))
        linear = linear_of(self, attention)
        for name, value in (("window", linear.window), ("sinks", linear.sinks)):
            if value < 0:
                raise SettingError(f"{name} must be at least 0", where="supra", got=value)
        if problem := _contradiction(linear, attention.head_dim, self.feature_dim):
            raise SettingError(problem, where="supra", next="leave one of them to the preset, or set --preset hybrid")


def _contradiction(linear: Linear, head_dim: int, given: int | None) -> str | None:
    """Parts that do not go together; `given` is the setting feature_dim."""
    featured = linear.features != "none"
    problems = {
        f"sinks {linear.sinks} need a window, and window is 0": linear.sinks and not linear.window,
        "features none leaves the window alone, and window is 0": not featured and not linear.window,
        f"norm groupnorm has no denominator that a window {linear.window} could share": (
            featured and linear.norm == "groupnorm" and linear.window
        ),
        "norm denominator needs positive scores, and with rope after features they have either sign": (
            featured and linear.rope == "after" and linear.norm == "denominator"
        ),
        f"feature_dim {given} does not apply to features {linear.features}": (
            given is not None and (given < 1 or not featured)
        ),
        f"feature_dim {given} cannot be rotated as heads of {head_dim} are": (
            linear.rope == "after" and linear.feature_dim not in (0, head_dim)
        ),
        f"feature_dim {given} is odd, and hedgehog takes both signs of each number": (
            linear.features == "hedgehog" and linear.feature_dim % 2
        ),
    }
    return next((problem for problem, holds in problems.items() if holds), None)


def linear_of(config: Config, attention: Attention) -> Linear:
    """The linear attention that a layer gets: the settings, and the preset for the rest."""
    parts = {"features", "rope", "norm", "decay", "window", "sinks"}
    given = {name: value for name, value in asdict(config).items() if name in parts and value not in (PRESET, None)}
    linear = replace(PRESETS[config.preset], **given)
    if linear.features == "none":  # nothing is rotated, normed or forgotten: one spelling for one student
        plain = PRESETS["hybrid"]
        return replace(linear, rope=plain.rope, norm=plain.norm, decay=plain.decay)
    own = attention.head_dim if linear.features == "relu" else 2 * attention.head_dim
    return replace(linear, feature_dim=own if config.feature_dim is None else config.feature_dim)


def kept_layers(config: Config, shape: Shape) -> set[int]:
    """The layers that stay softmax. Of `auto`, unmeasured: the last ones.

    Raises SettingError for a setting that is no list of layers.
    """
    text = "" if config.keep_layers is None else str(config.keep_layers).strip()
    layers = len(shape.sites)
    count = text.removeprefix(AUTO)
    words = [word.strip() for word in text.split(",")] if text else []
    if text.startswith(AUTO) and count.isdecimal() and 1 <= int(count) < layers:
        return set(range(layers - int(count), layers))
    if not all(word.isdecimal() and int(word) < layers for word in words):
        raise SettingError(
            f"keep_layers {text} does not name layers",
            where="supra",
            allowed=f"layers 0 to {layers - 1} between commas, or auto:1 to auto:{layers - 1}",
        )
    return {int(word) for word in words}


def _chooses(config: Config) -> bool:
    return str(config.keep_layers).startswith(AUTO)


def break_even(before: CacheSpec, after: CacheSpec, itemsize: int) -> int:
    """The smallest length in tokens from which on one cache is no larger than the other."""

    def smaller(length: int) -> bool:
        return after.bytes(length, itemsize=itemsize) <= before.bytes(length, itemsize=itemsize)

    high = 1
    while not smaller(high):
        high *= 2
    return high // 2 + 1 + bisect_left(range(high // 2 + 1, high), True, key=smaller)


class SUPRA(Method[Config]):
    """Linear attention with a state of fixed size, behind a softmax window where one is kept."""

    def needs(self, config: Config, shape: Shape) -> Sequence[RecallDrop]:
        """What copying loses where a layer sees its window alone, if layers are chosen by that."""
        if not _chooses(config):
            return ()
        linear = linear_of(config, next(iter(shape.sites.values())))
        near = max(linear.window, 1)
        return [RecallDrop(site, near, linear.sinks, config.recall_tokens) for site in sorted(shape.sites)]

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out the preset, and which layers stay."""
        linear, keep = linear_of(config, next(iter(shape.sites.values()))), config.keep_layers
        if _chooses(config):
            drops = {each.site.layer: float(answers[each]["drop"]) for each in self.needs(config, shape)}
            most = sorted(drops, key=lambda layer: (-drops[layer], layer))[: len(kept_layers(config, shape))]
            keep = ",".join(map(str, sorted(most)))
        return replace(config, **{**asdict(linear), "feature_dim": linear.feature_dim or None, "keep_layers": keep})

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """What copying loses by each layer, in nats per token, if layers are chosen by that."""
        drops = {str(each.site): float(answers[each]["drop"]) for each in self.needs(config, shape)}
        return {"recall_drops": drops} if drops else {}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """The length from which on the student's cache is smaller, and that layers are not chosen yet."""
        after, before = self.cache_spec(config, shape), grouped_cache(shape)
        itemsize = DTYPE_BYTES[shape.dtype]
        notes = []
        if (length := break_even(before, after, itemsize)) > 1:
            notes.append(
                f"below {length:,} tokens the cache is larger than the one that it replaces: sums take "
                f"{after.bytes(0, itemsize=itemsize):,} bytes a sequence at any length"
            )
        if _chooses(config):
            notes.append(
                f"keep_layers {config.keep_layers}: the conversion measures which layers; their bytes are the same"
            )
        return notes

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """Every site alone, except those that stay."""
        stay = kept_layers(config, shape)
        return [(site,) for site in sorted(shape.sites) if site.layer not in stay]

    def student(self, config: Config, shape: Shape) -> Student:
        """The same model with linear attention in those layers, an architecture of kvfold's own."""
        attentions = {site: shape.sites[site] for (site,) in self.groups(config, shape)}
        return Student(
            shape.with_sites({site: with_linear(each, linear_of(config, each)) for site, each in attentions.items()})
        )

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Add the feature maps, which start as the identity, and the gate."""
        import torch  # a plan works without

        made: dict[Site, Roles] = {}
        for site, tensors in group.items():
            attention, roles = tensors.attention, dict(tensors.roles)
            for role, shape in with_linear(attention, linear_of(config, attention)).extra.items():
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
        """The user's own stage for `supra`, as published. For `hybrid`, attention outputs first, then the logits.

        In the first stage feature maps and gates alone train, each layer on the teacher's input of that layer, at ten
        times the learning rate.
        """
        if config.preset == "supra":
            return ()
        last = Stage("distil", 0.75, {"kl": 1.0, "ce": 0.3})
        preset = PRESETS[config.preset]
        features = preset.features if config.features == PRESET else config.features
        if features == "none":
            return (replace(last, share=1.0),)
        trainable: tuple[str, ...] = ("phi", "phi_bias") if features == "relu" else ("phi_q", "phi_k")
        if preset.window if config.window is None else config.window:
            trainable = (*trainable, "window_gate")
        rates = dict.fromkeys(trainable, 10.0)
        return Stage("transfer", 0.25, {"attention": 1.0}, trainable, rates=rates, taught=True), last

    def lossless(self, shape: Shape) -> Config:
        """A window over everything that the model can read."""
        return Config(preset="hybrid", window=shape.max_positions)

    def example(self, shape: Shape) -> Config:
        """A short window and two sinks."""
        return Config(preset="hybrid", window=3, sinks=2)


METHOD = SUPRA()
