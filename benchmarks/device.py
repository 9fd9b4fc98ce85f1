"""What one accelerator does with kvfold: decode and prefill against a measured roofline, conversion, and uptraining.

    roofline   a large copy and a large bf16 product: the two ceilings that everything below is held against
    decode     one attention step of 16 sequences, 32 query heads of 128, behind 4k, 32k and 128k cached tokens:
               multi-head, 8 heads, 1 head, a latent of an eighth of the bytes, and a state of a fixed size; each
               candidate kernel is timed and the fastest stands in the table
    prefill    causal attention of one prompt of 4k and 32k tokens, the same variants of heads
    uptrain    a 1B shape, 8 rows of 2,048 tokens a step: cross-entropy, and KL to a teacher of the same size
    convert    one layer of a 7B (width 4,096, MLP 11,059, 32 heads of 128 folded to 8): calibration, fit and repair

A time is the median of rounds between synchronisations; each round repeats the call until it lasts 5 ms or more. A step
reads its cache from memory: the smallest cache of the full run is 8 times the second-level cache of an H100.

Predicted before the first run on an H100 (3.0 TB/s copied, 790 TFLOP/s): a decode step of 8 heads at 32k tokens reads
2.1 GB, 0.7 ms at 3.0 TB/s; PyTorch's fused kernel with `enable_gqa` splits keys over the chip and takes 1.2x of that;
multi-head takes 4x as long, one head an eighth, and the state no time that depends on the tokens. The latent is read by
three plain products, so twice: 2x of its bytes' time. Uptraining: 40% of the peak with cross-entropy, KL 1.45x. A layer
of a 7B on 65k tokens: calibration 2 s, fit 1 s, repair 10 s, all of it float64 products at 60 TFLOP/s.

    python benchmarks/device.py [--tiny] [--only decode,prefill,uptrain,convert] [--results results] [--note TEXT]

What an H200 showed (4.2 TB/s, 776 TFLOP/s; docs/log.md, 2026-11-27): a decode step of multi-head and of 8 heads takes
0.90 to 1.02 of the roofline's time at every length, one head 1.4x from 32k tokens on, the latent 2.2x to 2.4x. Wrong in
the prediction was the conversion: it had not ended after 100 s.

`--tiny` runs every part at toy sizes on any device: does it run? Its record says so.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fit import fit_layer
from kernels import matmul
from kvfold import hf
from kvfold.attention.grouped import grouped_attention
from kvfold.attention.latent import absorbed_attention, written_out
from kvfold.attention.linear import Past, Sums, Weights, decode
from kvfold.disk import record
from kvfold.families import all_families
from kvfold.machine import best_device, describe
from kvfold.progress import SILENT
from kvfold.text.tokens import TokenFile
from kvfold.train.loop import Work, parameter_groups, train
from kvfold.train.state import LOG
from kvfold.train.uptrain import UptrainSettings, objective

Kernels = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Sizes:
    """How large each part is."""

    batch: int = 16
    heads: int = 32
    width: int = 128
    contexts: tuple[int, ...] = (4096, 32_768, 131_072)
    prompts: tuple[int, ...] = (4096, 32_768)
    copied: int = 4 << 30  # bytes
    product: int = 8192
    layer: int = 4096
    calibration: int = 65_536
    steps: int = 12
    rows: int = 8
    length: int = 2048
    rounds: int = 7
    model: Mapping[str, int] | None = None

    def config(self) -> dict[str, Any]:
        """config.json of the model that is uptrained: 1.1B parameters unless `model` has other sizes."""
        return {
            **all_families()["llama"].tiny(),
            "vocab_size": 32_000,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "dtype": "float32",
            **(self.model or {}),
        }


TINY = Sizes(
    batch=2,
    heads=8,
    width=16,
    contexts=(64, 128),
    prompts=(32,),
    copied=1 << 20,
    product=64,
    layer=512,
    calibration=512,
    steps=2,
    rows=2,
    length=32,
    rounds=2,
    model={"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 4},
)


def timed(work: Callable[[], object], rounds: int) -> float:
    """Seconds of one call: the median over rounds, of which each repeats it for 5 ms or more."""
    work()
    repeats = max(1, math.ceil(0.005 / max(_seconds(work, 1), 1e-6)))
    return statistics.median(_seconds(work, repeats) for _ in range(rounds))


def _seconds(work: Callable[[], object], repeats: int) -> float:
    _synchronise()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronise()
    return (time.perf_counter() - began) / repeats


def _synchronise() -> None:
    if best_device() == "cuda":
        torch.cuda.synchronize()


def fastest(kernels: Kernels, rounds: int) -> tuple[str, float, dict[str, float]]:
    """The fastest kernel's name and seconds, and milliseconds of all that ran."""
    seconds = {name: timed(work, rounds) for name, work in kernels.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return best, seconds[best], {name: 1e3 * each for name, each in seconds.items()}


class Random:
    """Normal tensors on the device."""

    def __init__(self) -> None:
        self.draw = torch.Generator(best_device()).manual_seed(0)

    def __call__(self, *size: int, spread: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of this size and standard deviation."""
        return torch.randn(*size, generator=self.draw, device=best_device(), dtype=dtype) * spread


def roofline(sizes: Sizes) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of a bf16 product."""
    random = Random()
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=best_device()).fill_(1)
    target = torch.empty_like(source)
    left, right = (random(sizes.product, sizes.product) for _ in range(2))
    return {
        "bytes_per_second": 2 * sizes.copied / timed(lambda: target.copy_(source), sizes.rounds),
        "flops_per_second": 2 * sizes.product**3 / timed(lambda: left @ right, sizes.rounds),
    }


def attention_kernels(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute causal attention of grouped heads where the last query sees every key."""
    grouped, prompt = q_BHTE.shape[1] != k_BGSE.shape[1], q_BHTE.shape[2] > 1
    kernels = {
        "kvfold": lambda: grouped_attention(q_BHTE, k_BGSE, v_BGSE, causal=prompt),
        "sdpa": lambda: sdpa(q_BHTE, k_BGSE, v_BGSE, is_causal=prompt, enable_gqa=grouped),
    }
    if not prompt:
        batch, heads, _, width = q_BHTE.shape
        q_BGRE = q_BHTE.reshape(batch, k_BGSE.shape[1], heads // k_BGSE.shape[1], width)
        kernels["rows"] = lambda: sdpa(q_BGRE, k_BGSE, v_BGSE)
        kernels["matmul"] = lambda: matmul(q_BGRE, k_BGSE, v_BGSE)
    return kernels


def grouped_step(sizes: Sizes, random: Random, kept: int, context: int) -> tuple[list[Tensor], Kernels]:
    """The cache of `kept` key/value heads, and what decodes from it."""
    q_BH1E = random(sizes.batch, sizes.heads, 1, sizes.width)
    cache = [random(sizes.batch, kept, context, sizes.width) for _ in range(2)]
    return cache, attention_kernels(q_BH1E, *cache)


def latent_step(sizes: Sizes, random: Random, context: int) -> tuple[list[Tensor], Kernels]:
    """A latent of an eighth of multi-head's bytes, a quarter of them rotated; checked against keys written out."""
    heads, width = sizes.heads, sizes.width
    elements = 2 * heads * width // 8
    rotated = 2 * max(1, elements // 4 // heads // 2)
    latent = elements - heads * rotated
    q_BH1E = random(sizes.batch, heads, 1, width)
    cache = [random(sizes.batch, context, heads * rotated), random(sizes.batch, context, latent)]
    up = (
        random(heads, width - rotated, latent, spread=latent**-0.5),
        random(heads, width, latent, spread=latent**-0.5),
        random(heads, width),
    )
    few = [each[:, :64] for each in cache]
    truth = sdpa(q_BH1E, *written_out(*few, *up)).float()
    assert (absorbed_attention(q_BH1E, *few, *up).float() - truth).norm() < 4e-2 * truth.norm()
    return cache, {"absorbed": lambda: absorbed_attention(q_BH1E, *cache, *up)}


def state_step(sizes: Sizes, random: Random) -> tuple[list[Tensor], Kernels]:
    """Sums of keys times values, whose size no context changes."""
    batch, heads, width = sizes.batch, sizes.heads, sizes.width
    state_BGFE = random(batch, heads, width, width, dtype=torch.float32)
    mass_BGF = random(batch, heads, width, dtype=torch.float32).abs()
    past = Past(sums=Sums(state_BGFE, mass_BGF))
    q_BH1E, k_BG1E, v_BG1E = (random(batch, heads, 1, width) for _ in range(3))
    phi_BH1F = random(batch, heads, 1, width).abs()
    weights = Weights(window=0, normalised=True, scale=1.0)
    return [state_BGFE, mass_BGF], {"recurrent": lambda: decode(q_BH1E, k_BG1E, v_BG1E, phi_BH1F, weights, past)}


def decode_rows(sizes: Sizes, bandwidth: float) -> list[dict[str, Any]]:
    """One attention step behind each context, by every variant of the cache."""
    rows, random = [], Random()
    makers: dict[str, Callable[[int], tuple[list[Tensor], Kernels]]] = {
        "mha": lambda context: grouped_step(sizes, random, sizes.heads, context),
        "gqa-8": lambda context: grouped_step(sizes, random, sizes.heads // 4, context),
        "mqa": lambda context: grouped_step(sizes, random, 1, context),
        "latent": lambda context: latent_step(sizes, random, context),
        "state": lambda context: state_step(sizes, random),
    }
    for context in sizes.contexts:
        for variant, make in makers.items():
            cache, kernels = make(context)
            best, seconds, every = fastest(kernels, sizes.rounds)
            held = sum(each.nbytes for each in cache)
            del cache, kernels
            rows.append(
                {
                    "context": context,
                    "variant": variant,
                    "kernel": best,
                    "ms": 1e3 * seconds,
                    "bytes": held,
                    "over_roofline": seconds * bandwidth / held,
                    "every_kernel_ms": every,
                }
            )
            print(f"decode {context:>7,} {variant:8} {1e3 * seconds:9.3f} ms  {seconds * bandwidth / held:5.2f}", best)
    return rows


def prefill_rows(sizes: Sizes, flops: float) -> list[dict[str, Any]]:
    """Causal attention of one prompt."""
    rows, random = [], Random()
    for tokens in sizes.prompts:
        q_BHTE = random(1, sizes.heads, tokens, sizes.width)
        for variant, kept in (("mha", sizes.heads), ("gqa-8", max(1, sizes.heads // 4)), ("mqa", 1)):
            cache = [random(1, kept, tokens, sizes.width) for _ in range(2)]
            best, seconds, every = fastest(attention_kernels(q_BHTE, *cache), sizes.rounds)
            share = 2 * sizes.heads * sizes.width * tokens**2 / seconds / flops
            rows.append(
                {
                    "tokens": tokens,
                    "variant": variant,
                    "kernel": best,
                    "ms": 1e3 * seconds,
                    "share_of_peak": share,
                    "every_kernel_ms": every,
                }
            )
            print(f"prefill {tokens:>6,} {variant:8} {1e3 * seconds:9.3f} ms  {share:5.2f} of the peak", best)
    return rows


def convert_layer(sizes: Sizes) -> dict[str, float]:
    """Seconds and bytes of the device for one layer of a 7B."""
    if best_device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
        found = fit_layer(sizes.layer, sizes.calibration, Path(room), repaired=True)
    if best_device() == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated()
    print("convert", {name: round(value, 2) for name, value in found.items()})
    return found


def uptrain(sizes: Sizes, flops: float) -> dict[str, Any]:
    """Tokens a second of the training loop, and its share of the bf16 peak: 6 operations a parameter and token."""
    config = sizes.config()
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 1 << 20).astype(np.uint16)
    tokens = TokenFile(Path("random"), ids, config["vocab_size"], "random", "random tokens")
    settings = UptrainSettings(
        data="stdlib",
        tokens=sizes.steps * sizes.rows * sizes.length,
        batch_size=sizes.rows,
        sequence_length=sizes.length,
        log_every=1,
    )
    model = hf.build(config, seed=0, attention=hf.ATTENTION).train().to(best_device())
    teacher = hf.build(config, seed=1, attention=hf.ATTENTION).eval().requires_grad_(False).to(best_device())
    count = sum(each.numel() for each in model.parameters())
    found: dict[str, Any] = {"parameters": count}
    for name, guide in (("ce", None), ("kl", teacher)):
        if best_device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        work = Work(
            "benchmark",
            sizes.steps,
            objective(model, guide, {name: 1.0}, (), settings),
            lambda: parameter_groups(dict(model.named_parameters()), settings.weight_decay),
        )
        with tempfile.TemporaryDirectory() as folder:
            train(model, [work], tokens, settings, Path(folder), SILENT)
            lines = [json.loads(line) for line in (Path(folder) / LOG).read_text().splitlines()]
        pace = statistics.median(line["tokens_per_second"] for line in lines[1:] if "tokens_per_second" in line)
        found[name] = {"tokens_per_second": pace, "share_of_peak": 6 * count * pace / flops}
        if best_device() == "cuda":
            found[name]["device_bytes"] = torch.cuda.max_memory_allocated()
        print("uptrain", name, found[name])
    found["kl_cost"] = found["ce"]["tokens_per_second"] / found["kl"]["tokens_per_second"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on any device: a trial, not a result")
    parser.add_argument("--only", default="decode,prefill,uptrain,convert", help="parts, by comma")
    parser.add_argument("--results", default="results")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    given = parser.parse_args()
    sizes, parts = TINY if given.tiny else Sizes(), given.only.split(",")
    began = time.perf_counter()
    ceilings = roofline(sizes)
    print(describe(), {name: f"{value:.3g}" for name, value in ceilings.items()})
    metrics: dict[str, Any] = {"roofline": ceilings}
    with torch.inference_mode():
        if "decode" in parts:
            metrics["decode"] = decode_rows(sizes, ceilings["bytes_per_second"])
        if "prefill" in parts:
            metrics["prefill"] = prefill_rows(sizes, ceilings["flops_per_second"])
    if "uptrain" in parts:
        metrics["uptrain"] = uptrain(sizes, ceilings["flops_per_second"])
    if "convert" in parts:
        metrics["convert"] = convert_layer(sizes)
    settings = {**asdict(sizes), "parts": parts, "note": given.note}
    made = record.make("benchmark", "device", settings, metrics, seed=0, wall_seconds=time.perf_counter() - began)
    print(record.write(made, given.results))


if __name__ == "__main__":
    main()
