"""kvfold's interface to transformers: no other package imports it.

Importing this package registers kvfold's attention and model classes with transformers; nothing is patched.
"""

from __future__ import annotations

from kvfold.hf import encoder_decoder as encoder_decoder  # these register their classes
from kvfold.hf import latent as latent
from kvfold.hf import linear as linear
from kvfold.hf import per_layer as per_layer
from kvfold.hf.attention import NAME as ATTENTION
from kvfold.hf.attention import QUANTISED, attention_outputs, removable, with_attention, without
from kvfold.hf.caches import DECODED, HQQ, CacheKind, encode, fork, generate, live_cache_bytes, new_cache, read
from kvfold.hf.fusion import FusionInDecoder, encoded, read_alone
from kvfold.hf.hooks import hooked
from kvfold.hf.layers import Layer, Layers, Through, entering
from kvfold.hf.loading import build, load, load_extractor, load_source, load_tokenizer, twin
from kvfold.hf.lora import add_lora, lora_factor, lora_parameters, lora_products, unadapted
from kvfold.hf.observe import WATCHED, Attended, attend, probabilities
from kvfold.hf.outline import fill, outline
from kvfold.hf.paired_layers import PairedLayers

__all__ = [
    "ATTENTION",
    "DECODED",
    "HQQ",
    "QUANTISED",
    "WATCHED",
    "Attended",
    "CacheKind",
    "FusionInDecoder",
    "Layer",
    "Layers",
    "PairedLayers",
    "Through",
    "add_lora",
    "attend",
    "attention_outputs",
    "build",
    "encode",
    "encoded",
    "entering",
    "fill",
    "fork",
    "generate",
    "hooked",
    "live_cache_bytes",
    "load",
    "load_extractor",
    "load_source",
    "load_tokenizer",
    "lora_factor",
    "lora_parameters",
    "lora_products",
    "new_cache",
    "outline",
    "probabilities",
    "read",
    "read_alone",
    "removable",
    "twin",
    "unadapted",
    "with_attention",
    "without",
]
