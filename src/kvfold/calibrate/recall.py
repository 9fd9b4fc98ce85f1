"""Recall by layer: what copying loses when the attention of one layer sees no further back than a window.

Rows are text whose last tokens repeat the first, drawn at random: nothing but looking back over the whole row tells
them (as in copy loss, `probes`). The teacher reads them once as it is, and once for each layer whose attention sees the
last tokens and the first alone. The rise of the loss on the repetition says how much this layer brings from afar: what
a state of a fixed size would have to keep there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.contracts.requests import Answers, Question, RecallDrop
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import known_length
from kvfold.errors import DataError
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.text.tokens import TokenFile

SPAN = 16  # tokens that are repeated
BATCH = 4096  # tokens read together
SEED = 0


def measure_recall(
    source: Checkpoint, questions: Sequence[RecallDrop], tokens: TokenFile, *, progress: Progress = SILENT
) -> Answers:
    """Answer the questions by reading; the whole teacher is in memory, in float32.

    Raises DataError when the text is too short for a row.
    """
    from kvfold import hf  # loads transformers

    device = best_device()
    model: Any = hf.load(source.path, device=device)
    found: dict[Question, Mapping[str, Tensor]] = {}
    for asked in sorted({each.tokens for each in questions}):
        rows_BT = copies(tokens, known_length(source), asked).to(device)
        here = [each for each in questions if each.tokens == asked]
        progress.start("measuring recall", rows_BT.numel() * (1 + len(here)), "tokens")
        try:
            whole = _loss(model, rows_BT, progress)
            for each in here:
                attention = model.get_submodule(source.family.module(each.site))
                with near_only(attention, each.window, each.sinks):
                    found[each] = {"drop": torch.tensor(_loss(model, rows_BT, progress) - whole, dtype=torch.float64)}
        finally:
            progress.stop()
    return found


def copies(tokens: TokenFile, length: int, count: int) -> Tensor:
    """Rows `ids_BT` of a text, about `count` tokens in all, whose last `SPAN` tokens are their first, drawn from it."""
    length = min(length, len(tokens))
    if length < 3 * SPAN:
        raise DataError("the text is too short to measure recall on", got=f"{length} tokens", allowed=f"{3 * SPAN}")
    rows = max(1, count // length)
    generator = torch.Generator().manual_seed(SEED)
    ids_N = torch.from_numpy(tokens.tokens[:].astype("int64"))
    starts_B = torch.randint(len(ids_N) - length + 1, (rows,), generator=generator)
    rows_BT = ids_N[starts_B[:, None] + torch.arange(length)]
    span_BT = ids_N[torch.randint(len(ids_N), (rows, SPAN), generator=generator)]
    rows_BT[:, :SPAN] = rows_BT[:, -SPAN:] = span_BT
    return rows_BT


@contextmanager
def near_only(attention: nn.Module, window: int, sinks: int) -> Iterator[None]:
    """Let an attention see the last `window` tokens and the first `sinks` alone, on rows without padding."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        at_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        step_TS = at_T[:, None] - at_T
        seen_TS = (step_TS >= 0) & ((step_TS < window) | (at_T < sinks))
        return args, {**kwargs, "attention_mask": seen_TS[None, None].expand(len(hidden_BTD), 1, -1, -1)}

    handle = attention.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def _loss(model: Any, rows_BT: Tensor, progress: Progress) -> float:
    """Mean loss of the repetition, in nats a token; its first token is left out, which nothing foretells."""
    total = 0.0
    for ids_BT in torch.split(rows_BT, max(1, BATCH // rows_BT.shape[1])):
        logits_BTV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=SPAN).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), ids_BT[:, 1 - SPAN :].flatten(), reduction="sum"
        )
        total += float(loss)
        progress.advance(ids_BT.numel())
    mean = total / (len(rows_BT) * (SPAN - 1))
    return mean if math.isfinite(mean) else math.inf
