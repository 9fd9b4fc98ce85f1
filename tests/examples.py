"""A method's example as a user gives it, the families of costly checks, and architectures that share a family."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin

from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.runtimes import PAIRS
from kvfold.contracts.site import Shape
from kvfold.families import all_families

CORE = ("llama", "qwen2", "qwen3", "olmo2", "phi", "gpt_neox", "smollm3", "cohere", "t5", "bart", "t5gemma")
"""Families that differ most. Checks that cost run on all of these, and on each of the others only now and then."""

SOURCES = tuple(name for name, family in all_families().items() if family.adopt is None)
"""Families that are converted: not those in which students alone are written."""

APART = ("llama", "qwen2", "qwen3", "olmo2")
"""Families that the textbook models of the tests of layers are written for."""


def example(method: Method[Any], shape: Shape) -> dict[str, Any]:
    """The settings of a method's example that differ from their defaults."""
    made = method.example(shape)
    usual = {each.name: each.default for each in fields(made)}
    return {name: value for name, value in spelled(made).items() if value != usual[name]}


def paired() -> dict[str, tuple[str, dict[str, Any]]]:
    """The encoder-decoders that are not the first of their family, as its `tiny()` with other fields."""
    return {
        stock: (family.name, {"model_type": stock, "architectures": [family.architectures[stock]]})
        for family in all_families().values()
        for stock in family.model_types
        if stock in PAIRS.models and stock != family.tiny()["model_type"]
    }


def read(model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
    """What an encoder reads: these ids, or sound that depends on the first of each row."""
    config = model.config
    if not hasattr(config, "num_mel_bins"):
        return {"input_ids": ids_BT}
    bins, frames = config.num_mel_bins, 2 * config.max_source_positions
    phase_MF = torch.outer(torch.arange(1, bins + 1), torch.linspace(0, 6, frames))
    return {"input_features": torch.sin(phase_MF + ids_BT[:, :1, None]).to(model.dtype)}


def generate(model: Any, ids_BT: Tensor, **options: Any) -> Any:
    """transformers' generation; a Whisper's own would look for languages and time stamps."""
    if "input_features" not in read(model, ids_BT):
        return model.generate(ids_BT, **options)
    options.pop("attention_mask", None)
    return GenerationMixin.generate(model, read(model, ids_BT)["input_features"], **options)


def clips(folder: Path, bins: int = 8, frames: int = 24, count: int = 6) -> Path:
    """A file of pairs of sound and text, with the features that it names."""
    generator, lines = np.random.default_rng(0), []
    for number in range(count):
        np.save(folder / f"{number}.npy", generator.normal(size=(bins, frames)).astype(np.float32))
        lines.append(f"{number}.npy\twords of clip {number}\n")
    (folder / "clips.tsv").write_text("".join(lines))
    return folder / "clips.tsv"
