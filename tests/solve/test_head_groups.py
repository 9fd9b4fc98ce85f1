"""Groups of heads: the best of few partitions against all permutations, and planted groups of many heads."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from kvfold.solve.head_groups import FEW, _annealed, contiguous, grouped, within


def apart(heads: int, seed: int) -> list[list[float]]:
    """Symmetric distances."""
    half = torch.rand(heads, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu(1)
    found: list[list[float]] = (half + half.T).tolist()
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_few_partitions_are_all_tried(count: int) -> None:
    distances, size = apart(6, seed=count), 6 // count
    orders = permutations(range(6))
    best = min(within(distances, [list(order[at : at + size]) for at in range(0, 6, size)]) for order in orders)
    found = grouped(distances, count)
    assert sorted(head for heads in found for head in heads) == list(range(6))
    assert [len(heads) for heads in found] == [size] * count
    assert within(distances, found) == pytest.approx(best)


def test_equal_distances_leave_neighbours_together() -> None:
    assert grouped([[0.0] * 8 for _ in range(8)], 2) == contiguous(8, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_annealing_finds_planted_groups() -> None:
    """16 heads have two million partitions into pairs, more than are tried."""
    assert FEW < 2_027_025
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    planted = [order[at : at + 4] for at in range(0, 16, 4)]
    distances = apart(16, seed=1)
    for heads in planted:
        for a in heads:
            for b in heads:
                distances[a][b] /= 20
    assert grouped(distances, 4) == sorted(sorted(heads) for heads in planted)


def test_annealing_ends_near_the_best_of_few() -> None:
    distances = apart(8, seed=5)
    assert within(distances, _annealed(distances, contiguous(8, 2))) == pytest.approx(
        within(distances, grouped(distances, 2)), rel=0.02
    )
