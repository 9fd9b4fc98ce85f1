"""Which fold an inspection suggests, and what it predicts that folds cost.

The KL of a uniform fold is measured, with all layers folded. That of a mix is the sum of what its layers cost alone,
by which `--kv-heads auto` chooses, times the ratio of the two for uniform folds, because folds of a deep model cost
more together than alone. The ratio is interpolated linearly in the sum.
"""

from __future__ import annotations

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
    import numpy as np

    sites, ratios = tuple(shape.cached_sites), dict[float, float]()  # of what was measured to its sum, by the sum
    for count, each in budgets.uniform_folds(shape):
        if summed := budgets.price(shape, answers, each):
            ratios[summed] = float(answers[UniformKL(sites, count)]["kl"]) / summed
    alone = budgets.price(shape, answers, heads)
    sums = sorted(ratios)
    return alone * float(np.interp(alone, sums, [ratios[each] for each in sums])) if sums else alone


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
