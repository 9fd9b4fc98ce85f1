"""llama: decoders that keep q, k, v and o apart, rotate half-split, and gate their MLP.

Llama, Mistral (whose sliding window bounds the cache) and every model that shares the layout.
"""

from __future__ import annotations

from kvfold.families import Family, Json, stock_type
from kvfold.families._decoder import (
    EMBEDDING,
    MLP,
    TENSORS,
    architectures,
    decoder_shape,
    heads_fields,
    number,
    tiny_decoder,
)
from kvfold.shape import Shape


def _shape(config: Json) -> Shape:
    attention = frozenset("qkvo") if config.get("attention_bias") else frozenset[str]()
    window = config.get("sliding_window") if stock_type(config) == "mistral" else None
    return decoder_shape(
        config,
        "llama",
        biases=attention,
        mlp_biases=bool(config.get("mlp_bias")),
        windows=[window] * number(config, "num_hidden_layers"),
    )


FAMILY = Family(
    name="llama",
    architectures=architectures("llama", "mistral"),
    embedding=EMBEDDING,
    about="Llama, Mistral (sliding window) and every decoder of that layout",
    attention={"self": "model.layers.{layer}.self_attn"},
    tensors=TENSORS,
    shape=_shape,
    fields=heads_fields,
    tiny=lambda: tiny_decoder("llama", "LlamaForCausalLM"),
    mlp=MLP,
)
