"""Samples against decoding by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvfold import hf
from kvfold.errors import DataError
from kvfold.evaluate import samples


@torch.no_grad()
def test_samples_are_greedy(tiny_checkpoint: Callable[..., Path]) -> None:
    ids_N = torch.randint(4, 200, (600,), generator=torch.Generator().manual_seed(1))
    folder = tiny_checkpoint()
    model, tokenizer = hf.load(folder), hf.load_tokenizer(folder)
    prompts_BT = samples.prompts(ids_N, 3)
    assert prompts_BT.shape == (3, samples.PROMPT)
    assert torch.equal(prompts_BT[0], ids_N[: samples.PROMPT])
    wanted = []
    for ids_T in prompts_BT:
        for _ in range(6):
            ids_T = torch.cat([ids_T, model(ids_T[None]).logits[0, -1:].argmax(-1)])
            if int(ids_T[-1]) == tokenizer.eos_token_id:
                break
        wanted.append(samples.decode(tokenizer, ids_T[samples.PROMPT :]))
    found = samples.side_by_side({"student": model}, tokenizer, prompts_BT, 6)
    assert [each["student"] for each in found] == wanted
    assert found[1]["prompt"] == samples.decode(tokenizer, prompts_BT[1])
    with pytest.raises(DataError, match="too short for a prompt"):
        samples.prompts(ids_N[:5], 1)
