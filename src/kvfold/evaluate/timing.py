"""Decode and prefill times of models that take turns, each with its own cache and its fastest attention kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk.checkpoint import Checkpoint
from kvfold.machine import clock
from kvfold.predict.roofline import decode_step, hardware

KERNELS = (hf.ATTENTION, "sdpa", "eager")
TRIALS = 3  # steps of each kernel before one is chosen
QUICK = 0.25  # seconds; prompts that take longer are read once

K = TypeVar("K")
Rows = list[dict[str, Any]]


def interleave(works: Mapping[K, Callable[[], Callable[[], object]]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each work in each round. A work prepares, and returns the call that is timed.

    Every round runs all of them, and begins with the next one: what else the machine does slows all alike.
    """
    seconds: dict[K, list[float]] = {key: [] for key in works}
    keys = list(works)
    for number in range(rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            call = works[key]()
            start = clock()
            call()
            seconds[key].append(clock() - start)
    return seconds


@dataclass(eq=False)
class Contender:
    """One model with one kind of cache."""

    name: str
    checkpoint: Checkpoint
    model: Any
    dtype: str
    new_tokens: int  # that are decoded after each prompt
    stored: Literal["native", "fp8", "int4", "int2"] = "native"  # the format of the cache
    kernel: str = hf.ATTENTION  # of a decode step; prompts are read with kvfold's
    held: Any = None  # the cache after the prompts; decoding goes into forks of it
    live: Any = None  # the last of these forks
    encoded_BSD: Tensor | None = None  # the encoder's output for the prompts

    @property
    def cache(self) -> hf.CacheKind:
        """A static cache is not copied in each step; with a window it rolls, and is copied too."""
        windowed = any(each.window for site, each in self.checkpoint.shape.sites.items() if site.kind == "self")
        return self.stored if self.stored != "native" else "growing" if windowed else "static"

    @property
    def paired(self) -> bool:
        """Whether an encoder reads the prompts. The decoder then begins with one token of its own."""
        return self.checkpoint.family.encoder_decoder

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that compute this model: T5's eager attention cannot share heads."""
        if not self.checkpoint.shape.fused:
            return hf.ATTENTION, "eager"
        return KERNELS[:-1] if self.paired else KERNELS

    def predicted_bytes(self, context: int, batch: int) -> int | None:
        """The plan's bytes; an fp8 cache adds a float32 scale for the keys and one for the values of a layer.

        None for what hqq packs.
        """
        spec, tokens = grouped_cache(self.checkpoint.shape), (1 if self.paired else context) + self.new_tokens
        if self.stored in hf.HQQ:
            return None
        if self.stored == "fp8":
            return spec.bytes(tokens, batch=batch, itemsize=1) + 4 * len(spec.slots)
        return spec.bytes(tokens, batch=batch, itemsize=DTYPE_BYTES[self.dtype], encoder_tokens=context)

    def roofline(self, context: int, batch: int) -> float:
        """The least seconds that one decode step takes on this machine."""
        shape, tied = self.checkpoint.shape, self.checkpoint.family.tied(self.checkpoint.config)
        own, read = (self.new_tokens, context) if self.paired else (context, 0)
        spec, dtype = grouped_cache(shape), self.dtype
        step = decode_step(shape, spec, context=own, batch=batch, dtype=dtype, tied=tied, encoder_context=read)
        if self.stored != "native":
            step = replace(step, cache_bytes=step.cache_bytes * hf.DECODED[self.stored][1] / (8 * DTYPE_BYTES[dtype]))
        return step.seconds(hardware("local"), dtype)

    def prefill(self, ids_BS: Tensor, *, piece: int | None = None) -> Callable[[], object]:
        """Prepare to read the prompts into a new cache with room for the new tokens, `piece` tokens at a time."""
        self.release()
        self.model.set_attn_implementation(hf.ATTENTION)
        self.held = hf.new_cache(self.model, self.cache, (1 if self.paired else ids_BS.shape[1]) + self.new_tokens)

        def read() -> None:
            if self.paired:
                self.encoded_BSD = hf.encode(self.model, ids_BS)
                hf.read(self.model, torch.zeros_like(ids_BS[:, :1]), self.held, self.encoded_BSD)
                return
            for part_BS in torch.split(ids_BS, piece or ids_BS.shape[1], dim=1):
                hf.read(self.model, part_BS, self.held)

        return read

    def decode(self, ids_BN: Tensor) -> Callable[[], object]:
        """Prepare to decode these tokens, one column after the other, after the prompts."""
        self.model.set_attn_implementation(self.kernel)
        self.live = hf.fork(self.held)

        def steps() -> None:
            for n in range(ids_BN.shape[1]):
                hf.read(self.model, ids_BN[:, n : n + 1], self.live, self.encoded_BSD)

        return steps

    def release(self) -> None:
        """Free the caches."""
        self.held = self.live = self.encoded_BSD = None


def time_prefill(contenders: Sequence[Contender], prompts_BS: Tensor, repeats: int) -> dict[Contender, list[float]]:
    """Seconds of reading the prompts, in turns: in every round, or once where it takes longer than `QUICK`."""
    for each in contenders:
        each.prefill(prompts_BS[:, :8])()  # the first call loads and allocates
    works = {each: partial(each.prefill, prompts_BS) for each in contenders}
    seconds = interleave(works, 1)
    return interleave(works, repeats) if max(times[0] for times in seconds.values()) < QUICK else seconds


def time_decode(ids_BT: Mapping[Contender, Tensor], repeats: int) -> tuple[Rows, list[list[float]]]:
    """A row for each contender that has read the prompts of its `ids_BT`, and its seconds in every round.

    The last `new_tokens` columns are decoded, in turns. The caches are freed.
    """
    new_BN = {each: ids_BT[each][:, -each.new_tokens :] for each in ids_BT}
    for each, ids_BN in new_BN.items():
        each.kernel = _fastest_kernel(each, ids_BN)
    seconds = interleave({each: partial(each.decode, ids_BN) for each, ids_BN in new_BN.items()}, repeats)
    rows = []
    for each, times in seconds.items():
        batch, context = len(ids_BT[each]), ids_BT[each].shape[1] - each.new_tokens
        step = statistics.median(times) / each.new_tokens
        rows.append(
            {
                "model": each.name,
                "cache": each.stored,
                "context": context,
                "batch": batch,
                "cache_bytes": hf.live_cache_bytes(each.live),
                "predicted_cache_bytes": each.predicted_bytes(context, batch),
                "decode_s_per_token": step,
                "tokens_per_s": batch / step,
                "kernel": each.kernel if each.stored != "native" else f"{each.kernel}, {each.cache} cache",
            }
        )
        each.release()
    return rows, list(seconds.values())


def _fastest_kernel(contender: Contender, ids_BN: Tensor) -> str:
    """The kernel with the fastest step after the prompts, of a few steps of each, in turns; it also warms up."""

    def ready(kernel: str) -> Callable[[], object]:
        contender.kernel = kernel
        return contender.decode(ids_BN[:, :1])

    seconds = interleave({kernel: partial(ready, kernel) for kernel in contender.kernels}, TRIALS)
    return min(contender.kernels, key=lambda kernel: min(seconds[kernel]))
