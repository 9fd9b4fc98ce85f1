"""Recall by layer: how much the loss of copying rises if the attention of one layer sees only a window and sinks.

Rows are text whose last tokens repeat the first ones, drawn at random, so that only attention over the whole row
predicts them. The teacher reads the rows unchanged, and once for each layer with that layer's attention limited. The
rise of the loss on the repetition is what the layer recalls from afar, and what a fixed-size state would have to keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import ranks
from kvfold.contracts.requests import Answers, Question, RecallDrop
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import DataError
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress, task
from kvfold.text.copies import SPAN, copy_rows
from kvfold.text.tokens import TokenFile

BATCH = 4096  # tokens of one batch
SEED = 0


def measure_recall(
    source: Checkpoint, questions: Sequence[RecallDrop], tokens: TokenFile, *, progress: Progress = SILENT
) -> Answers:
    """Answer the questions by running the teacher, which is in memory whole on every rank, in float32.

    Raises DataError if the text is too short for a row.
    """
    counts = sorted({each.tokens for each in questions})
    rows = {count: copies(tokens, source.known_length, count) for count in counts}
    return ranks.everywhere(_measure, source, questions, rows, progress=progress)


def _measure(
    source: Checkpoint, questions: Sequence[RecallDrop], rows: Mapping[int, Tensor], *, progress: Progress
) -> Answers:
    """Answer the questions on rows `ids_BT` by their number of tokens, on all ranks."""
    from kvfold import hf  # loads transformers

    device = best_device()
    model: Any = hf.load(source.path, device=device)
    found: dict[Question, Mapping[str, Tensor]] = {}
    for count, rows_BT in rows.items():
        here = [each for each in questions if each.tokens == count]
        with task(progress, "measuring recall", rows_BT.numel() * (1 + len(here)), "tokens"):
            whole = _loss(model, rows_BT.to(device), progress)
            for each in here:
                attention = model.get_submodule(source.family.module(each.site))
                with near_only(attention, each.window, each.sinks):
                    drop = _loss(model, rows_BT.to(device), progress) - whole
                found[each] = {"drop": torch.tensor(drop, dtype=torch.float64)}
    return found


def copies(tokens: TokenFile, length: int, count: int) -> Tensor:
    """Rows `ids_BT` of a text, about `count` tokens in all, whose last `SPAN` tokens are the first.

    Raises DataError for a text that is too short.
    """
    length = min(length, len(tokens))
    if length < 3 * SPAN:
        raise DataError("the text is too short to measure recall on", got=f"{length} tokens", allowed=f"{3 * SPAN}")
    ids_N = torch.from_numpy(tokens.tokens[:].astype("int64"))
    return copy_rows(ids_N, length - 2 * SPAN, trials=max(1, count // length), seed=SEED)


@contextmanager
def near_only(attention: nn.Module, window: int, sinks: int) -> Iterator[None]:
    """A context in which an attention sees only the last `window` and first `sinks` tokens, on rows without padding."""

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
    """Mean loss of the repetition in nats per token, over all rows; infinite if it is no number."""

    def read(ids_BT: Tensor) -> float:
        logits_BTV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=SPAN).logits
        return copied_loss(logits_BTV, ids_BT) * len(ids_BT)

    parts = torch.split(rows_BT, max(1, BATCH // rows_BT.shape[1]))
    total = sum(ranks.each(parts, read, progress=progress, amounts=[ids_BT.numel() for ids_BT in parts]))
    mean = total / len(rows_BT)
    return mean if math.isfinite(mean) else math.inf


def copied_loss(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Mean loss of the repetition in nats per token, without its first token, from the logits of its `SPAN` tokens."""
    flat_NV, targets_N = logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1 - SPAN :].flatten()
    return float(nn.functional.cross_entropy(flat_NV, targets_N))
