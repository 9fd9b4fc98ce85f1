"""LoRA (arXiv 2106.09685) through `peft`: small factors beside frozen weights, and nothing of them in what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvfold.errors import SettingError

MARK = ".lora_"  # in the names of the parameters that are added


def add_lora(model: nn.Module, paths: Sequence[str], rank: int, *, seed: int) -> None:
    """Put factors of this rank beside the linear maps at these paths; what the model computes stays the same.

    Their product is scaled by `alpha / rank = 2`, as LoLCATs and most recipes have it. Raises SettingError when `peft`
    is not installed.
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
    """Add every product of factors to its weight and take the factors away: modules and names are as before."""
    found: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "base_layer") and _adapts(module)
    }
    for name, module in found.items():
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors by name."""
    return {name: parameter for name, parameter in model.named_parameters() if MARK in name}


def _adapts(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
