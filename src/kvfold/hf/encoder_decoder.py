"""Encoder-decoders with fewer key/value heads than query heads: `kvfold_t5` and its like.

transformers' T5 has one number of heads, and ignores any other that a config names. The classes here are the stock
ones, in which the k and v of the decoder's attentions are as narrow as the config says: one number for self-attention
and one for cross-attention, for all layers or for each. The stock forwards take the heads as they come, and so do the
caches: modules, tensor names and forwards are theirs. Importing this module registers the classes with transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from kvfold.families import own_type
from kvfold.families.t5 import CLASSES, HEADS
from kvfold.hf.deriving import derive


class _FewerHeads:
    """In front of a stock model class: narrows k and v of the decoder's attentions."""

    def __init__(self, config: Any) -> None:
        """Build the stock model, then what is narrower. Raises ValueError for heads that do not divide the queries'."""
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for kind, name in HEADS.items():
            said = getattr(config, name, None)
            common = config.num_heads if said is None else said
            found = common if isinstance(common, list) else [common] * config.num_decoder_layers
            for block, heads in zip(model.decoder.block, found, strict=True):
                narrow(block.layer[0].SelfAttention if kind == "self" else block.layer[1].EncDecAttention, heads)
        model.post_init()  # draws the weights of what is new


def narrow(attention: Any, heads: int) -> None:
    """Give an attention of T5 so many key/value heads, their weights anew; ValueError for a number that cannot be."""
    if heads < 1 or attention.n_heads % heads:
        raise ValueError(f"{heads} key/value heads do not divide {attention.n_heads} query heads")
    attention.num_key_value_groups = attention.n_heads // heads  # by this, transformers' own attention knows of groups
    if heads < attention.n_heads:
        for name in ("k", "v"):
            setattr(attention, name, nn.Linear(attention.d_model, heads * attention.key_value_proj_dim, bias=False))


_derived = partial(derive, __name__, "with fewer key/value heads in the decoder")


def _register(model_type: str, name: str) -> None:
    """Derive the classes of one stock architecture and tell transformers of them."""
    ours = own_type(model_type)
    config = _derived(getattr(transformers, f"{name}Config"), f"Kvfold{name}Config", model_type=ours)
    AutoConfig.register(ours, config)
    for end, auto in (("Model", AutoModel), ("ForConditionalGeneration", AutoModelForSeq2SeqLM)):
        model = _derived(getattr(transformers, f"{name}{end}"), f"Kvfold{name}{end}", _FewerHeads, config_class=config)
        auto.register(config, model)


for _model_type, _name in CLASSES.items():
    _register(_model_type, _name)
