"""qwen2: the layout of llama with biases on q, k and v, and a sliding window on the upper layers when asked for."""

from __future__ import annotations

from kvfold.contracts.family import Family, Json
from kvfold.contracts.site import Shape
from kvfold.families._decoder import (
    BODY,
    QWEN,
    TENSORS,
    architectures,
    check_qwen,
    decoder_shape,
    heads_fields,
    tiny_decoder,
    upper_windows,
)


def _shape(config: Json) -> Shape:
    return decoder_shape(config, "qwen2", biases=frozenset("qkv"), mlp_biases=False, windows=upper_windows(config))


FAMILY = Family(
    name="qwen2",
    architectures=architectures("qwen2"),
    about="Qwen2 and Qwen2.5 (biases on q, k and v)",
    attention={"self": "model.layers.{layer}.self_attn"},
    tensors=TENSORS,
    check=lambda fields: check_qwen(fields, QWEN),
    shape=_shape,
    fields=heads_fields,
    tiny=lambda: tiny_decoder("qwen2", "Qwen2ForCausalLM"),
    body=BODY,
)
