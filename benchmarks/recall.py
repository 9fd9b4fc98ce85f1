"""Which key/value heads carry recall: the copy loss of a model without each of them.

Rows are `[span, text, span]` as in `kvfold evaluate`: nothing but looking back predicts the second span. For each group
of query heads that reads one key/value head, their outputs are replaced by their means over the text (mean ablation;
zeros would take a bias away too), and the rise of the loss on the second span is the group's. At the end, the layers of
the largest sums keep all their heads as far as the budget goes, and every other layer one:

    python benchmarks/recall.py kvfold:smollm2 --data TEXT [--budget 0.5] [--trials 8] [--distance 64]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.evaluate.recall import copy_loss, copy_rows
from kvfold.text.tokens import token_file

MEAN_TOKENS = 2048  # of the text, in rows of 512, over which the outputs of heads are averaged
ROW = 512


def main() -> None:
    """Ablate every group of heads, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--data", required=True)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--distance", type=int, default=64)
    parser.add_argument("--results", default="results")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    start = time.perf_counter()
    source = Checkpoint.open(given.source)
    tokens = token_file(given.data, source.path, max_tokens=65_536)
    ids_N = torch.from_numpy(tokens.tokens[:].astype("int64"))
    special = hf.load_tokenizer(source.path).all_special_ids
    rows_BT = copy_rows(ids_N, given.distance, trials=given.trials, seed=0, special=special)
    model = hf.load(source.path)
    with torch.inference_mode():
        means = mean_outputs(model, source, ids_N[:MEAN_TOKENS].view(-1, ROW))
        _, whole = copy_loss(model, rows_BT, batch_size=given.trials)
        print(f"copy loss at {given.distance}: {whole:.3f}", flush=True)
        rises: list[list[float]] = []
        for site, attention in source.shape.sites.items():
            readers, rises_G = attention.query_group * attention.head_dim, []
            for group in range(attention.num_key_value_heads):
                columns = slice(group * readers, (group + 1) * readers)
                with replaced(output_of(model, source, site), columns, means[site.layer]):
                    rises_G.append(copy_loss(model, rows_BT, batch_size=given.trials)[1] - whole)
            rises.append(rises_G)
            print(f"layer {site.layer:2}", " ".join(f"{rise:6.2f}" for rise in rises_G), flush=True)
    kept = spend([sum(row) for row in rises], source.shape.sites[next(iter(source.shape.sites))], given.budget)
    print("--kv-heads", kept)
    metrics = {"copy_loss": whole, "rise": rises, "kv_heads": kept, "load_average": os.getloadavg()[0]}
    settings = {name: getattr(given, name) for name in ("budget", "trials", "distance", "note")}
    settings |= {"source": source.name, "data": os.path.basename(given.data)}
    made = record.make(
        "benchmark",
        "recall",
        settings,
        metrics,
        seed=0,
        hashes={"source": source.hash(), "data": tokens.hash},
        wall_seconds=round(time.perf_counter() - start, 1),
    )
    print(record.write(made, given.results))


def output_of(model: nn.Module, source: Checkpoint, site: Any) -> nn.Module:
    """The output projection of a site: its inputs are the outputs of the heads, side by side."""
    return model.get_submodule(source.family.tensor(site, "o").removesuffix(".weight"))


def mean_outputs(model: nn.Module, source: Checkpoint, ids_BT: Tensor) -> list[Tensor]:
    """By layer, the mean output of every head over a text: `(H E,)`."""
    means: list[Tensor] = []
    handles = [
        output_of(model, source, site).register_forward_pre_hook(lambda _, args: means.append(args[0].mean((0, 1))))
        for site in source.shape.sites
    ]
    model(ids_BT)
    for handle in handles:
        handle.remove()
    return means


@contextmanager
def replaced(output: nn.Module, columns: slice, mean: Tensor) -> Iterator[None]:
    """Let an output projection read means in the place of these columns of its input."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].clone()
        heads[..., columns] = mean[columns]
        return (heads, *args[1:])

    handle = output.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def spend(worth: list[float], attention: Any, budget: float) -> str:
    """Head counts by layer: all heads in the layers that are worth most, as far as the budget goes, else one."""
    heads = attention.num_key_value_heads
    whole = int((budget * heads - 1) * len(worth) / (heads - 1))
    best = sorted(range(len(worth)), key=lambda layer: -worth[layer])[: max(0, whole)]
    return "/".join(str(heads if layer in best else 1) for layer in range(len(worth)))


if __name__ == "__main__":
    main()
