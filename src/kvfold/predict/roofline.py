"""The roofline: a decode step takes as long as its memory traffic or its operations, whichever is longer.

    seconds = max(bytes / bandwidth, FLOPs / peak)        (Williams, Waterman & Patterson 2009)

A step reads every weight once for the whole batch, and the cache of each sequence once. Kernels reach a part of the
roofline, so the ratio of two predictions says more than either.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from kvfold.contracts.cache import CacheSpec
from kvfold.contracts.site import DTYPE_BYTES, Shape
from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, read_json, write_json
from kvfold.errors import SettingError, choices
from kvfold.machine import available, best_device, clock, describe, device_memory

HardwareName = Literal["a100", "h100", "h200", "l4", "local"]


@dataclass(frozen=True)
class Hardware:
    """One device."""

    name: str
    about: str
    memory: Annotated[int, Field(gt=0)]  # bytes
    bandwidth: Annotated[float, Field(gt=0, lt=math.inf)]  # bytes/s
    flops: Mapping[str, Annotated[float, Field(gt=0, lt=math.inf)]]  # dense FLOP/s of matrix products by dtype
    measured: str | None = None  # the date; None for published numbers

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in this dtype; 16-bit formats are equally fast."""
        return self.flops["float32" if DTYPE_BYTES[dtype] > 2 else "bfloat16"]


PUBLISHED = {
    name: Hardware(name, about, memory * 10**9, bandwidth * 1e9, {"bfloat16": half * 1e12, "float32": single * 1e12})
    for name, about, memory, bandwidth, half, single in (  # GB, GB/s, TFLOP/s without sparsity
        ("a100", "NVIDIA A100 80 GB SXM", 80, 2039, 312, 19.5),
        ("h100", "NVIDIA H100 SXM", 80, 3350, 989.4, 66.9),
        ("h200", "NVIDIA H200 SXM", 141, 4800, 989.4, 66.9),
        ("l4", "NVIDIA L4", 24, 300, 121, 30.3),
    )
}


def hardware(name: str) -> Hardware:
    """The device of this name; `local` is this machine, measured at the first use. Raises SettingError."""
    if name == "local":
        return local()
    if name not in PUBLISHED:
        raise SettingError(f"hardware {name!r} is not known", allowed=choices([*PUBLISHED, "local"]))
    return PUBLISHED[name]


# --- one decode step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The work of one device to decode one token of every sequence: bytes read and floating-point operations."""

    weight_bytes: float
    cache_bytes: float
    flops: float

    def seconds(self, device: Hardware, dtype: str) -> float:
        """The time of the step."""
        return max((self.weight_bytes + self.cache_bytes) / device.bandwidth, self.flops / device.peak(dtype))

    def bound(self, device: Hardware, dtype: str) -> Literal["memory", "compute"]:
        """The roof that limits the step."""
        moved = (self.weight_bytes + self.cache_bytes) / device.bandwidth
        return "memory" if moved >= self.flops / device.peak(dtype) else "compute"


def decode_step(
    shape: Shape,
    cache: CacheSpec,
    *,
    context: int,
    batch: int,
    dtype: str,
    tied: bool,
    tensor_parallel: int = 1,
    encoder_context: int = 0,
) -> Step:
    """Bytes and operations of one decode step after `context` cached tokens, on each of `tensor_parallel` devices.

    If the embedding is not `tied` to the output matrix, a step reads only its own rows of it. An encoder has read its
    `encoder_context` tokens before: a step reads neither its weights nor those that make the cache of
    cross-attention. A cache that layers share is read by each of them.
    """
    itemsize = DTYPE_BYTES[dtype]
    crossed = [site for key, site in shape.sites.items() if key.kind == "cross"]
    once = sum(
        math.prod(form)
        for site in crossed
        for role, form in site.roles().items()
        if role in (("k", "v") if site.kept is None else ("kv_down",))
    )
    read = shape.parameters - shape.encoder_parameters - once - (0 if tied else shape.vocab_size * shape.hidden_size)
    unshared = CacheSpec(tuple(replace(slot, storage=str(number)) for number, slot in enumerate(cache.slots)))
    attention = sum(
        2 * site.num_attention_heads * site.multiplied(context)
        for key, site in shape.sites.items()
        if key.kind == "self"
    )
    attention += sum(
        2 * site.num_attention_heads * (site.read or 2 * site.head_dim) * encoder_context for site in crossed
    )
    return Step(
        weight_bytes=read * itemsize / tensor_parallel,
        cache_bytes=unshared.bytes(context, batch=batch, itemsize=itemsize, encoder_tokens=encoder_context)
        * cache_share(shape, tensor_parallel),
        flops=batch * (2 * read + attention) / tensor_parallel,
    )


