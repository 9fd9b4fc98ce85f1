"""Classes of ours that are stock classes of transformers with something in front, made by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvfold.contracts.runtimes import stock_type
from kvfold.contracts.site import Site
from kvfold.families import all_families


def derive(module: str, about: str, stock: type, name: str, *before: type, **fields: Any) -> type:
    """A subclass of a stock class with `before` in front of it, to be found (and pickled) by its name in a module."""
    said = {"__module__": module, "__doc__": f"{stock.__name__}, {about}."}
    made = type(name, (*before, stock), {**said, **fields})
    setattr(sys.modules[module], name, made)
    return made


def attentions(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Path below `model.base_model` and module of each attention of a decoder, in order of layers."""
    stock = stock_type({"model_type": model.config.model_type})
    family = next(each for each in all_families().values() if stock in each.architectures)
    for layer in range(model.config.num_hidden_layers):
        path = family.module(Site(layer)).removeprefix(f"{model.base_model_prefix}.")
        yield path, model.base_model.get_submodule(path)


def register_decoder(
    module: str,
    about: str,
    model_type: str,
    names: tuple[str, str],
    front: type,
    *,
    config: tuple[type, ...] = (),
    fields: Mapping[str, Any],
    **given: Any,
) -> None:
    """Derive the config and model classes of a stock decoder, and tell transformers' Auto classes of them.

    `names` are what the stock classes' names and ours begin with (`Llama`, `KvfoldLlama`). `front` stands in front of
    the model classes, which are `given` class attributes; `config` in front of the config class, which has `fields`.
    """
    stock, ours = names
    settings = derive(
        module,
        about,
        getattr(transformers, f"{stock}Config"),
        f"{ours}Config",
        *config,
        model_type=model_type,
        **fields,
    )
    AutoConfig.register(model_type, settings)
    for end, auto in (("Model", AutoModel), ("ForCausalLM", AutoModelForCausalLM)):
        made = derive(
            module, about, getattr(transformers, f"{stock}{end}"), f"{ours}{end}", front, config_class=settings, **given
        )
        auto.register(settings, made)
