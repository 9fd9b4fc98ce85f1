"""cla: cross-layer attention, one layer's keys and values for several layers, from a trained checkpoint.

Of a group of layers the lowest owns keys and values; the others, its consumers, attend to the owner's with queries of
their own (Brandon et al. 2024, arXiv 2405.12981, section 3). Which layers make a group is a `layout`. Inits:

    fit    heads of owner and consumer are matched, the owner's head is the best that all who read it can be read off,
           and what each needs for that is folded into its q and o: closed forms (ours: docs/methods/cla.md, `sharing`)
    copy   the owner's, as they are
    mean   W_K = 1/n * sum of the group's W_K, W_V and biases alike (arXiv 2410.14442; 2406.09297)

`copy` and `mean` read weights alone and leave q and o as they are. Cached per token: `2 G E` elements for each owner.
A decode step reads as much as before: room is saved, not reads. Lossless where no layer shares; for `fit` also where
consumers' keys and values are linear images of the owner's (under RoPE: one complex factor for each plane of a key).

`layout auto` lets the teacher read with one group of neighbours sharing at a time, and takes of all cuts within the
`budget` the one of the smallest predicted KL, the sum over groups, by dynamic programming. The budget is a part of the
root teacher's cache, so a student of `gqa`, also one with heads of each layer's own, spends what is left of the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers, ConvertedKL, CrossGram, InputGram, QueryGram, Question, Request
from kvfold.contracts.site import QUERIES, REPAIRABLE, Roles, Shape, Site, SiteTensors
from kvfold.errors import SettingError, choices
from kvfold.solve import budget as budgets

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.solve.shared_layers import Shared

AUTO = "auto"
LAYOUTS = ("pairs", "keep_ends", "trailing", "sandwich")
SPAN = 4  # layers of the largest group that `auto` looks at


@dataclass(frozen=True)
class Config:
    """Which layers share, and what they start from."""

    share: int | None = field(
        default=None,
        metadata={"help": "Layers to one owner: 2, 3, 4, and 1 for none. Default 2; for --layout auto at most 4."},
    )
    layout: str = field(
        default="pairs",
        metadata={
            "help": "pairs (neighbours), keep_ends, trailing, sandwich, auto (by what sharing costs), or the layer "
            "that each layer reads: 0,0,2,2,4."
        },
    )
    init: Literal["fit", "copy", "mean"] = field(
        default="fit",
        metadata={"help": "What owners start from; without --calibration: copy, which reads weights alone."},
    )
    budget: float | None = field(
        default=None, metadata={"help": "For --layout auto: cache bytes, as a part of the root teacher's (0.25)."}
    )

    def check(self, shape: Shape) -> None:
        """Refuse groups that cannot be, layers that cannot share, and a budget that no groups fit."""
        if shape.owners:
            raise SettingError("layers of the source share already", where="cla", next="convert what it was made from")
        if any(site.kind != "self" for site in shape.sites):
            raise SettingError("layers share in decoders alone", where="cla", got=f"family {shape.family}")
        if any(attention.softcap is not None for attention in shape.sites.values()):
            raise SettingError(
                "logits are capped softly, and attention that shares has no cap", where="cla", next="choose gqa"
            )
        if self.share is not None and not 1 <= self.share <= shape.num_layers:
            raise SettingError("share cannot be met", where="cla", got=self.share, allowed=f"1 to {shape.num_layers}")
        if self.layout != AUTO and self.budget is not None:
            raise SettingError(
                f"budget says nothing about layout {self.layout}",
                where="cla",
                got=f"{self.budget:g}",
                next="say --layout auto, or leave out --budget",
            )
        if self.layout == AUTO:
            _check_budget(self, shape)
        for layer, source in enumerate(sources_of(self, shape)):
            if differs := _difference(shape, layer, source):
                raise SettingError(
                    f"layout {self.layout}: layer {layer} cannot read keys and values of layer {source}",
                    where="cla",
                    got=f"another {differs}",
                    next="share among layers that are alike, each named: --layout 0,0,2,2",
                )


# --- which layer reads which -----------------------------------------------------------------------------------------


def sources_of(config: Config, shape: Shape) -> list[int]:
    """The layer whose keys and values each layer reads; `auto`, before anything is measured, as alike as can be.

    Raises SettingError for a layout that is no layout of so many layers.
    """
    layers = shape.num_layers
    if config.layout == AUTO:
        return cheapest(config.budget or 1, shape, lambda group: (len(group) - 1) ** 2, config.share or SPAN)
    if config.layout not in LAYOUTS:
        return _said(config, layers)
    share = config.share or 2
    owners = -(-layers // share)
    if config.layout == "pairs":
        return [layer - layer % share for layer in range(layers)]
    if config.layout == "keep_ends":
        return [0, *(layer - (layer - 1) % share for layer in range(1, layers))]
    first = owners - 1 if config.layout == "trailing" else owners // 2  # the lowest of the one group
    above = layers if config.layout == "trailing" else layers - (owners - 1) // 2
    return [first if first < layer < above else layer for layer in range(layers)]


def _said(config: Config, layers: int) -> list[int]:
    """Read `0,0,2,2,4`."""
    parts = [part.strip() for part in config.layout.split(",")]
    if not all(part.isdecimal() for part in parts) or len(parts) != layers:
        raise SettingError(
            f"layout {config.layout!r} is none of {layers} layers",
            where="cla",
            allowed=f"{choices([*LAYOUTS, AUTO])}, or the layer that each layer reads: 0,0,2,2",
        )
    if config.share is not None:
        raise SettingError(f"layout {config.layout} says already who shares", where="cla", got=f"share {config.share}")
    sources = [int(part) for part in parts]
    for layer, source in enumerate(sources):
        if source > layer or sources[source] != source:
            raise SettingError(
                f"layout {config.layout}: layer {layer} cannot read layer {source}",
                where="cla",
                allowed="a layer below it that reads itself, or itself; layer 0 reads itself",
            )
    return sources


def _difference(shape: Shape, layer: int, source: int) -> str | None:
    """What keeps a layer from reading another's keys and values."""
    mine, theirs = shape.sites[Site(layer)], shape.sites[Site(source)]
    same = ("window", "rope", "head_dim", "num_attention_heads", "permutable", "norms", "biases")
    return next((name for name in same if getattr(mine, name) != getattr(theirs, name)), None)


