"""Encoder-decoders whose query heads share key/value heads, against stock models whose heads are repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples import paired
from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.hf.encoder_decoder import SHARING
from tolerance import assert_same

Make = Callable[..., Path]

TYPES = {"t5": ("t5", {}), "bart": ("bart", {}), "t5gemma": ("t5gemma", {}), **paired()}
GROUP = {"self": 2, "cross": 4}  # query heads per key/value head


def twin(folder: Path) -> Path:
    """The checkpoint with the key/value heads of each group made equal to their first."""
    source, tensors = Checkpoint.open(folder), load_file(folder / "model.safetensors")
    for site in source.shape.cached_sites:
        attention = source.shape.sites[site]
        for role in attention.head_roles:
            name = source.family.tensor(site, role)
            heads = tensors[name].unflatten(0, (-1, GROUP[site.kind], attention.head_dim))
            tensors[name] = heads[:, :1].expand_as(heads).flatten(0, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: Any, ids_BT: Tensor, attention: str) -> Tensor:
    with torch.inference_mode(), hf.with_attention(model, attention):
        found = model(input_ids=ids_BT.flip(1), decoder_input_ids=ids_BT).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_a_twin_of_repeated_heads_folds_without_loss(name: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    family, changes = TYPES[name]
    teacher = twin(tiny_checkpoint(family, tokenizer=False, dtype="float64", **changes))
    heads = {"kv_heads": "self=2,cross=1", "init": "mean"}
    student: Any = hf.load(convert(teacher, tmp_path / "student", "gqa", heads), dtype="float64")
    stock: Any = hf.load(teacher, dtype="float64")
    ids_BT = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits(stock, ids_BT, "eager")
    shares = () if name == "t5gemma" else ("sdpa",) if name in SHARING else ("sdpa", "eager")
    for attention in (hf.ATTENTION, *shares):  # norms of T5Gemma are float32 in any model
        format = torch.float32 if name == "t5gemma" else torch.float64
        assert_same(logits(student, ids_BT, attention), expected, dtype=format)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marian", "pegasus"])
def test_positions_that_a_checkpoint_lacks_are_computed(name: str, tiny_checkpoint: Make, tmp_path: Path) -> None:
    family, changes = TYPES[name]
    teacher = tiny_checkpoint(family, tokenizer=False, **changes)
    stored = load_file(teacher / "model.safetensors")
    tables = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    assert [each for each in stored if "embed_positions" in each] == ([] if name == "marian" else tables[::-1])
    for table in tables:
        stored.pop(table, None)
    save_file(stored, teacher / "model.safetensors", metadata={"format": "pt"})
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2})
    for model in (hf.load(teacher), hf.load(student)):
        for table in tables:
            row_D = model.get_parameter(table)[3]
            frequency_F = 10_000 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
            expected_D = torch.cat([torch.sin(3 * frequency_F), torch.cos(3 * frequency_F)])
            torch.testing.assert_close(row_D, expected_D.float(), rtol=0, atol=1e-6)
