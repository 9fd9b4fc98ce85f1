"""LoRA (arXiv 2106.09685) through `peft`: low-rank factors beside frozen weights, merged before a model is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    weights = {path: layer.weight for path, layer in layers.items()}
    for layer in layers.values():  # peft makes factors where the weight is, and the meta device has no numbers
        if layer.weight.is_meta:
            layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=layer.weight.dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for path, layer in layers.items():
        layer.weight = weights[path]


def lora_factor(name: str) -> bool:
    """Whether a name of an adapted model is that of a factor."""
    return MARK in name


def unadapted(name: str) -> str:
    """The name of a parameter of an adapted model without the factors."""
    return name.replace(".base_layer.", ".")


def lora_products(model: nn.Module) -> dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]]:
    """The names of the adapted weights, each with what is added to it: a function of what makes a tensor whole."""
    if not lora_parameters(model):  # peft may be missing
        return {}
    from peft.tuners.lora import LoraLayer

    def product(module: Any, whole: Callable[[Tensor], Tensor]) -> Tensor:
        (name,) = module.active_adapters
        a_RD, b_DR = whole(module.lora_A[name].weight.detach()), whole(module.lora_B[name].weight.detach())
        product_DD = b_DR @ a_RD
        scale = float(module.scaling[name])
        return (product_DD.T if module.fan_in_fan_out else product_DD) * scale

    return {
        f"{path}.weight": partial(product, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if lora_factor(name)}