def cheapest(budget: float, shape: Shape, price: Callable[[range], float], span: int) -> list[int]:
    """The cut into groups of neighbouring layers, of at most `span`, of the smallest price within the budget.

    The price of a cut is the sum of its groups'; of equal prices the one of the fewest bytes is taken. Exact: the
    best cut of the layers below each layer is kept for every number of bytes (Bellman 1957).
    """
    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]  # elements spent -> price and sources
    room = budgets.room(budget, shape)
    for end in range(1, shape.num_layers + 1):
        found: dict[int, tuple[float, list[int]]] = {}
        for first in range(max(0, end - span), end):
            if any(_difference(shape, layer, first) for layer in range(first, end)):
                continue
            asked, size = price(range(first, end)), _elements(shape, first)
            for spent, (paid, sources) in best[first].items():
                whole = spent + size
                if whole <= room and (whole not in found or paid + asked < found[whole][0]):
                    found[whole] = paid + asked, [*sources, *[first] * (end - first)]
        best.append(found)
    return min(((paid, spent, sources) for spent, (paid, sources) in best[-1].items()), default=(0.0, 0, []))[2]


def _elements(shape: Shape, layer: int) -> int:
    """What a layer that owns keys and values caches of a token."""
    attention = shape.sites[Site(layer)]
    return 2 * attention.num_key_value_heads * attention.head_dim


def _part(shape: Shape, sources: Sequence[int]) -> float:
    """What owners cache of a token, as a part of the root teacher's."""
    return sum(_elements(shape, layer) for layer in set(sources)) / budgets.whole(shape)


