"""Models on the meta device, filled from a checkpoint, against transformers' own loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import paired
from kvfold import hf
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError
from kvfold.families import all_families

SOURCES = {**{name: (name, {}) for name in all_families()}, **paired()}


@pytest.mark.parametrize("source", SOURCES)
def test_a_filled_outline_is_the_loaded_model(source: str, tiny_checkpoint: Callable[..., Path]) -> None:
    family, changes = SOURCES[source]
    path = tiny_checkpoint(family, tokenizer=False, **changes)
    made = hf.outline(Checkpoint.open(path))
    assert any(each.is_meta for each in made.parameters())
    hf.fill(made, Checkpoint.open(path))
    loaded = hf.load(path)
    assert type(made) is type(loaded)
    ours, theirs = dict(made.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys(), "what is tied is tied"
    buffers = dict(loaded.named_buffers())
    assert dict(made.named_buffers()).keys() == buffers.keys()
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        assert torch.equal(tensor, {**theirs, **buffers}[name]), name
        assert tensor.dtype == {**theirs, **buffers}[name].dtype


def test_a_tensor_that_is_not_the_architectures_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint("llama")
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(got model.layers.0.extra.weight\)"):
        hf.outline(Checkpoint.open(path))
