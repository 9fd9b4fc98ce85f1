"""Caches, their size in memory, and generation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from kvfold.errors import SettingError
from kvfold.hf.attention import NAME, QUANTISED
from kvfold.hf.quantised import GROUP, hqq_cache

CacheKind = Literal["growing", "static", "fp8", "int4", "int2"]

HQQ: Mapping[CacheKind, int] = {"int4": 4, "int2": 2}
"""Bits of the caches that hqq quantises."""

DECODED: Mapping[CacheKind, tuple[str, float]] = {
    "fp8": QUANTISED["fp8"],
    **{kind: (f"{NAME}_{kind}", bits + 32 / GROUP) for kind, bits in HQQ.items()},
}
"""By quantised cache that transformers decodes with: the attention that rounds alike, and the bits of a cached number,
with its part of a scale and of an offset of 16 bits.
"""


def generate(model: Any, ids_BT: Tensor | None, *, max_new_tokens: int, **options: Any) -> Tensor:
    """Continue each row by `max_new_tokens`. Returns the ids of prompt and continuation.

    The options are those of transformers' `generate`; decoding is greedy by default. Left-padded rows need an
    `attention_mask`. `ids_BT` is None for a decoder whose `encoder_outputs` are given.
    """
    if ids_BT is not None:
        options.setdefault("attention_mask", torch.ones_like(ids_BT))
    options.setdefault("do_sample", False)
    if model.config.is_encoder_decoder and "cache_implementation" not in options:
        # transformers' own has as many layers as the encoder of a T5, and its decoder may have more
        options.setdefault("past_key_values", new_cache(model, "growing", 0))
    if model.generation_config.pad_token_id is None:
        options.setdefault("pad_token_id", 0)
    with torch.no_grad():
        made_BT: Tensor = model.generate(ids_BT, max_new_tokens=max_new_tokens, **options)
    return made_BT


def new_cache(model: Any, kind: CacheKind, length: int) -> Cache:
    """An empty cache: `growing` with each token, `static` with room for `length` tokens, or growing quantised.

    The cache of an encoder-decoder has a second part, for cross-attention, which grows once and is never static. Raises
    SettingError if transformers has no such cache for this model (a sliding window, an encoder-decoder), and without
    hqq for one that it quantises.
    """
    pair = bool(model.config.is_encoder_decoder)
    config = model.get_decoder().config if pair else model.config  # the encoder may have another number of layers
    if kind in ("growing", "static"):
        own = DynamicCache(config=config) if kind == "growing" else StaticCache(config=config, max_cache_len=length)
        return EncoderDecoderCache(own, DynamicCache()) if pair else own
    if pair:
        raise SettingError(f"transformers has no {kind} cache for encoder-decoders")
    try:
        return QuantizedCache("fp8", model.config) if kind == "fp8" else hqq_cache(model.config, HQQ[kind])
    except ValueError as error:
        what = "that share keys and values" if getattr(model.config, "kv_sharing_modes", None) else "with a window"
        raise SettingError(f"transformers has no {kind} cache for layers {what}") from error


def read(model: Any, ids_BT: Tensor, cache: Cache, encoded_BSD: Tensor | None = None) -> Tensor:
    """Read tokens into a cache and return the logits after the last token, `logits_BV`, without a graph.

    A decoder of an encoder-decoder also needs the output of `encode`.
    """
    more: dict[str, Any] = {"input_ids": ids_BT, "logits_to_keep": 1}
    if encoded_BSD is not None:
        more = {"decoder_input_ids": ids_BT, "encoder_outputs": BaseModelOutput(last_hidden_state=encoded_BSD)}
    with torch.inference_mode():
        logits_B1V: Tensor = model(**more, past_key_values=cache, use_cache=True).logits
    return logits_B1V[:, -1]


def encode(model: Any, ids_BS: Tensor) -> Tensor:
    """The encoder's output for an input, `encoded_BSD`, without a graph."""
    with torch.inference_mode():
        encoded_BSD: Tensor = model.get_encoder()(ids_BS).last_hidden_state
    return encoded_BSD


def live_cache_bytes(cache: Cache) -> int:
    """Bytes that a cache keeps alive: the sum over its storages, each counted once and as a whole.

    So a sliding window that is a view counts with all of its storage, a static cache with its unused end, and a
    quantised cache with its scales. Token counters (integers without dimensions) do not count.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    waiting: list[Any] = [vars(layer) for part in parts for layer in part.layers]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.dim() or value.is_floating_point():
                storage = value.untyped_storage()
                storages[storage.device, storage.data_ptr()] = storage.nbytes()
        elif is_dataclass(value):
            waiting.append(vars(value))
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return sum(storages.values())


def fork(cache: Cache) -> Cache:
    """A copy of a cache that shares its tensors: decoding into the copy does not change the original.

    A growing cache never writes into its tensors. A static one writes after its tokens, so only its latest fork is
    valid.
    """
    if isinstance(cache, EncoderDecoderCache):
        both = EncoderDecoderCache(fork(cache.self_attention_cache), fork(cache.cross_attention_cache))
        both.is_updated = dict(cache.is_updated)
        return both
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and not value.dim():  # a counter, which is incremented in place
                setattr(layer, name, value.clone())
    return made
