"""Decoding with fewer key/value heads: one attention step by every kernel, and whole models where the cache dominates.

One step, as when one token of each of 8 sequences is decoded: 32 query heads of 64, 4,096 cached tokens, and 32, 16,
8, 4, 2 or 1 key/value heads, in float32 and bfloat16. All variants take turns; medians over the rounds:

    sdpa, matmul   multi-head: PyTorch's fused kernel, and two matrix products with the softmax between them
    kvfold         kvfold's own, for any number of heads: query groups as rows of one matrix
    enable_gqa     PyTorch's fused kernel with its option for groups
    repeat_kv      keys and values repeated in memory, then the fused kernel
    read           a plain sum over the same bytes: the lower bound of every kernel
    softmax        over logits of the step's size: the same for any number of key/value heads

Predicted, before it was first run: multi-head by its best kernel takes 1.0x to 1.2x of reading its 537 MB (float32).
Eight heads have a quarter of the bytes; softmax and 0.27 GFLOP stay, so 0.35x to 0.45x of multi-head; repeat_kv is 5x
slower than multi-head. One head: 0.1x, all of it arithmetic. bfloat16: multi-head sdpa is 4x slower than matmul; eight
heads take 0.45x of matmul.

Whole models: 4 random Llama layers of 32 heads of 64, width and MLP 512, so that at 4,096 tokens x 8 the cache is 27
times the weights; multi-head, 8 heads and 1 head by `kvfold bench`, beside the roofline whose bandwidth is measured in
the same run. Predicted: by bytes 3.6x and 15x; the roofline about 3.6x and 7x, for with 1 head arithmetic bounds a step
on a CPU; measured 2.5x and 5x.

Latents of the same model (record `decode-mla`): grouped heads, `elitekv` and `mla` at 1/8 to 1/7 of the cache. A head
multiplies each cached token of a latent with 64 + 2 x 512 numbers instead of 2 x 64, so that a step is 8 times the
arithmetic on a seventh of the bytes. Predicted: grouped heads 4x as fast as multi-head, both latents 0.8x to 1.5x.

    python benchmarks/decode.py [--only steps|models|latents] [--quick] [--rounds 15] [--results results] [--note TEXT]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kernels import matmul, parser
from kvfold import hf
from kvfold.attention.grouped import grouped_attention
from kvfold.convert.conversion import convert
from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.evaluate.bench import BenchSettings, bench
from kvfold.evaluate.timing import interleave
from kvfold.families import all_families
from kvfold.progress import Silent

STEP = {"batch": 8, "heads": 32, "width": 64, "context": 4096, "kv_heads": (32, 16, 8, 4, 2, 1)}
QUICK_STEP = {**STEP, "batch": 2, "context": 1024}
QUICK_PLACE = (512, 2)  # context and batch of whole models
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
HEADS = {f"kv-heads-{heads}": ("gqa", {"kv_heads": heads}) for heads in (8, 1)}
LATENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kv-heads-4": ("gqa", {"kv_heads": 4}),
    "elitekv-64-512": ("elitekv", {"rope_chunks": "1", "latent_dim": "512"}),
    "mla-64-512": ("mla", {"rope_dim": 64, "latent_dim": 512}),
}
"""Students by name: method and settings."""
Students = Mapping[str, tuple[str, Mapping[str, Any]]]
TARGET = 0.5  # of multi-head's best kernel, for 8 key/value heads in float32
AGREE = {"float32": 1e-4, "bfloat16": 3e-2}


class Lines(Silent):
    """Prints lines of progress."""

    def say(self, line: str) -> None:
        """Print the line."""
        print(line, flush=True)


# --- one attention step ----------------------------------------------------------------------------------------------


def repeat_kv(q_BH1E: Tensor, k_BGSE: Tensor, v_BGSE: Tensor) -> Tensor:
    rows = q_BH1E.shape[1] // k_BGSE.shape[1]
    return sdpa(q_BH1E, k_BGSE.repeat_interleave(rows, 1), v_BGSE.repeat_interleave(rows, 1))


def enable_gqa(q_BH1E: Tensor, k_BGSE: Tensor, v_BGSE: Tensor) -> Tensor:
    return sdpa(q_BH1E, k_BGSE, v_BGSE, enable_gqa=True)


MULTI_HEAD = {"sdpa": sdpa, "matmul": matmul, "kvfold": grouped_attention}
GROUPED = {"kvfold": grouped_attention, "enable_gqa": enable_gqa, "repeat_kv": repeat_kv}


def step(shape: dict[str, Any], dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of (key/value heads, kernel): bytes of keys and values, and the median milliseconds of one step."""
    kind, draw = getattr(torch, dtype), torch.Generator().manual_seed(0)
    batch, heads, keys, width = shape["batch"], shape["heads"], shape["context"], shape["width"]

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(kind)

    q_BH1E, logits_BHS = random(batch, heads, 1, width), random(batch, heads, keys)
    works: dict[tuple[int, str], Callable[[], object]] = {(0, "softmax"): lambda: logits_BHS.softmax(-1)}
    size = {0: logits_BHS.nbytes}
    for groups in shape["kv_heads"]:
        k_BGSE, v_BGSE = random(batch, groups, keys, width), random(batch, groups, keys, width)
        size[groups] = k_BGSE.nbytes + v_BGSE.nbytes
        truth = sdpa(*(each.float() for each in (q_BH1E, k_BGSE, v_BGSE)), enable_gqa=True)
        for name, kernel in (MULTI_HEAD if groups == heads else GROUPED).items():
            found = kernel(q_BH1E, k_BGSE, v_BGSE).float()
            assert (found - truth).norm() < AGREE[dtype] * truth.norm(), (name, groups)
            works[groups, name] = lambda run=kernel, k=k_BGSE, v=v_BGSE: run(q_BH1E, k, v)
        # two numbers of bfloat16 as one of float32: a sum of bytes, and not of conversions
        flat = [each.view(torch.float32) for each in (k_BGSE, v_BGSE)]
        works[groups, "read"] = lambda flat=flat: [each.sum() for each in flat]
    seconds = interleave({key: lambda work=work: work for key, work in works.items()}, rounds)
    return [
        {
            "dtype": dtype,
            "kv_heads": groups or None,
            "kernel": name,
            "bytes": size[groups],
            "ms": 1e3 * statistics.median(times),
            "fastest_ms": 1e3 * min(times),
        }
        for (groups, name), times in seconds.items()
    ]


