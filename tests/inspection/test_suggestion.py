"""What an inspection predicts that folds cost, from costs that are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvfold.contracts.requests import Answers, FoldedKL, FoldedRecall, UniformKL
from kvfold.contracts.site import Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.inspection.suggestion import predicted_kl, suggested

SITES = (Site(0), Site(1))


@pytest.fixture
def shape(tiny_checkpoint: Callable[..., Path]) -> Shape:
    """Two layers of four heads."""
    return Checkpoint.open(tiny_checkpoint("llama", num_hidden_layers=2)).shape


def answers(uniform: dict[int, float]) -> Answers:
    """One head costs 0.4 and 0.2 nats, two cost 0.1 each; together as given."""
    alone = {(0, 1): 0.4, (1, 1): 0.2, (0, 2): 0.1, (1, 2): 0.1}
    number = {FoldedKL(Site(layer), count): {"kl": torch.tensor(kl)} for (layer, count), kl in alone.items()}
    copied = {FoldedRecall(Site(layer), count): {"rise": torch.tensor(0.0)} for layer, count in alone}
    return {
        **number,
        **copied,
        **{UniformKL(SITES, count): {"kl": torch.tensor(kl)} for count, kl in uniform.items()},
    }


def test_a_uniform_fold_costs_what_was_measured_and_a_mix_lies_between(shape: Shape) -> None:
    """Sums 0.6 and 0.2 cost 1.5 and 0.2: ratios 2.5 and 1, so a sum of 0.3 costs 0.3 (1 + 1.5 / 4)."""
    found = answers({1: 1.5, 2: 0.2})
    assert predicted_kl(shape, found, dict.fromkeys(SITES, 1)) == pytest.approx(1.5)
    assert predicted_kl(shape, found, dict.fromkeys(SITES, 2)) == pytest.approx(0.2)
    assert predicted_kl(shape, found, {Site(0): 2, Site(1): 1}) == pytest.approx(0.3 * 1.375)
    assert predicted_kl(shape, found, {Site(0): 4, Site(1): 2}) == pytest.approx(0.1)  # below all: the ratio of 0.2
    assert predicted_kl(shape, found, dict.fromkeys(SITES, 4)) == 0


def test_the_suggestion_is_within_the_loss_that_was_measured(shape: Shape) -> None:
    """One head is within 0.7 nats by the sum of its layers, 0.6, and not by what it costs."""
    assert suggested(shape, answers({1: 0.6, 2: 0.2}), 0.7)["uniform"]["kv_heads"] == 1
    assert suggested(shape, answers({1: 1.5, 2: 0.2}), 0.7)["uniform"]["kv_heads"] == 2
    found = suggested(shape, answers({1: 1.5, 2: 0.2}), 0.15)
    assert found["uniform"] is None
    assert found["mix"]["kl"] <= 0.15


def test_folds_that_cost_nothing_have_no_ratio(shape: Shape) -> None:
    free = {each: {name: torch.zeros(()) for name in value} for each, value in answers({1: 0.0, 2: 0.0}).items()}
    assert predicted_kl(shape, free, dict.fromkeys(SITES, 1)) == 0
