"""Decoders whose layers differ in their number of key/value heads: `kvfold_llama`, `kvfold_qwen3` and their like.

transformers' configs can say so (`per_layer_config`: `{"3": {"num_key_value_heads": 2}}`), and its caches take each
layer as it comes; its models build every layer alike. The classes here are the stock ones, in which each layer that
differs gets a stock attention built from its own layer's config. Modules, tensor names and forwards are the stock
ones' own; importing this module registers the classes with transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvfold.families import own_type
from kvfold.families._decoder import CLASSES

_HEADS = "num_key_value_heads"


class _OwnHeads:
    """In front of a stock model class: gives each layer the key/value heads that its own config names."""

    def __init__(self, config: Any) -> None:
        """Build the stock model, then the attentions that differ.

        Raises ValueError when `per_layer_config` changes anything but `num_key_value_heads`.
        """
        if other := sorted((config.per_layer_attributes or set()) - {_HEADS}):
            raise ValueError(f"per_layer_config of {config.model_type} can change {_HEADS}, and not {', '.join(other)}")
        heads = [own.num_key_value_heads for own in config.per_layer_config]
        config.per_layer_config = None  # or the stock model's first look at the number would be ambiguous
        common = config.num_key_value_heads
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            differing = {layer: {_HEADS: count} for layer, count in enumerate(heads) if count != common}
            config.per_layer_config = differing or None
        model: Any = self
        for layer, own in zip(model.base_model.layers, config.per_layer_config, strict=True):
            if own.num_key_value_heads != common:
                stock = layer.self_attn
                layer.self_attn = type(stock)(own, stock.layer_idx)
                layer.self_attn.config = config  # `own` is a copy, which `set_attn_implementation` would not reach
        model.post_init()  # draws the weights of what is new


def _derived(stock: type, name: str, *before: type, **fields: Any) -> type:
    """A subclass of a stock class, to be found (and pickled) by its name in this module."""
    made = type(name, (*before, stock), {"__module__": __name__, "__doc__": f"{stock.__name__}, {_WHAT}.", **fields})
    globals()[name] = made
    return made


_WHAT = "with key/value heads of each layer's own"


def _register(model_type: str, name: str) -> None:
    """Derive the classes of one stock architecture and tell transformers of them."""
    ours = own_type(model_type)
    config = _derived(getattr(transformers, f"{name}Config"), f"Kvfold{name}Config", model_type=ours)
    AutoConfig.register(ours, config)
    for end, auto in (("Model", AutoModel), ("ForCausalLM", AutoModelForCausalLM)):
        model = _derived(getattr(transformers, f"{name}{end}"), f"Kvfold{name}{end}", _OwnHeads, config_class=config)
        auto.register(config, model)


for _model_type, _name in CLASSES.items():
    _register(_model_type, _name)
