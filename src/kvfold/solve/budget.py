"""A budget of cache bytes, spent over layers: how many key/value heads each layer keeps.

A site keeps a divisor of its heads. The price of a choice is what it costs to fold that site alone: the KL to the
teacher on text, the rise of the loss of copying, or both. The price of a mix is the sum over its sites. The cheapest
mix within the budget is a multiple-choice knapsack, solved exactly as an integer program. A budget is a part of the
root teacher's cache, so that it means the same for students of students.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from kvfold.contracts.cache import root_elements
from kvfold.contracts.per_layer import PerSite, divisors
from kvfold.contracts.requests import Answers, FoldedKL, FoldedRecall
from kvfold.contracts.site import Shape, Site
from kvfold.errors import SettingError, choices

Heads = dict[Site, int]
Cost = type[FoldedKL] | type[FoldedRecall]
K = TypeVar("K")  # what has a number of heads: a site, or one map of it

NAMES: Mapping[Cost, str] = {FoldedKL: "kl", FoldedRecall: "rise"}  # of a cost in answers and in kvfold.json
KL: Sequence[Cost] = (FoldedKL,)

RESOLUTION = 1e-6  # nats: prices that differ by less are equal, because the teacher runs in float32


def choices_of(shape: Shape, site: Site) -> list[int]:
    """The numbers of heads that a site can keep, ascending; the last is its own."""
    return divisors(shape.sites[site].num_key_value_heads)


def elements(shape: Shape, heads: Mapping[Site, int]) -> int:
    """Elements per token that sites with these head counts cache."""
    return sum(2 * count * shape.sites[site].head_dim for site, count in heads.items())


def part(shape: Shape, heads: Mapping[Site, int]) -> float:
    """The cache of sites with these head counts, as a part of the root teacher's."""
    return elements(shape, heads) / root_elements(shape)


def room(budget: float, shape: Shape) -> int:
    """Elements per token that a budget allows."""
    return math.floor(min(budget, 1) * root_elements(shape) * (1 + 1e-12))  # 0.29 * 100 is a little less than 29


def check(budget: float | None, shape: Shape, least: int, *, where: str, setting: str, smallest: str) -> None:
    """Raise SettingError for no budget, one below `least` elements per token, and one above the whole cache."""
    lowest = math.ceil(1e4 * least / root_elements(shape)) / 1e4
    allowed = f"{lowest:g} ({smallest}) to 1, as a part of the root teacher's cache"
    if budget is None:
        raise SettingError(f"{setting} auto needs a budget", where=where, next=f"add --budget, {allowed}")
    if not lowest <= budget <= 1:
        raise SettingError("budget is out of range", where=where, got=f"{budget:g}", allowed=allowed)


def refuse(budget: float | None, *, where: str, setting: str, value: object) -> None:
    """Raise SettingError for a budget beside a setting that is not `auto`."""
    if budget is not None:
        raise SettingError(
            f"budget does not apply to {setting} {value}",
            where=where,
            got=f"{budget:g}",
            next=f"set --{setting.replace('_', '-')} auto, or leave out --budget",
        )


def check_divides(kv_heads: PerSite, shape: Shape, *, where: str, setting: str = "kv_heads") -> None:
    """Raise SettingError for a head count that does not divide the source's, naming what does."""
    for site, heads in kv_heads.by_site(shape.cached_sites, setting, where).items():
        have = shape.sites[site].num_key_value_heads
        if have % heads:
            kind = "query" if have == shape.sites[site].num_attention_heads else "key/value"
            raise SettingError(
                f"{setting} {heads} does not divide the {have} {kind} heads of {site}",
                where=where,
                next=f"choose {choices(divisors(have))}",
            )


def asked(kv_heads: PerSite | Literal["auto"], budget: float | None, shape: Shape, *, where: str) -> Heads:
    """The head counts that are asked for at each site that has a cache. Of `auto`, unmeasured: `alike`."""
    if kv_heads == "auto":
        return alike(budget or 1, shape)
    return kv_heads.by_site(shape.cached_sites, "kv_heads", where)


