"""olmo2: the layout of llama with q and k RMS-normed over all heads at once, and norms behind attention and MLP.

`norm(k) = w * k / rms(k)` has one weight for each coordinate of all heads (G E), and one mean square: a head's
length counts against the others'. Nothing is normed before attention and MLP; what they add to the residual stream is.
"""

from __future__ import annotations

from dataclasses import replace

from kvfold.contracts.config import HEADS, YES_NO, Rules
from kvfold.contracts.family import Family, Json
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

_RULES: Rules = {"num_key_value_heads": HEADS.or_null, "attention_bias": YES_NO}


def _shape(config: Json) -> Shape:
    return decoder_shape(
        config,
        "olmo2",
        biases=frozenset("qkvo") if config.get("attention_bias") else frozenset(),
        mlp_biases=False,
        windows=[None] * number(config, "num_hidden_layers"),
        norms="all_heads",
    )


FAMILY = Family(
    name="olmo2",
    architectures=architectures("olmo2"),
    about="OLMo 2 (q and k normed over all heads, norms behind attention and MLP)",
    attention={"self": "model.layers.{layer}.self_attn"},
    tensors=TENSORS,
    check=lambda fields: check_decoder(fields, _RULES, {"full_attention"}),
    shape=_shape,
    fields=heads_fields,
    tiny=lambda: tiny_decoder("olmo2", "Olmo2ForCausalLM"),
    body=replace(BODY, after={"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}),
)
