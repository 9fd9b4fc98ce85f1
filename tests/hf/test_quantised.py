"""Caches of 4 and 2 bits: what they hold against the rounding that measures their loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import hf
from kvfold.errors import SettingError
from kvfold.hf.attention import ROUNDINGS
from kvfold.hf.quantised import GROUP, through_hqq

Make = Callable[..., Path]


def test_without_hqq_one_line_says_how_to_install_it(tiny_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(SettingError, match=r"int4 cache needs hqq; pip install 'kvfold\[compare\]'"):
        hf.new_cache(hf.load(tiny_checkpoint()), "int4", 1)
    with pytest.raises(SettingError, match="int2 cache needs hqq"):
        through_hqq(2, torch.ones(1, 1, 1, GROUP))


def test_a_window_has_no_such_cache(tiny_checkpoint: Make) -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
    with pytest.raises(SettingError, match="no int4 cache for layers with a window|needs hqq"):
        hf.new_cache(hf.load(tiny_checkpoint("llama", **mistral)), "int4", 1)


@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_the_rounding_is_what_the_cache_holds(kind: Any, tiny_checkpoint: Make) -> None:
    pytest.importorskip("hqq", reason="hqq is the extra kvfold[compare]")
    model = hf.load(tiny_checkpoint())
    plain, packed = hf.new_cache(model, "growing", 1), hf.new_cache(model, kind, 1)
    ids_BT = torch.randint(200, (2, 64), generator=torch.Generator().manual_seed(0))
    hf.read(model, ids_BT, plain)
    hf.read(model, ids_BT, packed)
    rounded = ROUNDINGS[hf.DECODED[kind][0]]
    for ours, theirs in zip(plain.layers, packed.layers, strict=True):
        torch.testing.assert_close(rounded(ours.keys), theirs._dequantize(theirs._quantized_keys))
        torch.testing.assert_close(rounded(ours.values), theirs._dequantize(theirs._quantized_values))
    odd_BGSE = torch.linspace(-1, 1, 3 * 7)[None, None, None]
    steps = 2 ** hf.HQQ[kind] - 1
    assert float((rounded(odd_BGSE) - odd_BGSE).abs().max()) <= 2 / steps  # a step of the whole range
