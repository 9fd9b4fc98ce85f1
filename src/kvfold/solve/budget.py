"""A budget of cache bytes, spent over layers: which of them keeps how many key/value heads.

Each site keeps a divisor of its heads, and has a price for each: the KL to the teacher when it alone is folded so far.
The price of a mix is taken to be their sum. Of all mixes within the budget the cheapest is wanted: a multiple-choice
knapsack, solved exactly as an integer program. A budget is a part of what the root teacher caches of a token, so that
students of students count from the same whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.per_layer import divisors
from kvfold.contracts.requests import Answers, FoldedKL
from kvfold.contracts.site import Shape, Site
from kvfold.errors import SettingError

Heads = dict[Site, int]

RESOLUTION = 1e-6  # nats: prices that differ by less are the same; the teacher reads in float32


def cached(shape: Shape) -> list[Site]:
    """The sites that keep keys and values while decoding."""
    return [site for site in shape.sites if site.kind != "encoder"]


def choices_of(shape: Shape, site: Site) -> list[int]:
    """The numbers of heads that a site can keep, its own the last."""
    return divisors(shape.sites[site].num_key_value_heads)


def part(shape: Shape, heads: Mapping[Site, int]) -> float:
    """What sites of so many heads cache of a token, as a part of the root teacher's."""
    return _elements(shape, heads) / whole(shape)


def check(budget: float | None, shape: Shape, where: str) -> None:
    """Raise SettingError for no budget, one above the whole, and one below a head at every site."""
    least = math.ceil(1e4 * part(shape, dict.fromkeys(cached(shape), 1))) / 1e4
    allowed = f"{least:g} (one head everywhere) to 1, as a part of the root teacher's cache"
    if budget is None:
        raise SettingError("kv_heads auto needs a budget", where=where, next=f"add --budget, {allowed}")
    if not least <= budget <= 1:
        raise SettingError("budget cannot be met", where=where, got=f"{budget:g}", allowed=allowed)


def alike(budget: float, shape: Shape) -> Heads:
    """The heads that spend the budget with sites as alike as can be: what is known before anything is measured."""
    heads, most = dict.fromkeys(cached(shape), 1), room(budget, shape)
    while True:
        for site in sorted(heads, key=lambda site: heads[site] / choices_of(shape, site)[-1]):
            more = [count for count in choices_of(shape, site) if count > heads[site]]
            if more and _elements(shape, {**heads, site: more[0]}) <= most:
                heads[site] = more[0]
                break
        else:
            return heads


def cheapest(budget: float, shape: Shape, answers: Answers) -> Heads:
    """The heads of the smallest price within the budget; of equal prices those of the fewest bytes."""
    import numpy as np  # a plan is made without
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(site, count) for site in cached(shape) for count in choices_of(shape, site)]
    prices_N = np.array([_steps(price(shape, answers, {site: count})) for site, count in options])
    sizes_N = np.array([_elements(shape, {site: count}) for site, count in options])
    unit = int(np.gcd.reduce(sizes_N))
    one_each_LN = np.array([[owner == site for owner, _ in options] for site in cached(shape)])
    limits = [LinearConstraint(one_each_LN, 1, 1), LinearConstraint(sizes_N // unit, ub=room(budget, shape) // unit)]
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
    return {site: count for (site, count), taken in zip(options, taken_N, strict=True) if taken}


def uniform(budget: float, shape: Shape, answers: Answers) -> Heads:
    """The cheapest heads within the budget of which every site keeps as many."""
    common = math.gcd(*(choices_of(shape, site)[-1] for site in cached(shape)))
    mixes = [dict.fromkeys(cached(shape), count) for count in divisors(common)]
    within = [heads for heads in mixes if _elements(shape, heads) <= room(budget, shape)]
    return min(within, key=lambda heads: (_steps(price(shape, answers, heads)), _elements(shape, heads)))


def price(shape: Shape, answers: Answers, heads: Mapping[Site, int]) -> float:
    """The predicted KL of a mix in nats per token: the sum of what folding each site alone costs."""
    folded = [FoldedKL(site, count) for site, count in heads.items() if count < choices_of(shape, site)[-1]]
    return math.fsum(float(answers[each]["kl"]) for each in folded)


def prices(shape: Shape, answers: Answers) -> dict[str, Any]:
    """What folding each site alone costs, by its number of heads."""
    return {
        str(site): {str(count): price(shape, answers, {site: count}) for count in choices_of(shape, site)}
        for site in cached(shape)
    }


def _elements(shape: Shape, heads: Mapping[Site, int]) -> int:
    return sum(2 * count * shape.sites[site].head_dim for site, count in heads.items())


def whole(shape: Shape) -> int:
    """Elements of a token that the root teacher caches."""
    return shape.root_elements or grouped_cache(shape).elements(1, 1)


def room(budget: float, shape: Shape) -> int:
    """Elements of a token that a budget allows."""
    return math.floor(min(budget, 1) * whole(shape) * (1 + 1e-12))  # 0.29 * 100 is a little less than 29


def _steps(nats: float) -> int:
    return round(nats / RESOLUTION)
