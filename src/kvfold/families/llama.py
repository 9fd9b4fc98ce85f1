"""llama: decoders that keep q, k, v and o apart, rotate half-split, and gate their MLP.

Llama, Mistral (whose sliding window bounds the cache) and every model that shares the layout.
"""

from __future__ import annotations

from kvfold.contracts.config import HEADS, POSITIONS, YES_NO, Fields, Rule, Rules, whole
from kvfold.contracts.family import Family, Json, stock_type
from kvfold.contracts.site import Shape
from kvfold.families._decoder import (
    BODY,
    TENSORS,
    architectures,
    check_decoder,
    decoder_shape,
    heads_fields,
    number,
    tiny_decoder,
)

WINDOW = 4096  # of a Mistral that does not say

_LLAMA: Rules = {
    "num_key_value_heads": HEADS.or_null,
    "attention_bias": YES_NO,
    "mlp_bias": YES_NO,
    "sliding_window": Rule(None, "null: this architecture has no windows"),
    "pretraining_tp": whole(0, 1 << 20).or_null,
}
_MISTRAL: Rules = {"num_key_value_heads": HEADS.needed, "sliding_window": POSITIONS.or_null}


def _check(fields: Fields) -> None:
    if stock_type(fields.config) == "llama":
        check_decoder(fields, _LLAMA, {"full_attention"})
        fields.check_divides("num_attention_heads", "hidden_size")
    else:
        window = fields.config.get("sliding_window", WINDOW)
        check_decoder(fields, _MISTRAL, {"full_attention" if window is None else "sliding_attention"}, window)


def _shape(config: Json) -> Shape:
    mistral = stock_type(config) == "mistral"  # which has no biases, and none of llama's fields for them
    attention = frozenset("qkvo") if config.get("attention_bias") and not mistral else frozenset[str]()
    window = config.get("sliding_window", WINDOW) if mistral else None
    return decoder_shape(
        config,
        "llama",
        biases=attention,
        mlp_biases=bool(config.get("mlp_bias")) and not mistral,
        windows=[window] * number(config, "num_hidden_layers"),
    )


FAMILY = Family(
    name="llama",
    architectures=architectures("llama", "mistral"),
    about="Llama, Mistral (sliding window) and every decoder of that layout",
    attention={"self": "model.layers.{layer}.self_attn"},
    tensors=TENSORS,
    check=_check,
    shape=_shape,
    fields=heads_fields,
    tiny=lambda: tiny_decoder("llama", "LlamaForCausalLM"),
    body=BODY,
)
