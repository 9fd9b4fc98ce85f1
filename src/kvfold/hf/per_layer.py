"""Decoders whose layers differ in their key/value heads, share keys and values, or group their value heads apart.

transformers' configs have fields for the first two (`per_layer_config`: `{"3": {"num_key_value_heads": 2}}`;
`kv_source_layers`: `[0, 0, 2, 2]`, the layer whose keys and values each layer reads), and its caches support both, but
its models of these architectures build all layers alike. In the classes here, a layer that differs gets a stock
attention built from its own config, and a layer that shares gets a `SharedAttention`. `value_heads` has the value head
of each query head of a layer that groups them apart from its key heads (`kvfold.hf.decoupled`), and null for others.
Modules and tensor names are those of the stock classes. Importing this module registers the classes with transformers'
Auto classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from kvfold.contracts.runtimes import LAYERS
from kvfold.hf.bigcode import GroupedAttention
from kvfold.hf.decoupled import decouple
from kvfold.hf.shared_layers import SharedAttention, hand_out, refuse_reentrant
from kvfold.hf.subclass import attentions, awaited, register_decoders

_HEADS = "num_key_value_heads"


class _Sources:
    """In front of a stock config class: transformers' fields for layers that share."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        """Raise ValueError for a layer that reads a later layer, or one that owns no keys and values."""
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
        """How each layer shares keys and values: `store`, `reuse`, or None for a private layer."""
        sources = self.kv_source_layers
        if sources is None:
            return None
        read = {source for layer, source in enumerate(sources) if source != layer}
        own = ["store" if layer in read else None for layer in range(len(sources))]
        return ["reuse" if source != layer else own[layer] for layer, source in enumerate(sources)]


class _OwnLayers:
    """In front of a stock model class: gives each layer the heads and the source of the config."""

    own_attention: type[SharedAttention | GroupedAttention]

    def __init__(self, config: Any) -> None:
        """Build the stock model, then the attentions that differ.

        Raises ValueError if `per_layer_config` changes anything but `num_key_value_heads`.
        """
        if other := sorted((config.per_layer_attributes or set()) - {_HEADS}):
            raise ValueError(f"per_layer_config of {config.model_type} can change {_HEADS}, and not {', '.join(other)}")
        heads = [own.num_key_value_heads for own in config.per_layer_config]
        config.per_layer_config = None  # otherwise the number of heads is ambiguous to the stock model
        common = config.num_key_value_heads
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            differing = {layer: {_HEADS: count} for layer, count in enumerate(heads) if count != common}
            config.per_layer_config = differing or None
        model: Any = self
        modes, sources = config.kv_sharing_modes or [None] * len(heads), config.kv_source_layers
        apart = config.value_heads or [None] * len(heads)
        layers = zip(attentions(model), config.per_layer_config, modes, apart, strict=True)
        for number, ((path, attention), own, mode, value_heads) in enumerate(layers):
            stock: Any = type(attention)
            if issubclass(self.own_attention, GroupedAttention):  # the stock one ignores numbers of heads
                stock = self.own_attention
            elif mode is not None:
                stock = partial(self.own_attention, source=sources[number])
            elif own.num_key_value_heads == common and value_heads is None:
                continue
            made = stock(own, number)
            if value_heads is not None:
                decouple(made, value_heads)
            made.config = config  # `own` is a copy, which `set_attn_implementation` would not reach
            model.base_model.set_submodule(path, made)
        if config.kv_sharing_modes is not None:
            model.base_model.register_forward_pre_hook(hand_out, with_kwargs=True)
        model.post_init()  # initialises the new weights

    def activation_checkpointing_enable(
        self: Any, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """The stock method, not reentrant by default. Raises SettingError if layers share and it is reentrant."""
        settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if self.config.kv_sharing_modes is not None:
            refuse_reentrant(settings)
        super().activation_checkpointing_enable(settings, *args, **kwargs)  # type: ignore[misc]


_FIELDS = {
    "kv_source_layers": None,
    "value_heads": None,
    "__annotations__": {"kv_source_layers": list[int] | None, "value_heads": list[list[int] | None] | None},
}

register_decoders(
    __name__,
    "with heads of each layer's own, or another layer's",
    LAYERS,
    _OwnLayers,
    lambda stock: GroupedAttention if stock == "gpt_bigcode" else SharedAttention,
    config=(_Sources,),
    fields=_FIELDS,
)

__getattr__ = partial(awaited, __name__)
