"""Speed of the training loop compared with a bare hand-written one, and what KL to a teacher costs, on the demo.

    bare       a hand-written loop: transformers' logits, torch's cross-entropy, AdamW, nothing else
    bare+      the same with kvfold's attention, so that the remaining difference is the loop's
    ce         kvfold.train.loop.train with cross-entropy: batches from a token file, chunked loss, guard, log
    kl         the same with KL to a teacher of the same size, which runs forward in each step

All in bf16 autocast over fp32 weights, batch 16 x 256, one process, in turns. The numbers are ratios of medians.

Predicted, before it was first run: attention is 45% of a bare step and blocks halve it, so ce is at 1.2x of bare and at
1.0x of bare+; a teacher's forward is a third of a step and its logits a tenth, so kl costs 1.4x of ce.

    python benchmarks/uptrain.py [--rounds 5] [--steps 8] [--threads 2] [--results results]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kvfold import hf
from kvfold.disk import record
from kvfold.progress import SILENT
from kvfold.settings import read_yaml
from kvfold.text.tokens import TokenFile
from kvfold.train.loop import Work, parameter_groups, train
from kvfold.train.pretrain import PretrainSettings
from kvfold.train.uptrain import UptrainSettings, objective

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-pretrain.yaml"


def bare(model: nn.Module, tokens: TokenFile, steps: int) -> float:
    """Seconds of a hand-written loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    starts = np.random.default_rng(0).integers(0, len(tokens) - 257, (steps, 16))
    begun = time.perf_counter()
    for step in range(steps):
        rows = [torch.from_numpy(tokens.tokens[start : start + 257].astype(np.int64)) for start in starts[step]]
        ids = torch.stack(rows)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
    return time.perf_counter() - begun


def ours(model: nn.Module, teacher: nn.Module | None, tokens: TokenFile, steps: int) -> float:
    """Seconds of kvfold's loop, its log included."""
    losses = {"ce": 1.0} if teacher is None else {"kl": 1.0}
    settings = UptrainSettings(data="stdlib", tokens=steps * 4096)
    work = Work(
        "benchmark",
        steps,
        objective(model, teacher, losses, (), settings),
        lambda: parameter_groups(dict(model.named_parameters()), settings.weight_decay),
    )
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        train(model, [work], tokens, settings, Path(folder), SILENT)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", default="results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config: dict[str, Any] = {**read_yaml(RECIPE)["config"], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    settings = PretrainSettings()
    rows = np.random.default_rng(0).integers(0, config["vocab_size"], 1 << 20).astype(np.uint16)
    tokens = TokenFile(Path("random"), rows, config["vocab_size"], "random", "random tokens")

    def fresh(attention: str, seed: int = 0) -> nn.Module:
        return hf.build(config, seed=seed, attention=attention).train()

    teacher = fresh(hf.ATTENTION, seed=1).eval().requires_grad_(False)
    variants: dict[str, Callable[[int], float]] = {
        "bare": lambda steps: bare(fresh("sdpa"), tokens, steps),
        "bare+": lambda steps: bare(fresh(hf.ATTENTION), tokens, steps),
        "ce": lambda steps: ours(fresh(hf.ATTENTION), None, tokens, steps),
        "kl": lambda steps: ours(fresh(hf.ATTENTION), teacher, tokens, steps),
    }
    for run in variants.values():
        run(2)
    begun = time.monotonic()
    pace: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(given.rounds):
        for name, run in variants.items():
            pace[name].append(given.steps * settings.step_tokens / run(given.steps))
        print(turn + 1, {name: round(each[-1]) for name, each in pace.items()}, flush=True)
    median = {name: statistics.median(each) for name, each in pace.items()}
    ratios = {
        "ce_over_bare": median["ce"] / median["bare"],
        "ce_over_bare_same_attention": median["ce"] / median["bare+"],
        "kl_cost": median["ce"] / median["kl"],
    }
    made = record.make(
        "benchmark",
        "uptrain",
        {"rounds": given.rounds, "steps": given.steps, "threads": given.threads, "config": config},
        {"tokens_per_second": median, "every_round": pace, **ratios},
        wall_seconds=round(time.monotonic() - begun, 1),
    )
    print({name: round(value, 3) for name, value in ratios.items()})
    print(record.write(made, given.results))


if __name__ == "__main__":
    main()
