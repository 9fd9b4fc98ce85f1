"""kvfold's model classes: stock classes of transformers with another class in front, derived by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from threading import RLock
from typing import Any, Self

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from kvfold.contracts.runtimes import Runtime, stock_type
from kvfold.contracts.site import Site
from kvfold.contracts.stock import stock_class
from kvfold.families import all_families

_AUTO = {"Model": AutoModel, "ForCausalLM": AutoModelForCausalLM}

_MAKING = RLock()

_AWAITED: dict[tuple[str, str], Callable[[], None]] = {}
"""Module and name of model classes -> what makes them."""


def derive(module: str, about: str, stock: type, name: str, *before: type, **fields: Any) -> type:
    """A subclass of `stock` with the classes `before` in front of it, stored by name in `module` so that it pickles."""
    named = {"__module__": module, "__doc__": f"{stock.__name__}, {about}."}
    made = type(name, (*before, stock), {**named, **fields})
    setattr(sys.modules[module], name, made)
    return made


def attentions(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Path below `model.base_model` and module of each attention of a decoder, in order of layers."""
    stock = stock_type({"model_type": model.config.model_type})
    family = next(each for each in all_families().values() if stock in each.architectures)
    for layer in range(model.config.num_hidden_layers):
        path = family.module(Site(layer)).removeprefix(f"{model.base_model_prefix}.")
        yield path, model.base_model.get_submodule(path)


def register_config(
    module: str,
    about: str,
    stock: type,
    name: str,
    *before: type,
    makes: Sequence[str],
    make: Callable[[type], None],
    **fields: Any,
) -> None:
    """Derive a config class and register it with transformers; `make` does so with its models.

    The models are made with the first config, or when one of their names, `makes`, is looked up in `module`: the
    stock models of all architectures together take two seconds to import, and a process needs few of them.
    """
    once = cache(lambda: make(config))
    config = derive(module, about, stock, name, _Awaited, *before, make_models=staticmethod(once), **fields)
    _AWAITED.update(dict.fromkeys(((module, each) for each in makes), once))
    AutoConfig.register(fields["model_type"], config)


def awaited(module: str, name: str) -> Any:
    """The `__getattr__` of a module whose model classes are made when they are needed."""
    if (make := _AWAITED.get((module, name))) is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    with _MAKING:
        make()
    return vars(sys.modules[module])[name]


class _Awaited:
    """In front of a config class: its models are made and registered before the first config is."""

    make_models: Callable[[], None]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        with _MAKING:
            cls.make_models()
        return super().__new__(cls)


def register_decoders(
    module: str,
    about: str,
    runtime: Runtime,
    front: type,
    attention: Callable[[str], type],
    *,
    config: tuple[type, ...] = (),
    fields: Mapping[str, Any] = {},
) -> None:
    """Derive the decoder classes of a runtime and register them with transformers' Auto classes.

    `front` goes in front of the stock model classes, the class that `attention` gives for an architecture in front of
    the stock attention, and `config` in front of the config class, which gets `fields`. Models find their attention
    class as `own_attention`; the attention finds the stock module as `architecture`. The derived attention is a
    subclass of the stock one because a model recognises its attentions by that class when it returns attention weights.
    """
    for stock in sorted(runtime.models):
        base = getattr(transformers, stock_class(stock, "Config"))
        register_config(
            module,
            about,
            base,
            runtime.architecture(stock, "Config"),
            *config,
            makes=[runtime.architecture(stock, end) for end in ("Attention", *_AUTO)],
            make=partial(_register_decoder, module, about, runtime, front, attention, stock),
            model_type=runtime.model_type(stock),
            **fields,
        )


def _register_decoder(
    module: str,
    about: str,
    runtime: Runtime,
    front: type,
    attention: Callable[[str], type],
    stock: str,
    config: type,
) -> None:
    """Derive the model classes of one architecture and register them for their config class."""
    model = getattr(transformers, stock_class(stock, "Model"))
    if (mapping := get_checkpoint_conversion_mapping(stock)) is not None:  # names on disk, such as those of experts
        register_checkpoint_conversion_mapping(runtime.model_type(stock), mapping, overwrite=True)
    recorded = model._can_record_outputs["attentions"]
    own = derive(
        module,
        about,
        getattr(recorded, "target_class", recorded),
        runtime.architecture(stock, "Attention"),
        attention(stock),
        architecture=sys.modules[model.__module__],
    )
    for end, auto in _AUTO.items():
        base, classes = getattr(transformers, stock_class(stock, end)), {"config_class": config, "own_attention": own}
        auto.register(config, derive(module, about, base, runtime.architecture(stock, end), front, **classes))


class Replacement(nn.Module):
    """Base of an attention that replaces a stock one and takes over its settings and the modules of these names."""

    def __init__(self, config: Any, stock: Any, *names: str) -> None:
        nn.Module.__init__(self)  # not the stock attention's, which follows in the MRO of a derived class
        self.config, self.layer_idx = config, stock.layer_idx
        self.head_dim, self.scaling = stock.head_dim, stock.scaling
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = stock.num_key_value_groups
        self.attention_dropout, self.is_causal = stock.attention_dropout, True
        for name in names:
            if hasattr(stock, name):
                setattr(self, name, getattr(stock, name))