def alike(budget: float, shape: Shape) -> Heads:
    """The most even head counts within the budget: the estimate before anything is measured."""
    heads, most = dict.fromkeys(shape.cached_sites, 1), room(budget, shape)
    while True:
        for site in sorted(heads, key=lambda site: heads[site] / choices_of(shape, site)[-1]):
            more = [count for count in choices_of(shape, site) if count > heads[site]]
            if more and elements(shape, {**heads, site: more[0]}) <= most:
                heads[site] = more[0]
                break
        else:
            return heads


def cheapest(budget: float, shape: Shape, answers: Answers, costs: Sequence[Cost] = KL) -> Heads:
    """The head counts of the smallest price within the budget; among equal prices, those of the fewest bytes."""
    return cheapest_mix(budget, shape, lambda site, count: price(shape, answers, {site: count}, costs))


def cheapest_mix(budget: float, shape: Shape, price_of: Callable[[Site, int], float]) -> Heads:
    """The head counts of the smallest sum of prices within the budget; among equal sums, those of the fewest bytes."""
    options = [(site, count) for site in shape.cached_sites for count in choices_of(shape, site)]
    sizes = {option: elements(shape, dict([option])) for option in options}
    return cheapest_of(sizes, price_of, room(budget, shape))


def cheapest_of(sizes: Mapping[tuple[K, int], int], price_of: Callable[[K, int], float], limit: int) -> dict[K, int]:
    """One count for each key, of the smallest sum of prices at a sum of `sizes` within the limit.

    Among equal sums of prices, those of the smallest size.
    """
    import numpy as np  # a plan works without
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = list(sizes)
    prices_N = np.array([_steps(price_of(*option)) for option in options])
    sizes_N = np.array(list(sizes.values()))
    unit = int(np.gcd.reduce(sizes_N))
    one_each_KN = np.array([[owner == key for owner, _ in options] for key in dict.fromkeys(key for key, _ in options)])
    limits = [LinearConstraint(one_each_KN, 1, 1), LinearConstraint(sizes_N // unit, ub=limit // unit)]
    for goal_N in (prices_N, sizes_N // unit):  # whole numbers: the second solution keeps the first one's price
        found = milp(
            goal_N,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=limits,
            options={"mip_rel_gap": 0.0},
        )
        taken_N = found.x.round()
        limits.append(LinearConstraint(goal_N, ub=goal_N @ taken_N + 0.5))
    return {key: count for (key, count), taken in zip(options, taken_N, strict=True) if taken}


def uniform(budget: float, shape: Shape, answers: Answers, costs: Sequence[Cost] = KL) -> Heads:
    """The cheapest mix within the budget in which every site keeps the same number of heads."""
    within = [heads for heads in everywhere(shape) if elements(shape, heads) <= room(budget, shape)]
    return min(within, key=lambda heads: (_steps(price(shape, answers, heads, costs)), elements(shape, heads)))


def everywhere(shape: Shape) -> list[Heads]:
    """The head counts that every site can keep alike, ascending."""
    common = math.gcd(*(choices_of(shape, site)[-1] for site in shape.cached_sites))
    return [dict.fromkeys(shape.cached_sites, count) for count in divisors(common)]


def uniform_folds(shape: Shape) -> list[tuple[int, Heads]]:
    """Each number of heads that every site can keep and not all have, ascending, with the head counts."""
    whole = {site: choices_of(shape, site)[-1] for site in shape.cached_sites}
    return [(next(iter(heads.values())), heads) for heads in everywhere(shape) if heads != whole]


def price(shape: Shape, answers: Answers, heads: Mapping[Site, int], costs: Sequence[Cost] = KL) -> float:
    """The predicted costs of a mix in nats per token, added up. A fold that helps counts nothing: that is noise."""
    folded = [(site, count) for site, count in heads.items() if count < choices_of(shape, site)[-1]]
    return math.fsum(max(0.0, float(answers[cost(*each)][NAMES[cost]])) for cost in costs for each in folded)


def prices(shape: Shape, answers: Answers, costs: Sequence[Cost] = KL) -> dict[str, Any]:
    """The price of each site alone, by its number of heads."""
    return {
        str(site): {str(count): price(shape, answers, {site: count}, costs) for count in choices_of(shape, site)}
        for site in shape.cached_sites
    }


def _steps(nats: float) -> int:
    return round(nats / RESOLUTION)
