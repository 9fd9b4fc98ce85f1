"""What several benchmarks of attention kernels share: their flags, and multi-head attention to compare with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvfold import hf
from kvfold.machine import best_device


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags of a benchmark of kernels, with its default number of rounds."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="small sizes: a trial of the benchmark, not a result")
    made.add_argument("--rounds", type=int, default=rounds, help="turns of every variant (default: %(default)s)")
    made.add_argument("--results", default="results", help="folder of the record")
    made.add_argument("--note", default="", help="what else ran on the machine")
    return made


def matmul(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
    """Multi-head attention as two matrix products with the softmax between them."""
    return ((q_BHTE * q_BHTE.shape[-1] ** -0.5) @ k_BHSE.mT).softmax(-1) @ v_BHSE


def random_decoder(config: Mapping[str, Any], dtype: str, first: Any = None) -> Any:
    """The decoder of an encoder-decoder with random weights, shared with the decoder `first` where shapes are equal."""
    with torch.device("meta"):
        model: Any = hf.build(dict(config), seed=0, attention=hf.ATTENTION).eval()
    decoder = model.decoder.to_empty(device=best_device()).to(getattr(torch, dtype))
    shared = {} if first is None else dict(first.named_parameters())
    draw = torch.Generator().manual_seed(0)
    for path, weight in list(decoder.named_parameters()):
        owner, _, last = path.rpartition(".")
        there = shared.get(path)
        if there is not None and there.shape == weight.shape:
            setattr(decoder.get_submodule(owner), last, there)
        else:
            spread = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1.0
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * spread)
    return decoder


def decoding_step(decoder: Any, kernel: str, token: Tensor, encoded: Tensor, cache: Any) -> Callable[[], Tensor]:
    """Make ready to decode a token with this kernel, into a fork of the cache: each time the same."""
    decoder.set_attn_implementation(kernel)
    live = hf.fork(cache)

    def work() -> Tensor:
        with torch.inference_mode():
            made = decoder(inputs_embeds=token, encoder_hidden_states=encoded, past_key_values=live, use_cache=True)
        return made.last_hidden_state  # type: ignore[no-any-return]

    return work