def _check_budget(config: Config, shape: Shape) -> None:
    span = config.share or SPAN
    least = cheapest(math.inf, shape, lambda group: _elements(shape, group[0]), span)
    smallest = math.ceil(1e4 * _part(shape, least)) / 1e4
    allowed = f"{smallest:g} ({span} layers to an owner) to 1, as a part of the root teacher's cache"
    if config.budget is None:
        raise SettingError("layout auto needs a budget", where="cla", next=f"add --budget, {allowed}")
    if not smallest <= config.budget <= 1:
        raise SettingError("budget cannot be met", where="cla", got=f"{config.budget:g}", allowed=allowed)


# --- the contract ----------------------------------------------------------------------------------------------------


def _moments(group: Sequence[Site]) -> list[Request]:
    """What the fit of a group reads."""
    alone: list[Request] = [request(site) for site in group for request in (InputGram, QueryGram)]
    return [*alone, *(CrossGram(group[0], site) for site in group[1:])]


def _measured(config: Config, shape: Shape, answers: Answers) -> list[int]:
    return cheapest(
        config.budget or 1, shape, lambda group: _price(tuple(map(Site, group)), answers), config.share or SPAN
    )


def _price(group: tuple[Site, ...], answers: Answers) -> float:
    """What a group costs in nats per token; one layer alone costs nothing."""
    return float(answers[ConvertedKL(group)]["kl"]) if len(group) > 1 else 0.0


def _groups(sources: Sequence[int]) -> list[tuple[Site, ...]]:
    """Every owner with its consumers, in order."""
    return [
        tuple(Site(layer) for layer, source in enumerate(sources) if source == owner) for owner in sorted(set(sources))
    ]


def _shared(group: Mapping[Site, SiteTensors], answers: Answers) -> Shared:
    """Fit a group by the moments of what the teacher read."""
    from kvfold.solve.normed_heads import share_normed
    from kvfold.solve.shared_layers import Reader, share

    owner = min(group)
    readers = []
    for site in sorted(group):
        seen = answers[InputGram(site)]
        cross = seen if site == owner else answers[CrossGram(owner, site)]
        queries = answers[QueryGram(site)]["gram_HEE"]
        tensors = group[site]
        readers.append(
            Reader(tensors.attention, tensors.roles, seen["gram_DD"], seen["mean_D"], cross["gram_DD"], queries)
        )
    return share_normed(readers) if readers[0].attention.norms == "all_heads" else share(readers)


def _owned(group: Mapping[Site, SiteTensors], config: Config) -> Roles:
    """The owner's roles: its own, or keys and values that are the mean of the group's."""
    owner = group[min(group)]
    if config.init == "copy":
        return owner.roles
    new = dict(owner.roles)
    for role in ("k", "v", "k_bias", "v_bias", "k_norm"):
        if role in new:
            heads = len(owner.roles[role]) // owner.attention.head_dim
            pooled = [_pooled(tensors.roles[role], tensors.attention.head_dim, heads) for tensors in group.values()]
            new[role] = sum(pooled[1:], pooled[0]) / len(pooled)
    return new


