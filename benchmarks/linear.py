"""Linear attention: a step that decodes over contexts, and the chunked form in training beside softmax attention.

One step, as when one token of one sequence is decoded: 32 query heads of 64, float32, after 256 to 65,536 tokens.

    multi-head  the best of PyTorch's fused kernel and two matrix products
    grouped     8 key heads, by kvfold's kernel
    supra       sums alone, for 32 and for 8 key heads (features of 64, decay)
    hybrid      a window of 64, 4 sinks, and sums (features of 128), for 32 and for 8 key heads

A step of the last two is everything between a layer's projections: features, the sums with the token that leaves the
window, and the output. All variants of a context take turns, so a state that fits a processor's cache is read from
memory once others have read a gigabyte of keys; the linear variants alone, all contexts in turn, show whether a step
grows with the text. Training: forward and backward of 2,048 tokens of one sequence, 8 query heads of 64 with 8 and
with 2 key heads, features included, against the faster of PyTorch's causal attention and kvfold's blocks of matrix
products, in float32 and bfloat16. All take turns; medians over the rounds.

Predicted before the first whole run, from a trial on a busy machine: a step of multi-head grows with the
context, as it reads 16 KiB a token: 0.3 ms at 256 tokens, 100 ms at 65,536; grouped a quarter of that. Sums of 32 heads
are half a MiB: supra takes 0.2 to 0.4 ms at any length, and wins from about 256 tokens against multi-head and 1,024
against grouped; hybrid 0.5 to 1 ms, and wins from 512 and from 2,048. In training supra is 1.2 to 1.5 times as fast as
softmax attention, hybrid 0.6 to 1.0 times. Required: no worse than half.

    python benchmarks/linear.py [--quick] [--rounds 9] [--results results] [--note TEXT]
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kernels import matmul, parser
from kvfold.attention.blocked import blocked_attention
from kvfold.attention.grouped import grouped_attention
from kvfold.attention.linear import (
    Past,
    Sinks,
    Sums,
    Weights,
    absorbed,
    decode,
    linear_attention,
    normed,
    slopes,
)
from kvfold.disk import record
from kvfold.evaluate.timing import interleave

STEP = {"heads": 32, "width": 64, "contexts": (256, 1024, 4096, 16_384, 65_536), "groups": (32, 8)}
TRAINING = {"heads": 8, "width": 64, "tokens": 2048, "groups": (8, 2), "dtypes": ("float32", "bfloat16")}
TARGET = {"training_over_softmax": 0.5, "growth_of_a_step": 1.5}


@dataclass(frozen=True)
class Preset:
    """What is computed in place of softmax over all tokens."""

    name: str
    features: int
    window: int
    sinks: int

    def weights(self, heads: int, groups: int, width: int) -> Weights:
        """Decay and no denominator, or a gate and a denominator."""
        hybrid = self.window > 0
        decay_G = None if hybrid else torch.tensor(slopes("slopes", groups))
        return Weights(self.window, hybrid, width**-0.5, decay_G, torch.ones(heads) if hybrid else None)

    def maps(self, rows_BHTE: Tensor, map_GFE: Tensor) -> Tensor:
        """Features of rows by the maps of their groups."""
        batch, heads, tokens, width = rows_BHTE.shape
        made_BHTF = (rows_BHTE.reshape(batch, len(map_GFE), -1, width) @ map_GFE.mT).view(batch, heads, tokens, -1)
        if not self.window:
            return made_BHTF.relu()
        return torch.cat([made_BHTF.softmax(-1), (-made_BHTF).softmax(-1)], dim=-1)


PRESETS = (Preset("supra", 64, 0, 0), Preset("hybrid", 128, 64, 4))


class Step:
    """One decoded token after a context: `run`, and the bytes that it reads."""

    def __init__(self, preset: Preset, groups: int, context: int, draw: torch.Generator) -> None:
        heads, width = STEP["heads"], STEP["width"]
        self.preset, self.weights = preset, preset.weights(heads, groups, width)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw)

        self.map_GFE = random(groups, preset.features // (2 if preset.window else 1), width) * width**-0.5
        self.q, self.key, self.value = (
            random(1, heads, 1, width),
            random(1, groups, 1, width),
            random(1, groups, 1, width),
        )
        self.keys, self.values = random(1, groups, preset.window, width), random(1, groups, preset.window, width)
        self.sums: Sums | None = None
        for start in range(0, context, 4096):
            count = min(4096, context - start)
            phi = preset.maps(random(1, groups, count, width), self.map_GFE)
            self.sums = absorbed(self.sums, phi, random(1, groups, count, width), self.weights)
        self.sinks = None
        if preset.sinks:
            rows = (random(1, groups, preset.sinks, width) for _ in range(2))
            self.sinks = Sinks(*rows, torch.full((1, preset.sinks), -context))

    @property
    def bytes(self) -> int:
        """Bytes of the state and the window."""
        assert self.sums is not None
        kept = [self.keys, self.values, self.sums.state_BGFE]
        kept += [] if self.sums.mass_BGF is None else [self.sums.mass_BGF]
        kept += [] if self.sinks is None else [self.sinks.k_BGNE, self.sinks.v_BGNE]
        return sum(each.nbytes for each in kept)

    def run(self) -> Tensor:
        """Compute features, add the oldest token of the window to the sums, and attend."""
        keys, values = torch.cat([self.keys, self.key], dim=2), torch.cat([self.values, self.value], dim=2)
        phi_q = self.preset.maps(self.q, self.map_GFE)
        sums = absorbed(self.sums, self.preset.maps(keys[:, :, :1], self.map_GFE), values[:, :, :1], self.weights)
        past = Past(sums, self.sinks, None)
        o_BH1E = decode(self.q, keys[:, :, 1:], values[:, :, 1:], phi_q, self.weights, past)
        return o_BH1E if self.weights.normalised else normed(o_BH1E)


def steps(contexts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Every variant at every context, contexts one after the other, for what a long one takes in memory."""
    draw, found = torch.Generator().manual_seed(0), []
    heads, width = STEP["heads"], STEP["width"]
    for context in contexts:
        q = torch.randn(1, heads, 1, width, generator=draw)
        whole, few = (
            [torch.randn(1, groups, context, width, generator=draw) for _ in range(2)] for groups in STEP["groups"]
        )
        works: dict[str, Callable[[], object]] = {
            "multi-head sdpa": lambda q=q, whole=whole: sdpa(q, *whole),
            "multi-head matmul": lambda q=q, whole=whole: matmul(q, *whole),
            "grouped": lambda q=q, few=few: grouped_attention(q, *few),
        }
        held = {name: sum(each.nbytes for each in (few if name == "grouped" else whole)) for name in works}
        for preset in PRESETS:
            for groups in STEP["groups"]:
                step = Step(preset, groups, context, draw)
                works[f"{preset.name} {groups}"], held[f"{preset.name} {groups}"] = step.run, step.bytes
        seconds = interleave({name: lambda work=work: work for name, work in works.items()}, rounds)
        for name, times in seconds.items():
            row = {"context": context, "variant": name, "bytes": held[name], "ms": 1e3 * statistics.median(times)}
            found.append({**row, "bytes_per_token": held[name] / context, "fastest_ms": 1e3 * min(times)})
            print(f"{context:7,} {name:18} {row['ms']:9.3f} ms {held[name]:14,} bytes", flush=True)
    return found


