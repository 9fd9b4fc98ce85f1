"""Where a reader of passages spends its time, and what it caches: one question at a time, answered greedily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import Shape
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.families import family_of
from kvfold.machine import clock
from kvfold.text.pairs import PairFile, batched, start_id

MOST = 16  # questions that are timed
PARTS = ("encoder", "cross", "self", "rest")


def measure(model: Any, questions: PairFile, settings: EvaluateSettings, *, length: int) -> dict[str, Any]:
    """Seconds of a question by part of the model, and the bytes that a passage caches: predicted and measured.

    Each passage is cut to `length` tokens. Cross- and self-attention are those of the decoder, without their norms.
    """
    rows = [(given[:length], target) for given, target in questions.pairs[: min(MOST, settings.answers)]]
    batches = [batched([row]).to(next(model.parameters()).device) for row in rows]
    reader, seconds = hf.FusionInDecoder(model), dict.fromkeys((*PARTS, "all"), 0.0)
    with timed(model, seconds):
        for batch in batches:
            start = clock()
            reader.generate(batch.input_BS, attention_mask=batch.seen_BS, max_new_tokens=settings.answer_tokens)
            seconds["all"] += clock() - start
    seconds["rest"] = seconds["all"] - sum(seconds[part] for part in PARTS)
    shape, passages = shape_of(model), sum(batch.seen_BS.shape[1] for batch in batches)
    item = next(model.parameters()).element_size()
    each = grouped_cache(shape).bytes_per_encoder_token(item)
    found = {"predicted": each * sum(len(given) for given, _ in rows), "measured": 0}
    for batch in batches:
        cache, (read_BSD, _) = hf.new_cache(model, "growing", 1), reader.encode(batch.input_BS, batch.seen_BS)
        hf.read(model, torch.full_like(batch.target_BT[:, :1], start_id(model.config)), cache, read_BSD)
        found["measured"] += hf.live_cache_bytes(cache.cross_attention_cache)
    return {
        "seconds_per_answer": {part: seconds[part] / len(rows) for part in PARTS},
        "passage_cache_bytes": {name: round(count / passages) for name, count in found.items()},
    }


def shape_of(model: Any) -> Shape:
    """The shape of a loaded model."""
    config = model.config.to_dict()
    return family_of(config).shape(config)


@contextmanager
def timed(model: Any, seconds: dict[str, float]) -> Iterator[None]:
    """A context in which the time of the encoder, and of both kinds of attention in the decoder, is added up."""
    family = family_of(model.config.to_dict())
    parts: list[tuple[str, nn.Module]] = [("encoder", model.get_encoder())]
    parts += [(site.kind, model.get_submodule(family.module(site))) for site in shape_of(model).cached_sites]
    begun: dict[nn.Module, float] = {}

    def start(module: nn.Module, args: Any) -> None:
        begun[module] = clock()

    def end(module: nn.Module, args: Any, result: Any, *, part: str) -> None:
        seconds[part] += clock() - begun[module]

    handles = [module.register_forward_pre_hook(start) for _, module in parts]
    handles += [module.register_forward_hook(partial(end, part=part)) for part, module in parts]
    with hf.hooked(*handles):
        yield
