"""llama: decoders with q, k, v and o apart, half-split rotation, RMS norms and a gated MLP.

Llama, Mistral (whose sliding window bounds the cache) and every model of that layout.
"""

from __future__ import annotations

from kvfold.contracts.config import HEADS, POSITIONS, YES_NO, Fields, Rule, Rules, whole
from kvfold.contracts.family import Json
from kvfold.contracts.runtimes import stock_type
from kvfold.families._decoder import Layout, decoder

WINDOW = 4096  # of a Mistral whose config.json is silent

_LLAMA: Rules = {
    "attention_bias": YES_NO,
    "mlp_bias": YES_NO,
    "sliding_window": Rule(None, "null: this architecture has no windows"),
    "pretraining_tp": whole(0, 1 << 20).or_null,
}
_MISTRAL: Rules = {"num_key_value_heads": HEADS.needed, "sliding_window": POSITIONS.or_null}


def _check(fields: Fields) -> None:
    mistral = stock_type(fields.config) == "mistral"
    fields.check(_MISTRAL if mistral else _LLAMA)
    if not mistral:
        fields.check_divides("num_attention_heads", "hidden_size")


def _layout(config: Json) -> Layout:
    if stock_type(config) == "mistral":  # which has no biases, and none of llama's fields for them
        window = config.get("sliding_window", WINDOW)
        kind = "full_attention" if window is None else "sliding_attention"
        return Layout(windows=[window] * config["num_hidden_layers"], kinds=(kind,))
    return Layout(biases="qkvo" if config.get("attention_bias") else "", mlp_biases=bool(config.get("mlp_bias")))


FAMILY = decoder(
    "llama",
    "Llama, Mistral (sliding window) and every decoder of that layout",
    "llama",
    "mistral",
    examples=("meta-llama/Llama-2-7b-hf", "HuggingFaceTB/SmolLM2-1.7B", "mistralai/Mistral-7B-v0.3"),
    rules={},
    check=_check,
    layout=_layout,
)
