"""Greedy continuations of held-out text, by student and teacher side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.errors import DataError

PROMPT = 32  # tokens of held-out text before a sample


def prompts(ids_N: Tensor, count: int) -> Tensor:
    """`count` prompts of equal length, spread evenly over the held-out text: `ids_BT`. Raises DataError."""
    if len(ids_N) < PROMPT:
        raise DataError("the held-out text is too short for a prompt", got=f"{len(ids_N)} tokens", allowed=PROMPT)
    starts_B = torch.linspace(0, len(ids_N) - PROMPT, count + 1)[:count].long()
    return ids_N[starts_B[:, None] + torch.arange(PROMPT)]


def decode(tokenizer: Any, ids_T: Tensor) -> str:
    """Text without special tokens, with its spaces unchanged."""
    return str(tokenizer.decode(ids_T.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def side_by_side(
    models: Mapping[str, nn.Module], tokenizer: Any, prompts_BT: Tensor, new_tokens: int
) -> list[dict[str, str]]:
    """Each prompt with the continuation of each model, by name."""
    found = [{"prompt": decode(tokenizer, ids_T)} for ids_T in prompts_BT]
    for who, model in models.items():
        ids_BT = prompts_BT.to(next(model.parameters()).device)
        made_BT = hf.generate(model, ids_BT, max_new_tokens=new_tokens)
        for sample, ids_T in zip(found, made_BT[:, ids_BT.shape[1] :], strict=True):
            sample[who] = decode(tokenizer, ids_T)
    return found
