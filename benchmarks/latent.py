"""Decoding from a latent: one absorbed attention step at several splits of the same bytes, and prompts.

One step, as when one token of each of 8 sequences is decoded: 32 query heads of 64 or 128, 4,096 cached tokens, float32
and bfloat16. At 50, 25 and 12.5% of multi-head's bytes, with 1/16, 1/4 and 1/2 of them for rotated planes. All take
turns; medians over the rounds:

    multi-head   the best of PyTorch's fused kernel and two matrix products
    absorbed     kvfold's latent attention: the cache is read as it is stored
    expanded     keys and values of all heads written out, then multi-head's best kernel (one split for each part)
    grouped      grouped-query attention of the same bytes by kvfold's kernel

Prompts: 1,024 tokens of one sequence, causal, from hidden states on: the latent's projections, keys and values written
out, attention; against multi-head's projections and attention.

Predicted before the first whole run, from trials of the kernel on half the batch with one thread: a step multiplies
each cached token with P + 2 R numbers a head, and not with 2 E. At 12.5% that is 2 to 12 times multi-head's arithmetic
and an eighth of its bytes: in float32 0.3 to 0.8 of multi-head's time, the less the more of it is planes; at 25% 0.5 to
0.9; at 50% no faster. Grouped-query attention of the same bytes: its part of the bytes and a little, always faster.
Expanded: 10 times multi-head and more. Prompts, by multiplications a token: `R (D + 2 H E)` and the rotated planes
against `2 D H E`, before the same attention: 0.4 of multi-head at 12.5%, 0.7 at 25%, 1.1 at 50%.

    python benchmarks/latent.py [--quick] [--rounds 9] [--results results] [--note TEXT]
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kernels import matmul, parser
from kvfold.attention.grouped import grouped_attention
from kvfold.attention.latent import absorbed_attention, written_out
from kvfold.disk import record
from kvfold.evaluate.timing import interleave

STEP = {"batch": 8, "heads": 32, "widths": (64, 128), "context": 4096, "prompt": 1024}
QUICK = {**STEP, "batch": 2, "context": 1024, "prompt": 256}
PARTS = (0.5, 0.25, 0.125)
ROTATED = (1 / 16, 1 / 4, 1 / 2)  # of the bytes
EXPANDED = 1 / 4  # the split that is also written out
AGREE = {"float32": 1e-4, "bfloat16": 4e-2}
TARGET = {"part": 0.125, "over_multi_head": 1.0}


@dataclass(frozen=True)
class Split:
    """A part of multi-head's cache per token and layer: P rotated coordinates of each head and a latent of R."""

    part: float
    rotated: int
    latent: int

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.part:g}: {self.rotated // 2} planes, latent {self.latent}"


def splits(heads: int, width: int) -> Iterator[Split]:
    """The splits of each part, in whole planes."""
    for part in PARTS:
        elements = int(part * 2 * heads * width)
        for share in ROTATED:
            rotated = min(2 * max(1, round(share * elements / heads / 2)), width)
            yield Split(part, rotated, elements - rotated * heads)


class Case:
    """Random tensors of one head width and dtype, and every variant of a step on them."""

    def __init__(self, shape: dict[str, Any], width: int, dtype: str) -> None:
        self.shape, self.width, self.dtype = shape, width, dtype
        self.kind, self.draw = getattr(torch, dtype), torch.Generator().manual_seed(0)
        self.works: dict[tuple[str, str], Callable[[], object]] = {}
        self.bytes: dict[tuple[str, str], int] = {}

    def random(self, *size: int, spread: float = 1.0) -> Tensor:
        """Numbers of the case's dtype."""
        return (torch.randn(*size, generator=self.draw) * spread).to(self.kind)

    def latents(self, split: Split, tokens: int, batch: int) -> tuple[Tensor, ...]:
        """Rotated planes, latent, and what reads them, so scaled that logits are of unit spread."""
        heads, width = self.shape["heads"], self.width
        shrink = split.latent**-0.5
        return (
            self.random(batch, tokens, heads * split.rotated),
            self.random(batch, tokens, split.latent),
            self.random(heads, width - split.rotated, split.latent, spread=shrink),
            self.random(heads, width, split.latent, spread=shrink),
            self.random(heads, width),
        )

    def steps(self) -> None:
        """All variants of one decoded token."""
        batch, heads, keys, width = self.shape["batch"], self.shape["heads"], self.shape["context"], self.width
        q_BH1E = self.random(batch, heads, 1, width)
        whole = [self.random(batch, heads, keys, width) for _ in range(2)]
        for name, kernel in (("sdpa", sdpa), ("matmul", matmul)):
            self.add("multi-head", name, lambda run=kernel: run(q_BH1E, *whole), whole)
        for part in PARTS:
            few = [self.random(batch, int(part * heads), keys, width) for _ in range(2)]
            self.add("grouped", f"{part:g}", lambda few=few: grouped_attention(q_BH1E, *few), few)
        for split in splits(heads, width):
            kept = self.latents(split, keys, batch)

            def expanded(kept: Any = kept) -> Tensor:
                k_BHSE, v_BHSE = written_out(*kept)
                return min((sdpa, matmul), key=self._speed)(q_BH1E, k_BHSE, v_BHSE)

            def absorbed(kept: Any = kept) -> Tensor:
                return absorbed_attention(q_BH1E, *kept)

            truth = matmul(q_BH1E.float(), *written_out(*(each.float() for each in kept)))
            assert (absorbed().float() - truth).norm() < AGREE[self.dtype] * truth.norm(), split
            self.add("absorbed", split.name, absorbed, list(kept[:2]))
            if split == list(splits(heads, width))[3 * PARTS.index(split.part) + ROTATED.index(EXPANDED)]:
                self.add("expanded", split.name, expanded, list(kept[:2]))

    def _speed(self, kernel: Callable[..., Tensor]) -> int:
        """The faster kernel of multi-head on a CPU first: the fused one in float32, products in bfloat16."""
        return int((kernel is sdpa) != (self.dtype == "float32"))

    def prompts(self) -> None:
        """All variants of a prompt that is read, from hidden states as wide as all heads: projections and attention."""
        heads, tokens, width = self.shape["heads"], self.shape["prompt"], self.width
        x_BTD, q_BHTE = self.random(1, tokens, heads * width), self.random(1, heads, tokens, width)

        def project(size: int) -> Tensor:
            return self.random(heads * width, size, spread=(heads * width) ** -0.5)

        k_proj, v_proj = project(heads * width), project(heads * width)

        def whole() -> Tensor:
            k_BHTE, v_BHTE = ((x_BTD @ w_DK).unflatten(-1, (heads, width)).transpose(1, 2) for w_DK in (k_proj, v_proj))
            return grouped_attention(q_BHTE, k_BHTE, v_BHTE, causal=True)

        self.add("multi-head", "prompt", whole, [x_BTD @ k_proj, x_BTD @ v_proj])
        for split in list(splits(heads, width))[1 :: len(ROTATED)]:
            _, _, *up = self.latents(split, 1, 1)
            k_rope, kv_down = project(heads * split.rotated), project(split.latent)

            def written(up: Any = up, k_rope: Tensor = k_rope, kv_down: Tensor = kv_down) -> Tensor:
                k_BHTE, v_BHTE = written_out(x_BTD @ k_rope, x_BTD @ kv_down, *up)
                return grouped_attention(q_BHTE, k_BHTE, v_BHTE, causal=True)

            self.add("written out", f"prompt, {split.name}", written, [x_BTD @ k_rope, x_BTD @ kv_down])

    def add(self, family: str, name: str, work: Callable[[], object], cache: list[Tensor]) -> None:
        """One variant, and the bytes that it caches."""
        self.works[family, name] = work
        self.bytes[family, name] = sum(each.nbytes for each in cache)

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Rows of medians in milliseconds, variants in turns."""
        seconds = interleave({key: lambda work=work: work for key, work in self.works.items()}, rounds)
        return [
            {
                "dtype": self.dtype,
                "width": self.width,
                "family": family,
                "variant": name,
                "bytes": self.bytes[family, name],
                "ms": 1e3 * statistics.median(times),
                "fastest_ms": 1e3 * min(times),
            }
            for (family, name), times in seconds.items()
        ]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By dtype and width: multi-head's best kernel, and every other variant as a part of it."""
    found: dict[str, Any] = {}
    for dtype, width in dict.fromkeys((row["dtype"], row["width"]) for row in rows):
        own = {(r["family"], r["variant"]): r["ms"] for r in rows if (r["dtype"], r["width"]) == (dtype, width)}
        best = min(own["multi-head", "sdpa"], own["multi-head", "matmul"])
        prompt = own["multi-head", "prompt"]
        found[f"{dtype}, {width}"] = {
            "multi_head_ms": best,
            "multi_head_best": min(("sdpa", "matmul"), key=lambda name, own=own: own["multi-head", name]),
            "over_multi_head": {
                f"{family} {name}": ms / (prompt if name.startswith("prompt") else best)
                for (family, name), ms in own.items()
                if family != "multi-head"
            },
        }
    return found


def main() -> None:
    given = parser(__doc__, rounds=9).parse_args()
    shape, start, rows = QUICK if given.quick else STEP, time.perf_counter(), []
    with torch.inference_mode():
        for width in shape["widths"]:
            for dtype in AGREE:
                case = Case(shape, width, dtype)
                case.steps()
                case.prompts()
                rows += case.measure(given.rounds)
                for row in rows[-len(case.works) :]:
                    line = (
                        f"{row['dtype']:9} {row['width']:4} {row['family']:11} {row['variant']:36} {row['ms']:9.3f} ms"
                    )
                    print(line, flush=True)
                del case
    metrics: dict[str, Any] = {"rows": rows, **summarise(rows), "load_average": os.getloadavg()[0]}
    slowest = max(
        ratio
        for each in summarise(rows).values()
        for name, ratio in each["over_multi_head"].items()
        if name.startswith(f"absorbed {TARGET['part']:g}:")
    )
    metrics["target"] = {**TARGET, "slowest_split": slowest, "met": slowest < TARGET["over_multi_head"]}
    for name, each in summarise(rows).items():
        print(name, {key: round(ratio, 2) for key, ratio in each["over_multi_head"].items()})
    settings = {**shape, "rounds": given.rounds, "quick": given.quick, "note": given.note}
    wall = time.perf_counter() - start
    made = record.make("benchmark", "decode-latent", settings, metrics, seed=0, wall_seconds=wall)
    print(metrics["target"], record.write(made, given.results))


if __name__ == "__main__":
    main()