def _pooled(rows: Tensor, width: int, heads: int) -> Tensor:
    """So many heads in float64: the mean of neighbours, or each as often as it is needed."""
    have = rows.shape[0] // width
    blocks = rows.double().view(have, width, *rows.shape[1:])
    finer = math.lcm(have, heads)
    spread = blocks.repeat_interleave(finer // have, 0).view(heads, finer // heads, *blocks.shape[1:])
    return spread.mean(1).flatten(0, 1)


class CLA(Method[Config]):
    """Cross-layer attention: layers read the keys and values of another layer."""

    without_text: ClassVar = {"init": "copy"}
    published: ClassVar = ({"init": "copy"}, {"init": "mean"})  # what others start from

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Second moments of each group's inputs and queries; under `auto`, the cost of each group too."""
        if config.layout == AUTO:
            span = config.share or SPAN
            tried = [
                tuple(map(Site, range(first, end)))
                for first in range(shape.num_layers)
                for end in range(first + 2, min(first + span, shape.num_layers) + 1)
                if not any(_difference(shape, layer, first) for layer in range(first, end))
            ]
            requests = [request for group in tried if config.init == "fit" for request in _moments(group)]
            return [*dict.fromkeys(requests), *map(ConvertedKL, tried)]
        if config.init != "fit":
            return ()
        return [request for group in self.groups(config, shape) for request in _moments(group)]

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out the layer that each layer reads."""
        sources = _measured(config, shape, answers) if config.layout == AUTO and answers else sources_of(config, shape)
        return replace(config, share=None, layout=",".join(map(str, sources)), budget=None)

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """What `auto` chose and on what grounds, beside groups as alike as the budget allows."""
        if config.layout != AUTO:
            return {}
        told = {}
        for name, sources in (("chosen", _measured(config, shape, answers)), ("alike", sources_of(config, shape))):
            kl = sum(_price(group, answers) for group in _groups(sources))
            told[name] = {"layout": ",".join(map(str, sources)), "cache": _part(shape, sources), "kl": kl}
        prices = {
            f"{each.sites[0].layer} to {each.sites[-1].layer}": float(answer["kl"])
            for each, answer in answers.items()
            if isinstance(each, ConvertedKL)
        }
        return {"budget": config.budget, **told, "kl": prices}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """What a plan must say of groups that are not chosen yet, and of keys that cannot be fitted freely."""
        said = []
        if config.layout == AUTO:
            said.append(
                f"layout auto: shown is a budget of {config.budget:g} with groups as alike as can be; which layers "
                "share is measured when it is converted"
            )
        if config.init == "fit" and any(attention.norms == "pre_rope" for attention in shape.sites.values()):
            said.append(
                "init fit: keys are normed before they are rotated, so consumers read them under a turn of each plane "
                "and no scale; values, o and what is repaired are as in other models"
            )
        return said

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """Take each owner with its consumers; a layer that neither reads nor is read is left out."""
        return [group for group in _groups(sources_of(config, shape)) if len(group) > 1]

    def student(self, config: Config, shape: Shape) -> Student:
        """The model in which consumers make no keys and values. For `auto`: groups of equal size."""
        changed = {}
        for group in self.groups(config, shape):
            heads = shape.sites[group[0]].num_key_value_heads
            for site in group[1:]:
                changed[site] = replace(shape.sites[site], source=group[0].layer, num_key_value_heads=heads)
        return Student(shape.with_sites(changed))

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Mapping[Site, Roles]:
        """Make the keys and values of a group those of its lowest layer."""
        return self.fold(group, answers, config)[0]

    def fold(
        self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config
    ) -> tuple[Mapping[Site, Roles], Mapping[Site, Any]]:
        """Convert, and say of the owner what each of its heads lost of all that is read off it, and which lost nothing.

        Lost is a share of the weighted second moment; nothing means within rounding to the weights' format.
        Of a consumer it says which of the source's query heads stands in each place.
        """
        owner, *consumers = sorted(group)
        if config.init != "fit":
            new = {
                site: {role: each for role, each in group[site].roles.items() if role[0] not in "kv"}
                for site in consumers
            }
            return {owner: _owned(group, config), **new}, {}
        from kvfold.solve.shared_heads import losses

        made = _shared(group, answers)
        told: dict[Site, Any] = {site: {QUERIES: made.queries[number]} for number, site in enumerate(consumers, 1)}
        return dict(zip(sorted(group), made.roles, strict=True)), {
            owner: losses(made.heads, group[owner].roles["k"]),
            **told,
        }

    def repairs(self, config: Config) -> Sequence[str]:
        """Ask for everything to be repaired after a fit; what others publish is left as they publish it."""
        return REPAIRABLE if config.init == "fit" else ()

    def alone(self, config: Config, shape: Shape, sites: Sequence[Site]) -> Config:
        """The same settings with one group and no other: under these ConvertedKL is measured."""
        layers = [site.layer for site in sites]
        sources = [layers[0] if layer in layers else layer for layer in range(shape.num_layers)]
        return replace(config, share=None, layout=",".join(map(str, sources)), budget=None)

    def lossless(self, shape: Shape) -> Config:
        """Let every layer own its keys and values."""
        return Config(share=1)

    def example(self, shape: Shape) -> Config:
        """Layers in pairs."""
        return Config(share=2)


METHOD = CLA()
