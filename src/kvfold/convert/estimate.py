"""How long a conversion will take: the operations that it counts, at the speeds of this machine now."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvfold import hf
from kvfold.disk.checkpoint import Checkpoint
from kvfold.machine import best_device, clock
from kvfold.predict.conversion_cost import BATCH, ConversionCost, Speeds

SECONDS = 0.2  # of runs of each kind of work


def measured_speeds(source: Checkpoint, cost: ConversionCost, length: int) -> Speeds:
    """Measure one layer of the teacher on a batch, a product of tall matrices, and a solve in float64."""
    device, layers = best_device(), source.shape.num_layers
    count = max(1, BATCH // length)
    with torch.inference_mode(), hf.Layers(source, device=device, lengths=[length] * count) as model:
        layer = model.open(0)
        hidden_BTD = model.embed(torch.zeros(count, length, dtype=torch.int64))
        passes = cost.forward / cost.tokens / layers * count * length / _seconds(lambda: layer.run(hidden_BTD))
        hidden = source.shape.hidden_size
        wide = 2 * hidden  # of most inner maps of MLPs, about
        tall_TN = torch.randn(BATCH, wide, device=device)
        products = 2 * BATCH * wide**2 / _seconds(lambda: tall_TN.T @ tall_TN)
        gram_NN = (tall_TN.T @ tall_TN).double()
        solves = wide**3 / _seconds(lambda: torch.linalg.solve(gram_NN, gram_NN[:, :hidden]))
    return Speeds(passes, products, solves)


def _seconds(work: Callable[[], object]) -> float:
    """The mean of the runs after the first."""
    work()
    started, runs = clock(), 0
    while (spent := clock() - started) < SECONDS:
        work()
        runs += 1
    return spent / runs
