"""qwen3: the layout of llama, with q and k RMS-normed head by head before they are rotated, and qwen2's windows.

One weight of a head's width norms all query heads of a layer, another all key heads: `norm(k_h) = w * k_h / rms(k_h)`.
The norm does not commute with sums of heads, so a pooled head is not the mean of the normed ones.
"""

from __future__ import annotations

from kvfold.contracts.config import WIDTH, YES_NO, Rules
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

HEAD_DIM = 128  # where config.json does not say: the architecture's own, whatever the width

_RULES: Rules = {**QWEN, "head_dim": WIDTH, "attention_bias": YES_NO}


def _shape(config: Json) -> Shape:
    return decoder_shape(
        {**config, "head_dim": config.get("head_dim") or HEAD_DIM},
        "qwen3",
        biases=frozenset("qkvo") if config.get("attention_bias") else frozenset(),
        mlp_biases=False,
        windows=upper_windows(config),
        norms="pre_rope",
    )


FAMILY = Family(
    name="qwen3",
    architectures=architectures("qwen3"),
    about="Qwen3 (q and k normed before RoPE)",
    attention={"self": "model.layers.{layer}.self_attn"},
    tensors=TENSORS,
    check=lambda fields: check_qwen(fields, _RULES, HEAD_DIM),
    shape=_shape,
    fields=heads_fields,
    tiny=lambda: tiny_decoder("qwen3", "Qwen3ForCausalLM"),
    body=BODY,
)
