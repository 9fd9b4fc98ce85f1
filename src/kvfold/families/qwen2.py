"""qwen2: the layout of llama with biases on q, k and v, and a sliding window on the upper layers when asked for."""

from __future__ import annotations

from kvfold.families import Family, Json
from kvfold.families._decoder import TENSORS, decoder_shape, heads_field, number, tiny_decoder
from kvfold.shape import Shape


def _windows(config: Json, layers: int) -> list[int | None]:
    """The window of each layer, by the rule of the architecture: none below `max_window_layers`."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= int(config.get("max_window_layers", 28)) else "full_attention"
        for layer in range(layers)
    ]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _shape(config: Json) -> Shape:
    return decoder_shape(
        config,
        "qwen2",
        biases=frozenset("qkv"),
        mlp_biases=False,
        windows=_windows(config, number(config, "num_hidden_layers")),
    )


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    about="Qwen2 and Qwen2.5 (biases on q, k and v)",
    attention={"self": "model.layers.{layer}.self_attn"},
    tensors=TENSORS,
    shape=_shape,
    fields=heads_field,
    tiny=lambda: tiny_decoder("qwen2", "Qwen2ForCausalLM"),
)
