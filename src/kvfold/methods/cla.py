"""cla: cross-layer attention, one layer's keys and values for several layers, from a trained checkpoint.

In a group of layers the lowest is the owner: it makes keys and values. The others, its consumers, attend to the owner's
with queries of their own (Brandon et al. 2024, arXiv 2405.12981, section 3). `layout` names the groups, and `init` what
the owner starts from:

    fit    heads of owner and consumers are matched, the owner's head is the best one from which all its readers' heads
           can be reconstructed, each reconstruction folded into the reader's q and o  (ours: docs/methods/cla.md)
    copy   the owner's own, as they are
    mean   W_K = 1/n * sum of the group's W_K, W_V and biases alike (arXiv 2410.14442; 2406.09297)

`copy` and `mean` read weights alone and leave q and o as they are. Cached per token: `2 G E` elements for each owner.
Each layer still reads a cache of that size, so memory shrinks and decoding does not speed up. Lossless where no layer
shares; for `fit` also where consumers' keys and values are linear images of the owner's (under RoPE: one complex factor
for each plane of a key). It loses most where inputs change much between the layers of a group, as in the first layers.

`layout auto` converts one group of neighbours at a time, measures the KL to the teacher, and takes the partition within
the `budget` of the smallest predicted KL, the sum over groups, by dynamic programming. The budget is a part of the root
teacher's cache, so a student of `gqa`, also one with different heads by layer, spends what is left of the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from kvfold.contracts.cache import root_elements
from kvfold.contracts.method import Folded, Limit, Method, Student, note_normed_keys, refuse
from kvfold.contracts.requests import Answers, ConvertedKL, CrossGram, InputGram, QueryGram, Question, Request
from kvfold.contracts.site import QUERIES, REPAIRABLE, Roles, Shape, Site, SiteTensors
from kvfold.errors import SettingError, choices
from kvfold.settings import setting
from kvfold.solve import budget as budgets

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
LAYOUTS = ("pairs", "keep_ends", "trailing", "sandwich")
SPAN = 4  # layers of the largest group that `auto` tries
LIMITS: Sequence[Limit] = (
    ("only layers of a decoder-only model can share", lambda site, _: site.kind != "self"),
    ("logits have a soft cap, and attention that shares has none", lambda _, attention: attention.softcap is not None),
)


@dataclass(frozen=True)
class Config:
    """Which layers share, and what they start from."""

    share: int | None = setting(
        None, "Layers per owner; 1: no layer shares. Default: 2; for --layout auto at most this many, 4."
    )
    layout: str = setting(
        "pairs",
        "Which layers share: pairs (neighbours), keep_ends, trailing, sandwich, auto (measured, within --budget), "
        "or the layer that each layer reads, e.g. 0,0,2,2,4.",
    )
    init: Literal["fit", "copy", "mean"] = setting(
        "fit", "What owners start from. Without --calibration: copy, which reads weights alone."
    )
    budget: float | None = setting(
        None, "Cache bytes as a fraction of the root teacher's, e.g. 0.25; required for --layout auto."
    )

    def check(self, shape: Shape) -> None:
        """Refuse layers that cannot share, groups that do not fit the model, and a budget that no groups fit."""
        if shape.owners:
            raise SettingError("layers of the source share already", where="cla", next="convert what it was made from")
        refuse(shape, "cla", LIMITS)
        if self.share is not None and not 1 <= self.share <= shape.num_layers:
            raise SettingError("share is out of range", where="cla", got=self.share, allowed=f"1 to {shape.num_layers}")
        if self.layout == AUTO:
            span = self.share or SPAN
            fewest = set(cheapest(math.inf, shape, lambda group: _elements(shape, group[:1]), span))
            least, smallest = _elements(shape, fewest), f"{span} layers to an owner"
            budgets.check(self.budget, shape, least, where="cla", setting="layout", smallest=smallest)
        else:
            budgets.refuse(self.budget, where="cla", setting="layout", value=self.layout)
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
    """The layer whose keys and values each layer reads. Of `auto`, unmeasured: groups as even as the budget allows.

    Raises SettingError for a layout that does not fit the number of layers.
    """
    layers = shape.num_layers
    if config.layout == AUTO:
        return cheapest(config.budget or 1, shape, lambda group: (len(group) - 1) ** 2, config.share or SPAN)
    if config.layout not in LAYOUTS:
        return _listed(config, layers)
    share = config.share or 2
    owners = -(-layers // share)
    if config.layout == "pairs":
        return [layer - layer % share for layer in range(layers)]
    if config.layout == "keep_ends":
        return [0, *(layer - (layer - 1) % share for layer in range(1, layers))]
    first = owners - 1 if config.layout == "trailing" else owners // 2  # the lowest layer of the one group
    above = layers if config.layout == "trailing" else layers - (owners - 1) // 2
    return [first if first < layer < above else layer for layer in range(layers)]


def _listed(config: Config, layers: int) -> list[int]:
    """Read `0,0,2,2,4`."""
    parts = [part.strip() for part in config.layout.split(",")]
    if not all(part.isdecimal() for part in parts) or len(parts) != layers:
        raise SettingError(
            f"layout {config.layout!r} does not fit {layers} layers",
            where="cla",
            allowed=f"{choices([*LAYOUTS, AUTO])}, or the layer that each layer reads: 0,0,2,2",
        )
    if config.share is not None:
        raise SettingError(f"layout {config.layout} names the groups already", where="cla", got=f"share {config.share}")
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
    """The fact that keeps a layer from reading another's keys and values."""
    mine, theirs = shape.sites[Site(layer)], shape.sites[Site(source)]
    same = ("window", "rope", "head_dim", "num_attention_heads", "norms", "biases")
    return next((name for name in same if getattr(mine, name) != getattr(theirs, name)), None)


