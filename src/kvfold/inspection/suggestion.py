"""Which fold an inspection suggests, and what it predicts that folds cost.

The KL of a uniform fold is measured, with all layers folded. That of a mix is the sum of what its layers cost alone,
by which `--kv-heads auto` chooses, times the ratio of the two for uniform folds, because folds of a deep model cost
more together than alone. The ratio is interpolated linearly in the sum.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.requests import Answers, FoldedRecall, UniformKL
from kvfold.contracts.runtimes import LAYERS
from kvfold.contracts.site import Shape
from kvfold.methods.gqa import COSTS
from kvfold.solve import budget as budgets

NAMED = 5  # heads that are named as those that copy
COPIES = 0.1  # nats: a head or a fold that raises the loss of copying by less is not named
STEPS = 16  # halvings of the budget of a mix
BOTH = COSTS["both"]


def suggested(shape: Shape, answers: Answers, loss: float) -> dict[str, Any]:
    """The costs of each number of heads everywhere, the fewest within a loss, and the best mix of the same bytes.

    If no number is within the loss, the mix is the smallest that is. A mix is chosen by KL and copying together; there
    is none for a model without classes for one.
    """
    whole = {site: shape.sites[site].num_key_value_heads for site in shape.cached_sites}
    folds = budgets.uniform_folds(shape)
    uniform = next((heads for _, heads in folds if predicted_kl(shape, answers, heads) <= loss), None)
    mix = _mix(shape, answers, loss, uniform, whole) if shape.model_type in LAYERS.models else uniform
    return {
        "predicted": {str(count): _costs(shape, answers, heads) for count, heads in folds},
        "uniform": uniform and _costs(shape, answers, uniform),
        "mix": None if mix in (uniform, whole) or mix is None else _costs(shape, answers, mix),
        "copying": _copying(shape, answers, uniform or folds[0][1]) if folds else [],
    }


def predicted_kl(shape: Shape, answers: Answers, heads: budgets.Heads) -> float:
    """The predicted KL of a fold, in nats per token before repair."""
    sites, points = tuple(shape.cached_sites), []
    for count, each in budgets.uniform_folds(shape):
        alone = budgets.price(shape, answers, each)
        if alone:
            points.append((alone, float(answers[UniformKL(sites, count)]["kl"]) / alone))
    alone = budgets.price(shape, answers, heads)
    return alone * _interpolated(sorted(points), alone) if points else alone


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at a place, on the line between the points beside it; beyond the points, that of the outer one."""
    xs, ys = zip(*points, strict=True)
    after = bisect(xs, at)
    if after in (0, len(xs)):
        return float(ys[min(after, len(xs) - 1)])
    share = (at - xs[after - 1]) / (xs[after] - xs[after - 1])
    return float(ys[after - 1] + share * (ys[after] - ys[after - 1]))


def _copying(shape: Shape, answers: Answers, heads: budgets.Heads) -> list[int]:
    """The layers that copy: to fold one costs at least `COPIES`, and half of the loss of copying of the dearest."""
    rises = {site: budgets.price(shape, answers, {site: count}, [FoldedRecall]) for site, count in heads.items()}
    least = max(COPIES, max(rises.values()) / 2)
    return [site.layer for site, rise in rises.items() if rise >= least]


def _mix(
    shape: Shape, answers: Answers, loss: float, uniform: budgets.Heads | None, whole: budgets.Heads
) -> budgets.Heads:
    """The cheapest mix of the bytes of a uniform fold; without one, the smallest that is within the loss."""
    if uniform:
        return budgets.cheapest(budgets.part(shape, uniform), shape, answers, BOTH)
    low, high = (budgets.part(shape, heads) for heads in (dict.fromkeys(whole, 1), whole))
    best = whole
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = budgets.cheapest(middle, shape, answers, BOTH)
        if predicted_kl(shape, answers, found) <= loss:
            best, high = found, middle
        else:
            low = middle
    return best


def _costs(shape: Shape, answers: Answers, heads: budgets.Heads) -> dict[str, Any]:
    return {
        "kv_heads": PerSite.of(heads).spelled(),
        "cache": round(budgets.part(shape, heads), 4),
        "kl": round(predicted_kl(shape, answers, heads), 5),
        "rise": round(budgets.price(shape, answers, heads, [FoldedRecall]), 5),
    }


def recall_heads(layers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The heads without which the loss of copying rises most, the first one most: `[layer, head, rise]`."""
    rises = [[row["layer"], head, rise] for row in layers for head, rise in enumerate(row["rise"])]
    return sorted((each for each in rises if each[2] >= COPIES), key=lambda each: -each[2])[:NAMED]


def fewest(layers: Sequence[Mapping[str, Any]], loss: float) -> list[int]:
    """Of each layer, the smallest number of heads whose fold, alone, costs at most an even share of the loss."""
    share = loss / len(layers)
    return [
        min([row["heads"], *(int(count) for count, kl in row.get("fold_kl", {}).items() if kl <= share)])
        for row in layers
    ]