def summarise(rows: list[dict[str, Any]], shape: dict[str, Any]) -> dict[str, Any]:
    """By dtype: multi-head's best kernel, time over groups as a part of it, and what 8 heads' time is made of."""
    found: dict[str, Any] = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ms = {(row["kv_heads"], row["kernel"]): row["ms"] for row in rows if row["dtype"] == dtype}
        best = min(MULTI_HEAD, key=lambda kernel: ms[shape["heads"], kernel])
        base = ms[shape["heads"], best]
        grouped = ms[8, "kvfold"]
        found[dtype] = {
            "multi_head_best": best,
            "multi_head_ms": base,
            "multi_head_over_read": base / ms[shape["heads"], "read"],
            "kvfold_over_multi_head": {str(g): ms[g, "kvfold"] / base for g in shape["kv_heads"]},
            "fastest_by_heads": {
                str(g): min((n for h, n in ms if h == g and n != "read"), key=lambda n: ms[g, n])
                for g in shape["kv_heads"]
            },
            "eight_heads": {
                "over_multi_head": grouped / base,
                "bytes_allow": 8 / shape["heads"],
                "read": ms[8, "read"] / base,
                "softmax": ms[None, "softmax"] / base,
                "products_and_rest": (grouped - ms[8, "read"] - ms[None, "softmax"]) / base,
                "over_multi_head_sdpa": grouped / ms[shape["heads"], "sdpa"],
            },
        }
    return found


def steps(given: argparse.Namespace) -> Record:
    """The benchmark of one step, as a record."""
    shape, start = QUICK_STEP if given.quick else STEP, time.perf_counter()
    with torch.inference_mode():
        rows = [row for dtype in AGREE for row in step(shape, dtype, given.rounds)]
    metrics = {"rows": rows, **summarise(rows, shape), "load_average": os.getloadavg()[0]}
    metrics["target"] = {"allowed": TARGET, "met": metrics["float32"]["eight_heads"]["over_multi_head"] <= TARGET}
    settings = {**shape, "rounds": given.rounds, "quick": given.quick, "note": given.note}
    wall = time.perf_counter() - start
    return record.make("benchmark", "decode-step", settings, metrics, seed=0, wall_seconds=wall)


# --- whole models ----------------------------------------------------------------------------------------------------


def models(given: argparse.Namespace, name: str, students: Students, place: tuple[int, int], room: Path) -> Record:
    """A random multi-head model and its students by `kvfold bench`; this machine's bandwidth is measured anew."""
    os.environ["KVFOLD_CACHE"] = str(room / "cache")
    config = {**all_families()["llama"].tiny(), **MODEL}
    teacher = room / "multi-head"
    hf.build(config, seed=0).save_pretrained(teacher)  # type: ignore[operator]
    made = [convert(teacher, room / label, method, settings) for label, (method, settings) in students.items()]
    context, batch = QUICK_PLACE if given.quick else place
    settings = BenchSettings(
        context=(context,),
        batch=(batch,),
        repeats=2 if given.quick else 5,
        fp8=False,
    )
    whole = bench([teacher, *made], settings, records=room / "records", name=name, progress=Lines())
    # the models are made in each run: the record names their shapes, not their paths
    kept = {**whole.settings, "models": ["multi-head", *students]}
    kept |= {"config": MODEL, "quick": given.quick, "note": given.note}
    return record.Record(**{**vars(whole), "kind": "benchmark", "settings": kept, "identity": ""})


def main() -> None:
    flags = parser(__doc__, rounds=15)
    flags.add_argument("--only", choices=("steps", "models", "latents"), help="one of the three (default: all)")
    given = flags.parse_args()
    if given.only in (None, "steps"):
        made = steps(given)
        for row in made.metrics["rows"]:
            print(f"{row['dtype']:9} {row['kv_heads'] or '':>3} {row['kernel']:10} {row['ms']:9.3f} ms")
        for dtype in AGREE:
            print(dtype, made.metrics[dtype])
        print(made.metrics["target"], record.write(made, given.results))
    for part, name, students, place in (
        ("models", "decode-model", HEADS, (4096, 8)),
        ("latents", "decode-mla", LATENTS, (2048, 4)),  # smaller: a prompt writes out the keys and values of all heads
    ):
        if given.only not in (None, part):
            continue
        with tempfile.TemporaryDirectory(prefix="kvfold-") as room:
            whole = models(given, name, students, place, Path(room))
        for row in [*whole.metrics["rows"], *whole.metrics["ratios"]]:
            print(row)
        print(record.write(whole, given.results))


if __name__ == "__main__":
    main()
