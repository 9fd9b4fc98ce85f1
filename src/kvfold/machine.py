"""This machine: its accelerator, its name in records, its threads, and the formats that it multiplies natively.

torch is imported by the functions that need it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")

Precision = Literal["bf16", "fp32"]

SPINS = "1000"
"""GOMP_SPINCOUNT: turns that a thread of OpenMP waits actively before it sleeps.

A turn is one PAUSE: 25 ns on an AMD EPYC of Zen 4 (measured), so 25 microseconds here. A training step of the demo
(fp32, 256 tokens, two threads on two cores) takes 114 ms alone (118 ms at 20,000 turns, 152 ms at 300, 164 ms at 0),
and 345 to 535 ms beside other busy processes (830 to 2,500 ms at 20,000 turns).
"""

# limits of oneDNN that exclude 512-bit VNNI, and AVX512-BF16
_NO_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE"})
_NO_BF16 = _NO_VNNI | {"AVX512_CORE_VNNI"}


def prepare_torch() -> None:
    """Set OpenMP's threads and their waiting, and huge pages, unless the user has. Call it before torch loads.

    A barrier waits for the slowest thread. Beside another process that thread does not run, and active waiting takes
    its core away. So do more threads than the container's quota of processor time. Linux hands out the memory of a
    large tensor page by page, at each allocation anew: with pages of 2 MiB, a training step of SmolLM2-135M takes half
    of the time in the kernel (Intel Xeon with AMX, 4,096 tokens, one thread).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if cores() < available():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def summed(work: Callable[[Item], Sequence[Tensor]], items: Iterable[Item]) -> list[Tensor]:
    """The sums, in order, of the tensors that `work` returns for each item; on a processor, an item has a thread.

    Products of small matrices that are split between threads take about as long as on one thread.
    """
    import torch

    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> Sequence[Tensor]:
        with torch.inference_mode(inference):
            return work(item)

    if best_device() != "cpu":
        return _total(map(work, items))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return _total(pool.map(alone, items))
    finally:
        torch.set_num_threads(threads)


def _total(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    totals: list[Tensor] = []
    for each in parts:
        totals = [total + part for total, part in zip(totals, each, strict=True)] if totals else list(each)
    return totals


def available() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may keep busy: the available ones, or its container's quota if that is less."""
    quota, period = "max", "100000"
    if (cgroup / "cpu.max").is_file():
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    elif (cgroup / "cpu/cpu.cfs_quota_us").is_file():
        quota, period = (
            (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
        )
    if not quota.isdigit():  # "max", or -1
        return available()
    return min(available(), max(1, round(int(quota) / int(period))))


def device_memory(device: str) -> int:
    """Bytes of a GPU's memory, or for `cpu` of the machine's, or its container's limit if that is less."""
    if device != "cpu":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def host_empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in the memory of the host: pinned where a GPU computes and the system permits it, for faster copies."""
    import torch

    if best_device() == "cuda":
        with suppress(RuntimeError):  # a limit of pinned memory
            return torch.empty(size, dtype=dtype, pin_memory=True)
    return torch.empty(size, dtype=dtype)


def best_device() -> str:
    """The device of models: `cuda` if there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    """Seconds on a clock, once the accelerator has finished."""
    import torch

    if best_device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def describe() -> str:
    """The name of the GPU, or of the processor with the threads that PyTorch uses."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:  # not Linux
        model = model or "cpu"
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def best_precision() -> Precision:
    """The format of matrix products in training: bf16 where the hardware multiplies it natively, else fp32.

    Seconds for 16,384 tokens of the demo's uptraining on two cores of an AMD EPYC of Zen 4 (AVX512-BF16, no AMX):
    3.8 in bf16 and 4.6 to 5.1 in fp32. With PyTorch and oneDNN limited to AVX2: 70 in bf16 and 4.7 to 5.0 in fp32.
    With oneDNN limited to AVX512 without BF16, bf16 takes 2 to 4 times the processor time of fp32.
    """
    return "bf16" if multiplies_bf16() else "fp32"


def multiplies_bf16() -> bool:
    """Whether PyTorch multiplies bf16 natively; elsewhere it emulates it.

    GPUs from compute capability 8.0 on, ARM with BF16, and x86 with AVX512-BF16 or AMX, unless ATEN_CPU_CAPABILITY
    or ONEDNN_MAX_CPU_ISA excludes them.
    """
    import torch

    if best_device() == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # oneDNN multiplies bf16; a build without oneDNN lacks the operator
    if not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True  # oneDNN has checked the instructions
    known = torch.backends.cpu.get_cpu_capability()  # what ATEN_CPU_CAPABILITY leaves
    return (
        known.startswith(("AVX512", "AVX10", "AMX")) and _onednn() not in _NO_BF16 and "avx512_bf16" in _instructions()
    )


def multiplies_int8() -> bool:
    """Whether products of int8 are added in 32 bits; x86 without VNNI adds pairs in 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    known, limit = _instructions(), _onednn()
    wide = "avx512_vnni" in known and limit not in _NO_VNNI
    return wide or ("avx_vnni" in known and limit not in ("SSE41", "AVX", "AVX2"))


def _onednn() -> str | None:
    """The instruction set to which oneDNN is limited."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()


def _instructions() -> frozenset[str]:
    """Instruction sets of an x86 processor by their Linux names: `avx512_bf16`, `avx512_vnni`, `avx_vnni`, ..."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 and later
    if capabilities is not None:
        return frozenset(name for name, value in capabilities().items() if value is True)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
