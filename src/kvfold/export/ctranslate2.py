"""CTranslate2: the specification is built here; CTranslate2's own loaders fill it for encoder-decoders.

The converter of CTranslate2 4.8 gets several models wrong:

- For a Llama, it takes `hidden_size / num_attention_heads` for the head width, ignores `llama3` rotary scaling on a
  CPU, and decodes wrongly once a sliding window is full. So per-frequency factors express the scaling, and a window
  becomes a limit on the context (`limits.window`).
- For a T5, it builds every attention with as many key/value heads as query heads, takes `d_model / num_heads` for the
  head width, and scales the decoder's outputs whenever `tie_word_embeddings` is true. transformers 5 sets that field
  for every T5, and T5.1.1 is not scaled.
- It has one number of key/value heads for all layers. Here, each layer has its own.

- Its Phi is the class of Microsoft's own code, and not transformers'. Many decoders that its format can hold have no
  loader: Granite, Cohere, GLM, StarCoder2, StableLM and others. kvfold fills the specification of every decoder itself
  (`kvfold.export.ct2_decoder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.finite import check_finite
from kvfold.disk.output import read_json
from kvfold.export.agreement import Logits, Reference
from kvfold.export.ct2_decoder import decoder
from kvfold.export.engine import Engine
from kvfold.machine import multiplies_int8
from kvfold.predict.engines import ACTIVATIONS, paired_activation


class CTranslate2(Engine):
    """`model.bin`, `config.json` and the vocabulary. Without a tokenizer, DataError: it reads tokens, not ids."""

    name = "CTranslate2"
    package, extra = "ctranslate2", "ct2"
    file = "model.bin"

    @override
    def version(self) -> str:
        import ctranslate2

        return str(ctranslate2.__version__)

    @override
    def write(self, source: Checkpoint, model: Any, folder: Path, weights: str) -> dict[str, Any]:
        import torch

        from kvfold.hf import load_tokenizer

        tokenizer = load_tokenizer(source.path)
        for name in source.names():
            check_finite(source.read(name), "float32" if weights == "int8" else weights, name, source.path)
        with torch.no_grad():
            loader, spec = (_encoder_decoder if source.family.encoder_decoder else decoder)(source, model)
            loader.set_vocabulary(spec, loader.get_vocabulary(model, tokenizer))
            loader.set_config(spec.config, model, tokenizer)
            spec.config.unk_token = spec.config.unk_token or ""  # a tokenizer of bytes has none
            spec.validate()
            spec.optimize(quantization=weights)
            spec.save(str(folder))
        return {}

    @override
    def advice(self, weights: str) -> str:
        if weights != "int8" or multiplies_int8():
            return super().advice(weights)
        return (
            "nothing was exported; this processor has no VNNI (or ONEDNN_MAX_CPU_ISA excludes it), and without it sums "
            "of int8 products saturate at 16 bits: export and serve int8 on one that has it, or choose --dtype float32"
        )

    @override
    def _answer(self, folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
        import ctranslate2
        import torch

        options: dict[str, Any] = {"device": "cpu", "intra_threads": torch.get_num_threads()}
        options["compute_type"] = "int8" if weights == "int8" else "float32"
        files = (folder / f"{kind}vocabulary.json" for kind in ("", "shared_", "source_"))
        words = next(read_json(file) for file in files if file.exists())
        prompts = [[words[number] for number in prompt] for prompt in known.prompts]
        count = len(known.answers[0])
        if not known.paired:
            generator = ctranslate2.Generator(str(folder), **options)
            rows = [np.array(generator.forward_batch([text]), dtype=np.float32)[0] for text in known.texts()]
            continued = generator.generate_batch(
                prompts, max_length=count, beam_size=1, include_prompt_in_result=False, return_end_token=True
            )
            return rows, [list(each.sequences_ids[0]) for each in continued]
        translated = ctranslate2.Translator(str(folder), **options).translate_batch(
            prompts,
            beam_size=1,
            min_decoding_length=0,  # else the end token is excluded at first
            max_decoding_length=count,
            max_input_length=0,
            return_end_token=True,
            return_logits_vocab=True,
        )
        ids = {word: number for number, word in enumerate(words)}
        answers = [[ids[word] for word in each.hypotheses[0]] for each in translated]
        logits = [np.stack([np.array(row, dtype=np.float32) for row in each.logits[0]]) for each in translated]
        return [rows[: len(answer)] for rows, answer in zip(logits, answers, strict=True)], answers


def _encoder_decoder(source: Checkpoint, model: Any) -> tuple[Any, Any]:
    """The loader and the filled specification of an encoder-decoder: a T5, or an architecture made from BART."""
    from ctranslate2.converters import transformers as loaders
    from ctranslate2.specs import common_spec
    from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec, TransformerSpec

    sites, is_t5 = source.shape.sites, source.shape.family == "t5"
    first, stack = sites[Site(0)], model.get_decoder()
    common = {
        "activation": getattr(common_spec.Activation, ACTIVATIONS[paired_activation(source.config, source.shape)]),
        "head_dim": first.head_dim,
    }
    if is_t5:
        common |= {"pre_norm": True, "ffn_glu": bool(model.config.is_gated_act), "rms_norm": True}
        common |= {"relative_attention_bias": True}
    else:  # those with a norm after the last layer have norms before attention and MLP
        common |= {"pre_norm": hasattr(stack, "layer_norm")}
        common |= {"layernorm_embedding": hasattr(stack, "layernorm_embedding")}
    heads, encoders = first.num_attention_heads, sum(site.kind == "encoder" for site in sites)
    encoder = TransformerEncoderSpec(encoders, heads, num_heads_kv=heads, **common)
    decoder = TransformerDecoderSpec(source.shape.num_layers, heads, num_heads_kv=first.num_key_value_heads, **common)
    for number, layer in enumerate(decoder.layer):
        layer.self_attention.num_heads_kv = np.int32(sites[Site(number)].num_key_value_heads)
        layer.attention.num_heads_kv = np.int32(sites[Site(number, "cross")].num_key_value_heads)
    if is_t5:
        kinds = {"mt5": loaders.MT5Loader, "umt5": loaders.UMT5Loader}
        loader = kinds.get(source.shape.model_type, loaders.T5Loader)()
        loader.set_stack(encoder, model.get_encoder())
        loader.set_stack(decoder, stack, is_decoder=True)
    else:
        # not MarianMTLoader, which replaces the start token by zeros and drops the last token of the vocabulary
        loader = loaders.BartLoader()
        if source.shape.model_type == "m2m_100":
            loader.set_position_encodings = _computed_positions
        loader.set_encoder(encoder, model.get_encoder())
        loader.set_decoder(decoder, stack)
        if hasattr(model, "final_logits_bias"):
            decoder.projection.bias = model.final_logits_bias.squeeze(0)
    loader.set_linear(decoder.projection, model.get_output_embeddings())
    if getattr(model.config, "scale_decoder_outputs", source.shape.model_type == "umt5"):
        decoder.scale_outputs = np.float32(model.config.d_model**-0.5)
    return loader, TransformerSpec(encoder, decoder)


def _computed_positions(spec: Any, table: Any) -> None:
    """Set the positions of an M2M-100: those behind the id of the padding."""
    spec.encodings = table.weights[table.padding_idx + 1 :]