def linear_steps(contexts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """The linear variants among themselves, all contexts in turn: nobody else's keys drive a state out of a cache."""
    draw, works = torch.Generator().manual_seed(0), {}
    for preset in PRESETS:
        for groups in STEP["groups"]:
            for context in contexts:
                works[f"{preset.name} {groups}", context] = Step(preset, groups, context, draw).run
    seconds = interleave({place: lambda work=work: work for place, work in works.items()}, rounds)
    return [
        {"context": context, "variant": name, "ms": 1e3 * statistics.median(times)}
        for (name, context), times in seconds.items()
    ]


class Training:
    """Forward and backward of a text, with every parameter's gradient."""

    def __init__(self, groups: int, dtype: str, tokens: int) -> None:
        heads, width, self.tokens = TRAINING["heads"], TRAINING["width"], tokens
        draw = torch.Generator().manual_seed(0)
        sizes = ((1, heads, tokens, width), (1, groups, tokens, width), (1, groups, tokens, width))
        self.qkv = [torch.randn(*size, generator=draw).to(getattr(torch, dtype)).requires_grad_(True) for size in sizes]
        self.groups, self.kind, self.draw = groups, getattr(torch, dtype), draw

    def softmax(self, kernel: Callable[..., Tensor]) -> Callable[[], object]:
        """A kernel of causal softmax attention."""
        return lambda: self._both(kernel(*self.qkv))

    def linear(self, preset: Preset) -> Callable[[], object]:
        """The chunked form after its features."""
        width, heads = TRAINING["width"], TRAINING["heads"]
        rows = preset.features // (2 if preset.window else 1)
        map_GFE = (torch.randn(self.groups, rows, width, generator=self.draw) * width**-0.5).to(self.kind)
        map_GFE.requires_grad_(True)
        weights = preset.weights(heads, self.groups, width)

        def run() -> None:
            q, k, v = self.qkv
            far = preset.maps(k[:, :, : self.tokens - preset.window], map_GFE)
            past = Past()
            if preset.sinks:
                first = torch.arange(preset.sinks)[None]
                free_BS = (torch.arange(self.tokens) >= preset.sinks)[None]
                past = Past(None, Sinks(k[:, :, : preset.sinks], v[:, :, : preset.sinks], first), free_BS)
            o_BHTE = linear_attention(q, k, v, preset.maps(q, map_GFE), far, weights, past)
            self._both(o_BHTE if weights.normalised else normed(o_BHTE))

        return run

    def _both(self, o_BHTE: Tensor) -> None:
        for each in self.qkv:
            each.grad = None
        o_BHTE.sum().backward()


def training(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of every variant, by dtype and key heads."""
    found = []
    for dtype in TRAINING["dtypes"]:
        for groups in TRAINING["groups"]:
            case = Training(groups, dtype, tokens)
            works = {
                "sdpa": case.softmax(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True)),
                "blocked": case.softmax(blocked_attention),
                **{preset.name: case.linear(preset) for preset in PRESETS},
            }
            seconds = interleave({name: lambda work=work: work for name, work in works.items()}, rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            best = min(medians["sdpa"], medians["blocked"])
            for name, each in medians.items():
                row = {"dtype": dtype, "groups": groups, "variant": name, "ms": 1e3 * each, "over_softmax": best / each}
                found.append({**row, "tokens_per_second": tokens / each})
                print(f"{dtype:9} {groups} key heads {name:8} {1e3 * each:9.1f} ms {best / each:5.2f} of softmax")
    return found


def main() -> None:
    given = parser(__doc__, rounds=9).parse_args()
    start = time.perf_counter()
    contexts, tokens = (STEP["contexts"][:3], 512) if given.quick else (STEP["contexts"], TRAINING["tokens"])
    with torch.inference_mode():
        decoded = steps(contexts, given.rounds)
        alone = linear_steps(contexts, given.rounds)
    trained = training(tokens, given.rounds)
    own = {(row["variant"], row["context"]): row["ms"] for row in alone}
    linear = [f"{preset.name} {groups}" for preset in PRESETS for groups in STEP["groups"]]
    growth = {name: own[name, contexts[-1]] / own[name, contexts[0]] for name in linear}
    slowest = min(row["over_softmax"] for row in trained if row["variant"] in {preset.name for preset in PRESETS})
    target = {**TARGET, "slowest_training": slowest, "largest_growth": max(growth.values())}
    target["met"] = slowest >= TARGET["training_over_softmax"] and max(growth.values()) < TARGET["growth_of_a_step"]
    metrics = {"steps": decoded, "linear_steps": alone, "training": trained, "growth": growth, "target": target}
    metrics["load_average"] = os.getloadavg()[0]
    settings = {"step": STEP, "training": TRAINING, "rounds": given.rounds, "quick": given.quick, "note": given.note}
    wall = time.perf_counter() - start
    made = record.make("benchmark", "linear", settings, metrics, seed=0, wall_seconds=wall)
    print(target, record.write(made, given.results))


if __name__ == "__main__":
    main()