def cheapest(budget: float, shape: Shape, price: Callable[[range], float], span: int) -> list[int]:
    """The partition into groups of neighbouring layers, of at most `span`, of the smallest price within the budget.

    The price of a partition is the sum of its groups'; among equal prices, the fewest bytes win. Exact: the best
    partition of the layers below each layer is kept for every number of bytes (Bellman 1957).
    """
    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]  # elements spent -> price and sources
    room = budgets.room(budget, shape)
    for end in range(1, shape.num_layers + 1):
        found: dict[int, tuple[float, list[int]]] = {}
        for first in range(max(0, end - span), end):
            if any(_difference(shape, layer, first) for layer in range(first, end)):
                continue
            more, size = price(range(first, end)), _elements(shape, [first])
            for spent, (paid, sources) in best[first].items():
                whole = spent + size
                if whole <= room and (whole not in found or paid + more < found[whole][0]):
                    found[whole] = paid + more, [*sources, *[first] * (end - first)]
        best.append(found)
    return min(((paid, spent, sources) for spent, (paid, sources) in best[-1].items()), default=(0.0, 0, []))[2]


def _elements(shape: Shape, owners: Iterable[int]) -> int:
    """Elements per token that these layers cache."""
    return sum(shape.sites[Site(layer)].cached_elements for layer in owners)


def _measured(config: Config, shape: Shape, answers: Answers) -> list[int]:
    """The layout that `auto` chooses."""
    span = config.share or SPAN
    return cheapest(config.budget or 1, shape, lambda group: _price(tuple(map(Site, group)), answers), span)


def _price(group: tuple[Site, ...], answers: Answers) -> float:
    """The KL of a group in nats per token; 0 for one layer alone."""
    return float(answers[ConvertedKL(group)]["kl"]) if len(group) > 1 else 0.0


def _groups(sources: Sequence[int]) -> list[tuple[Site, ...]]:
    """Every owner with its consumers, in order."""
    return [
        tuple(Site(layer) for layer, source in enumerate(sources) if source == owner) for owner in sorted(set(sources))
    ]


def _spelled(sources: Sequence[int]) -> str:
    return ",".join(map(str, sources))


# --- the owner's keys and values -------------------------------------------------------------------------------------


def _moments(group: Sequence[Site]) -> list[Request]:
    """The requests that the fit of a group reads."""
    alone: list[Request] = [request(site) for site in group for request in (InputGram, QueryGram)]
    return [*alone, *(CrossGram(group[0], site) for site in group[1:])]


def _fitted(group: Mapping[Site, SiteTensors], answers: Answers) -> Folded:
    """The roles of a group by the moments of calibration, and the measurements of each site."""
    from kvfold.solve.normed_heads import share_normed
    from kvfold.solve.shared_heads import reported  # loads torch: a plan works without
    from kvfold.solve.shared_layers import Reader, share

    sites = sorted(group)
    owner = sites[0]
    readers = []
    for site in sites:
        seen, queries = answers[InputGram(site)], answers[QueryGram(site)]["gram_HEE"]
        cross = seen if site == owner else answers[CrossGram(owner, site)]
        attention, roles = group[site].attention, group[site].roles
        readers.append(Reader(attention, roles, seen["gram_DD"], seen["mean_D"], cross["gram_DD"], queries))
    made = (share_normed if readers[0].attention.norms == "all_heads" else share)(readers)
    orders = {site: {QUERIES: order} for site, order in zip(sites[1:], made.queries[1:], strict=True)}
    lost = reported(made.heads, group[owner].roles["k"])
    return dict(zip(sites, made.roles, strict=True)), {owner: lost, **orders}


def _mean(group: Mapping[Site, SiteTensors]) -> Roles:
    """The owner's roles with keys and values that are the mean of the group's."""
    owner = group[min(group)]
    new = dict(owner.roles)
    for role in ("k", "v", "k_bias", "v_bias", "k_norm"):
        if role in new:
            heads = len(owner.roles[role]) // owner.attention.head_dim
            pooled = [_pooled(tensors.roles[role], tensors.attention.head_dim, heads) for tensors in group.values()]
            new[role] = sum(pooled[1:], pooled[0]) / len(pooled)
    return new


