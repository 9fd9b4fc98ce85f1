"""A checkpoint whose layers differ in their key/value heads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exports import HEADS, Make
from kvfold.families import all_families


@pytest.fixture
def mixed_checkpoint(byte_tokenizer: Path, tmp_path: Path) -> Make:
    """Make a tiny random checkpoint with 4, 2, 1 and 2 key/value heads in its layers."""

    def make(family: str, **changes: Any) -> Path:
        import torch

        from kvfold import hf

        config = {**all_families()[family].tiny(), "vocab_size": 260, **changes}
        shape = all_families()[family].shape(config)
        sites = {site: replace(kept, num_key_value_heads=HEADS[site.layer]) for site, kept in shape.sites.items()}
        model: Any = hf.build(config | all_families()[family].fields(shape.with_sites(sites)), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
        model.save_pretrained(tmp_path / "mixed")
        shutil.copytree(byte_tokenizer, tmp_path / "mixed", dirs_exist_ok=True)
        return tmp_path / "mixed"

    return make
