"""Decoders whose layers differ in their key/value heads, or share keys and values: `kvfold_llama` and its like.

transformers' configs can say so (`per_layer_config`: `{"3": {"num_key_value_heads": 2}}`; `kv_source_layers`:
`[0, 0, 2, 2]`, the layer whose keys and values each layer reads), and its caches take each layer as it comes; its
models of these architectures build every layer alike. The classes here are the stock ones, in which each layer that
differs gets a stock attention built from its own layer's config, and each that shares the attention of `sharing`.
Modules and tensor names are the stock ones' own; importing this module registers the classes with transformers' Auto
classes.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import transformers

from kvfold.contracts.runtimes import LAYERS, STEMS
from kvfold.hf.shared_layers import SharedAttention, hand_out, refuse_reentrant, sharing_modes
from kvfold.hf.subclass import attentions, derive, register_decoder

_HEADS = "num_key_value_heads"


class _Sources:
    """In front of a stock config class: transformers' words for layers that share."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        """Raise ValueError for a layer that reads one above it, or one that owns nothing."""
        super().__post_init__(**kwargs)  # type: ignore[misc]
        sources = self.kv_source_layers
        if sources is not None:
            if len(sources) != self.num_hidden_layers:
                raise ValueError(f"kv_source_layers has {len(sources)} numbers for {self.num_hidden_layers} layers")
            for layer, source in enumerate(sources):
                if not 0 <= source <= layer or sources[source] != source:
                    raise ValueError(f"kv_source_layers: layer {layer} cannot read keys and values of layer {source}")

    @property
    def kv_sharing_modes(self: Any) -> list[str | None] | None:
        """What each layer does with keys and values; None where no layer shares."""
        return sharing_modes(self.kv_source_layers)


class _OwnLayers:
    """In front of a stock model class: gives each layer the key/value heads and the source that the config names."""

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
        modes, sources = config.kv_sharing_modes or [None] * len(heads), config.kv_source_layers
        layers = zip(attentions(model), config.per_layer_config, modes, strict=True)
        for number, ((path, attention), own, mode) in enumerate(layers):
            stock: Any = type(attention)
            if mode is not None:
                stock = partial(globals()[f"Kvfold{stock.__name__}"], source=sources[number])
            elif own.num_key_value_heads == common:
                continue
            made = stock(own, number)
            made.config = config  # `own` is a copy, which `set_attn_implementation` would not reach
            model.base_model.set_submodule(path, made)
        if config.kv_sharing_modes is not None:
            model.base_model.register_forward_pre_hook(hand_out, with_kwargs=True)
        model.post_init()  # draws the weights of what is new

    def activation_checkpointing_enable(
        self: Any, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """The stock method, which is never reentrant where layers share. Raises SettingError when that is asked for."""
        asked = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if self.config.kv_sharing_modes is not None:
            refuse_reentrant(asked)
        super().activation_checkpointing_enable(asked, *args, **kwargs)  # type: ignore[misc]


_ABOUT = "with key/value heads of each layer's own, or another layer's"
_FIELDS = {"kv_source_layers": None, "__annotations__": {"kv_source_layers": list[int] | None}}


def _register(model_type: str, name: str) -> None:
    """Derive the classes of one stock architecture and tell transformers of them."""
    module = sys.modules[getattr(transformers, f"{name}Model").__module__]
    stock = getattr(module, f"{name}Attention")
    derive(__name__, _ABOUT, stock, f"Kvfold{name}Attention", SharedAttention, architecture=module)
    names = (name, f"Kvfold{name}")
    ours = LAYERS.model_type(model_type)
    register_decoder(__name__, _ABOUT, ours, names, _OwnLayers, config=(_Sources,), fields=_FIELDS)


for _model_type in sorted(LAYERS.models):
    _register(_model_type, STEMS[_model_type])
