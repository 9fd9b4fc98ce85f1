"""How long a conversion will take: the operations that it counts, at the speeds of this machine now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvfold import hf
from kvfold.disk.checkpoint import Checkpoint
from kvfold.machine import best_device, clock
from kvfold.predict.conversion_cost import BATCH, ConversionCost, Speeds

SECONDS = 0.2  # of runs of each kind of work
REST = 1.4  # the time of all work over that of what is counted, on two cores and three models


def measured_speeds(source: Checkpoint, cost: ConversionCost, length: int) -> Speeds:
    """Measure one layer of the teacher on a batch, a product of tall matrices, and a solve in float64."""
    device = best_device()
    with torch.inference_mode():
        passes = (_pairs if source.family.encoder_decoder else _layer)(source, cost, length, device)
        hidden = source.shape.hidden_size
        wide = 2 * hidden  # of most inner maps of MLPs, about
        tall_TN = torch.randn(BATCH, wide, device=device)
        products = 2 * BATCH * wide**2 / _seconds(lambda: tall_TN.T @ tall_TN)
        gram_NN = (tall_TN.T @ tall_TN).double()
        solves = wide**3 / _seconds(lambda: torch.linalg.solve(gram_NN, gram_NN[:, :hidden]))
    return Speeds(passes / REST, products / REST, solves / REST)


def _layer(source: Checkpoint, cost: ConversionCost, length: int, device: str) -> float:
    """Operations per second of the first layer of a decoder, on a batch of rows."""
    count = max(1, BATCH // length)
    with hf.Layers(source, device=device, lengths=[length] * count) as model:
        layer, hidden_BTD = model.open(0), model.embed(torch.zeros(count, length, dtype=torch.int64))
        return cost.forward / cost.tokens / len(model) * count * length / _seconds(lambda: layer.run(hidden_BTD))


def _pairs(source: Checkpoint, cost: ConversionCost, length: int, device: str) -> float:
    """The same of an encoder-decoder, without its head."""
    length = source.shape.encoder_positions or length
    count, tokens = max(1, BATCH // length), max(1, length * cost.tokens // cost.encoded)
    model: Any = hf.load_source(source, device=device)
    zeros = [torch.zeros(count, width, dtype=torch.int64, device=device) for width in (length, tokens)]
    given = {"input_ids": zeros[0]}
    if source.family.audio:
        shape = (count, source.config["num_mel_bins"], 2 * length)
        given = {"input_features": torch.zeros(shape, device=device)}

    def run() -> None:
        encoded_BSD = model.get_encoder()(**given).last_hidden_state
        model.get_decoder()(input_ids=zeros[1], encoder_hidden_states=encoded_BSD, use_cache=False)

    return cost.forward / cost.tokens * count * tokens / _seconds(run)


def _seconds(work: Callable[[], object]) -> float:
    """The mean of the runs after the first."""
    work()
    started, runs = clock(), 0
    while (spent := clock() - started) < SECONDS:
        work()
        runs += 1
    return spent / runs
