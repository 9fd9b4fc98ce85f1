"""SigLIP, which reads the images of multimodal checkpoints: its tensors are copied as they are."""

from __future__ import annotations

from kvfold.contracts.config import ACTIVATION, EPSILON, HEADS, LAYERS, SHARE, WIDTH, Fields, only
from kvfold.contracts.family import Json

SIGLIP = "siglip_vision_model"

_STATED = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"num_channels": 3, "image_size": 224, "patch_size": 16},
}
"""What transformers takes where config.json is silent."""


def check_siglip(fields: Fields) -> None:
    """Refuse another vision model, and fields that are not numbers, with UnsupportedModel."""
    if (kind := fields.get("model_type", SIGLIP)) != SIGLIP:
        raise fields.refusal("model_type is not a vision model known here", got=kind, allowed=SIGLIP)
    widths = ("hidden_size", "intermediate_size", "num_channels", "image_size", "patch_size")
    fields.check(
        {
            **dict.fromkeys(widths, WIDTH),
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_act": ACTIVATION,
            "layer_norm_eps": EPSILON,
            "attention_dropout": SHARE,
            "vision_use_head": only(False, "false: the language model reads every patch").needed,
        }
    )


def siglip_parameters(config: Json) -> int:
    """The parameters of the vision model."""
    stated = {**_STATED, **config}
    width, inner, patch = (int(stated[name]) for name in ("hidden_size", "intermediate_size", "patch_size"))
    patches = (stated["image_size"] // patch) ** 2
    embeddings = stated["num_channels"] * patch**2 * width + width + patches * width
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width  # attention, MLP, LayerNorms
    return int(embeddings + stated["num_hidden_layers"] * layer + 2 * width)
