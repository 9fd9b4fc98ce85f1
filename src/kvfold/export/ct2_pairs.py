"""CTranslate2 for encoder-decoders: a T5 with its own number of key/value heads in each attention.

The converter of CTranslate2 4.8 builds every attention with as many key/value heads as query heads, takes
`d_model / num_heads` for the head width, and scales the outputs of a decoder whenever `tie_word_embeddings` is true, as
transformers 5 makes it for every T5: T5.1.1 too, which is not scaled. So the specification is built here, and its
loader reads the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import read_json
from kvfold.export.agreement import Logits, Reference
from kvfold.predict.engines import T5_ACTIVATIONS, t5_activation


def loader(source: Checkpoint) -> Any:
    """CTranslate2's reader of these weights."""
    from ctranslate2.converters import transformers as loaders

    return loaders.MT5Loader() if source.shape.model_type == "mt5" else loaders.T5Loader()


def specification(source: Checkpoint, model: Any) -> Any:
    """The empty specification of an encoder-decoder of this shape."""
    from ctranslate2.specs import common_spec
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec, TransformerSpec

    sites = source.shape.sites
    first = sites[Site(0)]
    common = {
        "pre_norm": True,
        "activation": getattr(common_spec.Activation, T5_ACTIVATIONS[t5_activation(source.config)]),
        "ffn_glu": bool(model.config.is_gated_act),
        "relative_attention_bias": True,
        "rms_norm": True,
        "head_dim": first.head_dim,
    }
    encoders = sum(site.kind == "encoder" for site in sites)
    encoder = TransformerEncoderSpec(
        encoders, first.num_attention_heads, num_heads_kv=first.num_attention_heads, **common
    )
    decoder = TransformerDecoderSpec(
        source.shape.num_layers, first.num_attention_heads, num_heads_kv=first.num_key_value_heads, **common
    )
    for number, layer in enumerate(decoder.layer):
        layer.self_attention.num_heads_kv = np.int32(sites[Site(number)].num_key_value_heads)
        layer.attention.num_heads_kv = np.int32(sites[Site(number, "cross")].num_key_value_heads)
    return TransformerSpec(encoder, decoder)


def fill(spec: Any, reader: Any, model: Any) -> None:
    """Read the weights into a specification."""
    reader.set_stack(spec.encoder, model.get_encoder())
    reader.set_stack(spec.decoder, model.get_decoder(), is_decoder=True)
    reader.set_linear(spec.decoder.projection, model.get_output_embeddings())
    if getattr(model.config, "scale_decoder_outputs", False):
        spec.decoder.scale_outputs = np.float32(model.config.d_model**-0.5)


def answer(folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
    """Greedy answers and the logits behind each of their tokens, as far as they are transformers' own."""
    import ctranslate2
    import torch

    engine = ctranslate2.Translator(
        str(folder),
        device="cpu",
        compute_type="int8" if weights == "int8" else "float32",
        intra_threads=torch.get_num_threads(),
    )
    words = read_json(folder / "shared_vocabulary.json") or read_json(folder / "source_vocabulary.json")
    said = engine.translate_batch(
        [[words[number] for number in prompt] for prompt in known.prompts],
        beam_size=1,
        min_decoding_length=0,  # or the end token would be ruled out at first
        max_decoding_length=len(known.answers[0]),
        max_input_length=0,
        return_end_token=True,
        return_logits_vocab=True,
    )
    ids = {word: number for number, word in enumerate(words)}
    answers = [[ids[word] for word in each.hypotheses[0]] for each in said]
    logits = [
        np.stack([np.array(row, dtype=np.float32) for row in each.logits[0]])[: len(answer)]
        for each, answer in zip(said, answers, strict=True)
    ]
    return logits, answers
