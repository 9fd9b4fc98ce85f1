"""Which heads share one: groups of one size, with the smallest sum of the distances within them.

The best of all partitions where they are few, else simulated annealing (Kirkpatrick et al. 1983), which swaps two heads
of different groups.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import combinations

FEW = 10_000  # partitions: up to here each is tried
COOLING = 0.9  # factor of the temperature of a round
WARM, COLD = 1.0, 1e-3  # temperatures of the first and the last round, as parts of the mean distance

Groups = list[list[int]]


def within(distances: Sequence[Sequence[float]], groups: Groups) -> float:
    """The sum of the distances of all pairs of heads that share a group."""
    return math.fsum(distances[a][b] for heads in groups for a in heads for b in heads if a < b)


def grouped(distances: Sequence[Sequence[float]], count: int) -> Groups:
    """The `count` groups of heads with the smallest sum of distances within them, by their first heads."""
    heads = len(distances)
    size = heads // count
    if math.factorial(heads) // (math.factorial(size) ** count * math.factorial(count)) <= FEW:
        return min(_partitions(list(range(heads)), size), key=lambda groups: within(distances, groups))
    return _annealed(distances, contiguous(heads, count))


def contiguous(heads: int, count: int) -> Groups:
    """Groups of neighbours."""
    size = heads // count
    return [list(range(first, first + size)) for first in range(0, heads, size)]


def _partitions(heads: list[int], size: int) -> Iterator[Groups]:
    if not heads:
        yield []
        return
    for others in combinations(heads[1:], size - 1):
        first = [heads[0], *others]
        for rest in _partitions([head for head in heads if head not in first], size):
            yield [first, *rest]


def _annealed(distances: Sequence[Sequence[float]], groups: Groups) -> Groups:
    heads, draw = len(distances), random.Random(0)
    temperature = WARM * sum(map(sum, distances)) / heads**2
    last = temperature * COLD
    now = best = within(distances, groups)
    kept = [list(each) for each in groups]
    while temperature > last:
        for _ in range(heads * heads):
            one, other = draw.sample(groups, 2)
            a, b = draw.randrange(len(one)), draw.randrange(len(other))
            change = sum(distances[other[b]][head] - distances[one[a]][head] for head in one if head != one[a])
            change += sum(distances[one[a]][head] - distances[other[b]][head] for head in other if head != other[b])
            if change < 0 or draw.random() < math.exp(-change / temperature):
                one[a], other[b] = other[b], one[a]
                now += change
                if now < best - 1e-12:
                    best, kept = now, [list(each) for each in groups]
        temperature *= COOLING
    return sorted(sorted(each) for each in kept)
