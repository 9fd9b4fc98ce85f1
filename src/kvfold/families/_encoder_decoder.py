"""What the encoder-decoders share.

transformers builds most of these architectures with as many key/value heads as query heads and ignores
`num_key_value_heads`. A student with fewer has a model type of kvfold's own (`kvfold.contracts.runtimes.PAIRS`), and so
has a T5Gemma whose attentions differ from one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from kvfold.contracts.config import Rule, Rules, only
from kvfold.contracts.family import Json
from kvfold.contracts.runtimes import ENCODER_DECODERS, HEADS, PAIRS, read
from kvfold.contracts.runtimes import architectures as architectures_of
from kvfold.contracts.runtimes import fields as fields_of
from kvfold.contracts.site import Attention, Site

END = "ForConditionalGeneration"

architectures = partial(architectures_of, ENCODER_DECODERS, END)
fields = partial(fields_of, runtimes=ENCODER_DECODERS, end=END)

PAIRED: Rules = {
    "is_encoder_decoder": only(True, "true: an encoder alone caches nothing"),
    **PAIRS.rules,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(None, "absent: the rotation is a part's, or none")),
    **dict.fromkeys(("sliding_window", "layer_types"), Rule(None, "absent: windows are a part's, or none")),
    "per_layer_config": Rule(None, f"absent: {HEADS} may be a list"),
}
"""The fields of every encoder-decoder."""


def decoder_sites(config: Json, own: Attention, cross: Attention, layers: int) -> dict[Site, Attention]:
    """The attentions of the decoder with the caches that config.json states, from what they are without."""
    alone = {
        site: each for layer in range(layers) for site, each in ((Site(layer), own), (Site(layer, "cross"), cross))
    }
    return read(config, alone, ENCODER_DECODERS)


def parameters(sites: Mapping[Site, Attention]) -> tuple[int, int]:
    """Parameters of the encoder's attentions, and of the decoder's."""
    encoder = sum(each.parameters for site, each in sites.items() if site.kind == "encoder")
    return encoder, sum(each.parameters for each in sites.values()) - encoder
