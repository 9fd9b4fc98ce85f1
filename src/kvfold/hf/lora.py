"""LoRA (arXiv 2106.09685) through `peft`: low-rank factors beside frozen weights, merged before a model is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvfold.errors import SettingError

MARK = ".lora_"  # in the names of the added parameters


def add_lora(model: nn.Module, paths: Sequence[str], rank: int, *, seed: int) -> None:
    """Add factors of this rank to the linear maps at these paths; the model's output does not change yet.

    The product is scaled by `alpha / rank = 2`, as in LoLCATs (arXiv 2410.10254). Raises SettingError if `peft` is not
    installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SettingError("lora needs the package peft", where="uptrain", next="pip install 'kvfold[lora]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(paths), bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge_lora(model: nn.Module) -> None:
    """Add every product of factors to its weight and remove the factors: modules and names are as before."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            adapted: Any = module
            adapted.merge(safe_merge=True)
            model.set_submodule(name, adapted.get_base_layer())


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if MARK in name}
