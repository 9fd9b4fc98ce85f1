"""Bytes that a model holds, and the most that it allocates while it computes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kvfold.machine import best_device


def weight_bytes(model: nn.Module, itemsize: int) -> int:
    """Bytes of parameters and buffers that a checkpoint stores, each once; floating-point numbers take `itemsize`."""
    found = {}
    for value in model.state_dict().values():
        for tensor in _parts(value):
            size = itemsize if tensor.is_floating_point() else tensor.element_size()
            key = id(tensor) if tensor.is_quantized else tensor.untyped_storage().data_ptr()
            found[key, tensor.storage_offset(), tensor.shape] = size * tensor.numel()
    return sum(found.values())


def _parts(value: object) -> Iterator[Tensor]:
    """The tensors of a state: of a quantised weight its numbers, scales and offsets."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _parts(each)
    elif hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what C++ writes to standard error: the profiler reports its start and its end at every log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that a call holds at a time of those that it allocates itself, on this device."""
    if best_device() == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = peak = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        held += each.nbytes()
        peak = max(peak, held)
    return peak
