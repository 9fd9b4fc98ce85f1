"""What heads attend to: against transformers' own attention weights, token by token, and a planted circuit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuits import VOCABULARY, planted
from kvfold.calibrate.attention import LOCAL, SINKS, measure_attention
from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.text.copies import SPAN

Make = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gemma2": {},  # soft caps, and a window in every second layer
    "gpt_oss": {},  # sinks
    "opt": {},
}


def rows(count: int, length: int, vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def textbook(p_HTS: Tensor, readers: int) -> dict[str, list[float]]:
    """The measures of one row, token by token, as means over the readers of each key/value head."""
    heads, tokens = p_HTS.shape[:2]
    found: dict[str, list[float]] = {
        name: [0.0] * (heads // readers) for name in ("entropy", "distance", "sink", "far")
    }
    for head in range(heads):
        for at in range(SINKS + LOCAL, tokens):
            for key, p in enumerate(p_HTS[head, at].tolist()):
                part = p / (readers * (tokens - SINKS - LOCAL))
                found["entropy"][head // readers] -= part * math.log(p) if p else 0
                found["distance"][head // readers] += part * (at - key)
                found["sink"][head // readers] += part * (key < SINKS)
                found["far"][head // readers] += part * (SINKS <= key <= at - LOCAL)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_are_those_of_eager_attention(tiny_checkpoint: Make, family: str) -> None:
    source = Checkpoint.open(tiny_checkpoint(family, tokenizer=False, **FAMILIES[family]))
    text_BT, copied_BT = rows(1, 40), rows(1, 40)
    found = measure_attention(source, text_BT, copied_BT)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        weights = model(text_BT, output_attentions=True).attentions
    assert set(found) == set(source.shape.cached_sites)
    for site, p_BHTS in zip(sorted(found), weights, strict=True):
        p_HTS, readers = p_BHTS[0].double(), source.shape.sites[site].query_group
        for name, values in textbook(p_HTS, readers).items():
            assert found[site][name].tolist() == pytest.approx(values, rel=1e-4, abs=1e-6), (site, name)
        whole_G = sum(found[site][name] for name in ("sink", "local", "far"))
        assert torch.is_tensor(whole_G)
        assert bool((whole_G <= 1 + 1e-6).all())
        if family != "gpt_oss":  # whose sinks take a part
            assert torch.allclose(whole_G, torch.ones_like(whole_G))
        again = [p_HTS[:, at, at - (40 - SPAN) + 1] for at in range(40 - SPAN, 39)]
        induction_G = torch.stack(again).mean(0).view(-1, readers).mean(1)
        assert torch.allclose(found[site]["induction"], induction_G, atol=1e-5)


def test_a_planted_induction_head_is_the_only_one(tiny_checkpoint: Make) -> None:
    source = Checkpoint.open(planted(tiny_checkpoint))
    text_BT = rows(2, 64, VOCABULARY)
    copied_BT = torch.cat([text_BT, text_BT[:, :SPAN]], dim=1)
    found = measure_attention(source, text_BT, copied_BT)
    induction = torch.stack([found[Site(layer)]["induction"] for layer in range(2)])
    assert induction[1, 2] > 0.8
    assert induction.flatten().sort().values[-2] < 0.3
    assert found[Site(0)]["local"][1] > 0.9  # it looks at the token before