def cache_share(shape: Shape, tensor_parallel: int) -> float:
    """The share of the cache on each device: heads are split, or replicated if too few; latents are replicated."""
    sites = [site for kind, site in shape.sites.items() if kind.kind != "encoder" and site.source is None]
    whole = [max(1, sum(site.cached.values())) for site in sites]  # 0 for states
    parts = [
        1 if site.kept is not None and site.linear is None else max(1 / tensor_parallel, 1 / site.num_key_value_heads)
        for site in sites
    ]
    return sum(size * part for size, part in zip(whole, parts, strict=True)) / sum(whole)


# --- this machine ---------------------------------------------------------------------------------------------------


def local() -> Hardware:
    """This machine, from kvfold's cache folder, or measured now (in seconds) and stored with its date."""
    path = cache_folder() / "hardware" / f"{fingerprint(_identity())[:16]}.json"
    kept = _kept(path)
    if kept is not None:
        return kept
    made = measure()
    with disk_errors(path):
        prepare_cache(path.parent)
        write_json(path, asdict(made))
    return made


def _kept(path: Path) -> Hardware | None:
    """An earlier measurement; None if there is none, or the file is damaged."""
    try:
        kept = pydantic.TypeAdapter(Hardware).validate_python(read_json(path))
    except pydantic.ValidationError:
        return None
    return kept if {"bfloat16", "float32"} <= kept.flops.keys() else None


def _identity() -> dict[str, Any]:
    """What a measurement depends on, known without torch."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return {"machine": platform.node(), "cores": available()} | {
        name: os.environ.get(name) for name in (*threads, *limits)
    }


ENOUGH = 1.0  # seconds of runs; one bf16 product takes 4 where the processor emulates it


def measure() -> Hardware:
    """Measure read bandwidth and matrix-product FLOP/s of this machine's GPU, or of its processor without one."""
    import torch

    device = best_device()
    gpu = device == "cuda"

    def best(work: Callable[[], object], repeats: int) -> float:
        """Seconds of the fastest run, which other processes disturb least; fewer runs where they take long."""
        times: list[float] = []
        while len(times) < repeats and sum(times) < ENOUGH:
            start = clock()
            work()
            times.append(clock() - start)
        return min(times)

    with torch.inference_mode():
        side = 32768 if gpu else 6144  # 4 GiB or 144 MiB: larger than any processor's cache
        block = torch.randn(side, side, device=device)
        vector = torch.randn(side, device=device)
        seconds = min(best(lambda: block @ vector, 8), best(block.max, 8))
        bandwidth = block.nbytes / seconds
        flops = {}
        side = 8192 if gpu else 1536
        for dtype in ("bfloat16", "float32"):
            square = torch.randn(side, side, device=device).to(getattr(torch, dtype))
            flops[dtype] = 2 * side**3 / best(lambda matrix=square: matrix @ matrix, 8)  # type: ignore[misc]
    return Hardware(
        "local", describe(), device_memory(device), bandwidth, flops, time.strftime("%Y-%m-%d", time.gmtime())
    )