def _pooled(rows: Tensor, width: int, heads: int) -> Tensor:
    """Rows of any number of heads as rows of `heads`, float64: means of neighbours, or repeated."""
    have = rows.shape[0] // width
    blocks = rows.double().view(have, width, *rows.shape[1:])
    finer = math.lcm(have, heads)
    spread = blocks.repeat_interleave(finer // have, 0).view(heads, finer // heads, *blocks.shape[1:])
    return spread.mean(1).flatten(0, 1)


class CLA(Method[Config]):
    """Cross-layer attention: layers read the keys and values of another layer."""

    without_text: ClassVar = {"init": "copy"}
    published: ClassVar = ({"init": "copy"}, {"init": "mean"})

    def needs(self, config: Config, shape: Shape) -> Sequence[Question]:
        """Second moments of each group's inputs and queries; under `auto`, the cost of each group too."""
        groups, costs = self.groups(config, shape), list[ConvertedKL]()
        if config.layout == AUTO:
            span = config.share or SPAN
            groups = [
                tuple(map(Site, range(first, end)))
                for first in range(shape.num_layers)
                for end in range(first + 2, min(first + span, shape.num_layers) + 1)
                if not any(_difference(shape, layer, first) for layer in range(first, end))
            ]
            costs = [ConvertedKL(group) for group in groups]
        moments = [request for group in groups for request in _moments(group)] if config.init == "fit" else []
        return [*dict.fromkeys(moments), *costs]

    def resolve(self, config: Config, shape: Shape, answers: Answers) -> Config:
        """Write out the layer that each layer reads."""
        sources = _measured(config, shape, answers) if config.layout == AUTO and answers else sources_of(config, shape)
        return replace(config, share=None, layout=_spelled(sources), budget=None)

    def found(self, config: Config, shape: Shape, answers: Answers) -> Mapping[str, Any]:
        """The groups that `auto` chose, beside groups as even as the budget allows."""
        if config.layout != AUTO:
            return {}
        chosen = {}
        for name, sources in (("chosen", _measured(config, shape, answers)), ("alike", sources_of(config, shape))):
            part = _elements(shape, set(sources)) / root_elements(shape)
            kl = sum(_price(group, answers) for group in _groups(sources))
            chosen[name] = {"layout": _spelled(sources), "cache": part, "kl": kl}
        prices = {
            f"{each.sites[0].layer} to {each.sites[-1].layer}": float(answer["kl"])
            for each, answer in answers.items()
            if isinstance(each, ConvertedKL)
        }
        return {"budget": config.budget, **chosen, "kl": prices}

    def notes(self, config: Config, shape: Shape) -> Sequence[str]:
        """Warn of groups that are not chosen yet, and of keys that cannot be fitted freely."""
        notes = []
        if config.layout == AUTO:
            notes.append(
                f"layout auto: the plan spends a budget of {config.budget:g} on groups as even as can be; the "
                "conversion measures which layers share"
            )
        return [*notes, *(note_normed_keys(shape, config.init) if config.init == "fit" else ())]

    def groups(self, config: Config, shape: Shape) -> Sequence[tuple[Site, ...]]:
        """Each owner with its consumers. A layer that shares with none is in no group."""
        return [group for group in _groups(sources_of(config, shape)) if len(group) > 1]

    def student(self, config: Config, shape: Shape) -> Student:
        """The model in which consumers make no keys and values."""
        changed = {}
        for owner, *consumers in self.groups(config, shape):
            heads = shape.sites[owner].num_key_value_heads
            for site in consumers:
                changed[site] = replace(shape.sites[site], source=owner.layer, num_key_value_heads=heads)
        return Student(shape.with_sites(changed))

    def fold(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Config) -> Folded:
        """Make keys and values for the lowest layer, and remove those of the others.

        Measurements of a fit: of the owner, what each head lost of all that reads it, and which heads lost nothing (a
        share of the weighted second moment; nothing is what rounding to the weights' format can lose); of a consumer,
        which of the source's query heads stands in each place.
        """
        if config.init == "fit":
            return _fitted(group, answers)
        new = {
            site: {role: tensor for role, tensor in tensors.roles.items() if role[0] not in "kv"}
            for site, tensors in group.items()
        }
        return {**new, min(group): group[min(group)].roles if config.init == "copy" else _mean(group)}, {}

    def repairs(self, config: Config) -> Sequence[str]:
        """Everything after a fit; published starts are left as published."""
        return REPAIRABLE if config.init == "fit" else ()

    def alone(self, config: Config, shape: Shape, sites: Sequence[Site]) -> Config:
        """The same settings with one group and no other."""
        layers = [site.layer for site in sites]
        sources = [layers[0] if layer in layers else layer for layer in range(shape.num_layers)]
        return replace(config, share=None, layout=_spelled(sources), budget=None)

    def lossless(self, shape: Shape) -> Config:
        """Every layer owns its keys and values."""
        return Config(share=1)

    def example(self, shape: Shape) -> Config:
        """Layers in pairs."""
        return Config(share=2)


METHOD = CLA()
