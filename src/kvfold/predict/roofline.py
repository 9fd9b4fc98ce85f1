"""The roofline: a decode step takes as long as its bytes or its operations need, whichever is longer.

    seconds = max(bytes / bandwidth, FLOPs / peak)        (Williams, Waterman & Patterson 2009)

A step reads every weight once for the whole batch and every sequence's cache once. Kernels reach a part of it, so
the ratio of two predictions says more than either. Published numbers are of the SXM or PCIe card that is named,
dense (without sparsity); `local` is this machine as measured once by torch.
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
from kvfold.machine import best_device, describe

HardwareName = Literal["a100", "h100", "h200", "l4", "local"]


@dataclass(frozen=True)
class Hardware:
    """One device: bytes of memory, bytes/s of bandwidth, dense FLOP/s by dtype, and when it was measured, if it was."""

    name: str
    about: str
    memory: Annotated[int, Field(gt=0)]
    bandwidth: Annotated[float, Field(gt=0, lt=math.inf)]
    flops: Mapping[str, Annotated[float, Field(gt=0, lt=math.inf)]]
    measured: str | None = None

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in this dtype; 16-bit formats are equally fast."""
        return self.flops["float32" if DTYPE_BYTES[dtype] > 2 else "bfloat16"]


def _published(
    name: str, about: str, gigabytes: int, gigabytes_s: float, teraflops_16: float, teraflops_32: float
) -> Hardware:
    flops = {"bfloat16": teraflops_16 * 1e12, "float32": teraflops_32 * 1e12}
    return Hardware(name, about, gigabytes * 10**9, gigabytes_s * 1e9, flops)


PUBLISHED = {
    card.name: card
    for card in (
        _published("a100", "NVIDIA A100 80 GB SXM", 80, 2039, 312, 19.5),
        _published("h100", "NVIDIA H100 SXM", 80, 3350, 989.4, 66.9),
        _published("h200", "NVIDIA H200 SXM", 141, 4800, 989.4, 66.9),
        _published("l4", "NVIDIA L4", 24, 300, 121, 30.3),
    )
}


def hardware(name: str) -> Hardware:
    """The device of this name; `local` is measured at its first use. Raises SettingError for an unknown name."""
    if name == "local":
        return local()
    if name not in PUBLISHED:
        raise SettingError(f"hardware {name!r} is not known", allowed=choices([*PUBLISHED, "local"]))
    return PUBLISHED[name]


# --- one decode step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one device does to decode one token of every sequence: bytes moved and floating-point operations."""

    weight_bytes: float
    cache_bytes: float
    flops: float

    def seconds(self, device: Hardware, dtype: str) -> float:
        """The roofline's time of the step."""
        return max((self.weight_bytes + self.cache_bytes) / device.bandwidth, self.flops / device.peak(dtype))

    def bound(self, device: Hardware, dtype: str) -> Literal["memory", "compute"]:
        """Which roof it is."""
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

    `tied` says that the embedding is the output matrix too; otherwise a step reads no more of it than its own rows.
    An encoder has read its `encoder_context` tokens before: its weights are not read again, and neither is what makes
    the cache of a cross-attention of them. A cache that layers share saves room and not reads: every layer reads it.
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
    """The part of the cache that each device holds: heads are split, and replicated when they are too few.

    What is not of heads, as a latent that all of them read, is replicated.
    """
    sites = [site for kind, site in shape.sites.items() if kind.kind != "encoder" and site.source is None]
    whole = [max(1, sum(site.cached.values())) for site in sites]  # sums, which no token adds to, are of heads too
    parts = [
        1 if site.kept is not None and site.linear is None else max(1 / tensor_parallel, 1 / site.num_key_value_heads)
        for site in sites
    ]
    return sum(size * part for size, part in zip(whole, parts, strict=True)) / sum(whole)


# --- this machine ---------------------------------------------------------------------------------------------------


def local() -> Hardware:
    """This machine as measured: read from kvfold's cache folder, or measured now (seconds) and kept with its date."""
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
    """What was measured before; None when nothing was, or the file is damaged."""
    try:
        kept = pydantic.TypeAdapter(Hardware).validate_python(read_json(path))
    except pydantic.ValidationError:
        return None
    return kept if {"bfloat16", "float32"} <= kept.flops.keys() else None


def _identity() -> dict[str, Any]:
    """What changes a measurement, known without torch."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": platform.node(), "cores": cores} | {name: os.environ.get(name) for name in names}


def measure() -> Hardware:
    """Measure read bandwidth and matrix-product FLOP/s of this machine's GPU, or of its processor without one."""
    import torch

    device = best_device()
    gpu = device == "cuda"
    memory = int(torch.cuda.get_device_properties(0).total_memory) if gpu else processor_memory()

    def best(work: Callable[[], object], repeats: int) -> float:
        """Seconds of the fastest run: what the machine can do, not what else it was doing."""
        times = []
        for _ in range(repeats):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        side = 32768 if gpu else 6144  # 4 GiB or 144 MiB: far beyond any cache of the processor
        block = torch.randn(side, side, device=device)
        vector = torch.randn(side, device=device)
        seconds = min(best(lambda: block @ vector, 8), best(block.max, 8))
        bandwidth = block.nbytes / seconds
        flops = {}
        side = 8192 if gpu else 1536
        for dtype in ("bfloat16", "float32"):
            square = torch.randn(side, side, device=device).to(getattr(torch, dtype))
            flops[dtype] = 2 * side**3 / best(lambda matrix=square: matrix @ matrix, 8)  # type: ignore[misc]
    return Hardware("local", describe(), memory, bandwidth, flops, time.strftime("%Y-%m-%d", time.gmtime()))


def processor_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total
