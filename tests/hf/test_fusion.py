"""Fusion-in-Decoder, against passages that are encoded one by one, without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.evaluate.reader import shape_of
from tolerance import assert_same

Make = Callable[..., Path]
LENGTHS = ((5, 9, 7), (4, 8))  # of the passages of two questions


@pytest.fixture(params=["t5", "bart", "t5 sparse"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Make, tmp_path: Path) -> Any:
    family = request.param.split()[0]
    source = tiny_checkpoint(family, tokenizer=False, eos_token_id=None, dtype="float64")
    if family != request.param:
        source = convert(source, tmp_path / "sparse", "fido", {"cross_every": 2})
    return hf.load(source, dtype="float64")


def passages() -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [[torch.randint(3, 96, (length,), generator=draw) for length in row] for row in LENGTHS]


def padded(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    ids_BNS, seen_BNS = torch.zeros(2, 3, 9, dtype=torch.int64), torch.zeros(2, 3, 9, dtype=torch.bool)
    for row, each in enumerate(rows):
        for number, ids in enumerate(each):
            ids_BNS[row, number, : len(ids)], seen_BNS[row, number, : len(ids)] = ids, True
    return ids_BNS, seen_BNS


def one_by_one(model: Any, row: Sequence[Tensor]) -> Tensor:
    """The outputs of each passage, one after another, `(1, S, D)`."""
    with torch.inference_mode():
        return torch.cat([model.get_encoder()(ids[None]).last_hidden_state for ids in row], 1)


def test_passages_are_read_by_themselves_and_lie_one_after_another(model: Any) -> None:
    with torch.inference_mode():
        read_BSD, mask_BS = hf.FusionInDecoder(model).encode(*padded(passages()))
    assert mask_BS is not None
    assert mask_BS.sum(1).tolist() == [sum(row) for row in LENGTHS]
    for number, row in enumerate(passages()):
        assert_same(read_BSD[number, mask_BS[number]][None], one_by_one(model, row), dtype=torch.float64)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_each_question_alone(model: Any, beams: int) -> None:
    ids_BNS, seen_BNS = padded(passages())
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams}
    found = hf.FusionInDecoder(model).generate(ids_BNS, attention_mask=seen_BNS, **options)
    for number, row in enumerate(passages()):
        read = BaseModelOutput(last_hidden_state=one_by_one(model, row))
        expected = model.generate(encoder_outputs=read, do_sample=False, pad_token_id=0, **options)
        assert torch.equal(found[number : number + 1], expected)


def test_one_passage_is_the_ordinary_model(model: Any) -> None:
    ids_BS = passages()[0][1][None]
    found = hf.FusionInDecoder(model).generate(ids_BS[:, None], max_new_tokens=5)
    assert torch.equal(found, hf.generate(model, ids_BS, max_new_tokens=5))


def test_a_cache_holds_the_tokens_of_passages_and_nothing_for_layers_without_cross_attention(model: Any) -> None:
    spec = grouped_cache(shape_of(model))
    row = passages()[0]
    ids_BNS, seen_BNS = (each[:1] for each in padded(passages()))
    read_BSD, _ = hf.FusionInDecoder(model).encode(ids_BNS, seen_BNS)
    cache = hf.new_cache(model, "growing", 1)
    hf.read(model, torch.zeros(1, 1, dtype=torch.int64), cache, read_BSD)
    layers = len(shape_of(model).crossed)
    assert spec.bytes_per_encoder_token(8) == layers * 2 * 4 * 8 * 8
    assert hf.live_cache_bytes(cache) == spec.bytes(1, itemsize=8, encoder_tokens=sum(map(len, row)))


def test_a_decoder_may_be_deeper_than_its_encoder(tiny_checkpoint: Make) -> None:
    """transformers' own cache has as many layers as a T5's encoder."""
    source = tiny_checkpoint("t5", tokenizer=False, num_layers=2, num_decoder_layers=5, eos_token_id=None)
    found = hf.FusionInDecoder(hf.load(source)).generate(*padded(passages())[:1], max_new_tokens=4)
    assert found.shape == (2, 5)
    assert Checkpoint.open(source).shape.num_layers == 5
