"""CTranslate2: its own loader reads the weights, and is told the head width and the rotary scaling that it overlooks.

The converter of CTranslate2 4.8 takes `hidden_size / num_attention_heads` for the head width of a Llama, ignores
`llama3` rotary scaling on a CPU, and decodes wrongly once a sliding window is full; so the specification is built
here, per-frequency factors say the scaling, and a window becomes a limit on the context (`limits.window`). Each layer
is told its own number of key/value heads, which the converter has one of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.finite import check_finite
from kvfold.disk.output import read_json
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export import ct2_pairs, limits
from kvfold.export.agreement import Logits, Reference, file_hash
from kvfold.export.limits import common_attention, frequency_factors, kv_heads

NAME = "CTranslate2"
FILE = "model.bin"
ATTENTION = "sdpa"  # that transformers is asked with
TOLD_OF_WINDOWS = False


def available() -> None:
    """Raise SettingError when CTranslate2 is not installed."""
    try:
        import ctranslate2  # noqa: F401
    except ImportError as error:
        raise SettingError("ctranslate2 is not installed", next="pip install 'kvfold[ct2]'") from error


def content(source: Checkpoint, folder: Path) -> str:
    """SHA-256 of the weights that were written."""
    return file_hash(folder / FILE)


def version() -> str:
    """The version of CTranslate2."""
    import ctranslate2

    return str(ctranslate2.__version__)


def check(source: Checkpoint) -> None:
    """Raise UnsupportedModel for what CTranslate2 has no place for."""
    limits.check(source, NAME)


def write(source: Checkpoint, model: Any, folder: Path, weights: str) -> dict[str, Any]:
    """Write `model.bin`, `config.json` and the vocabulary; takes the modules out of `model` on the way.

    Raises DataError without a tokenizer: CTranslate2 speaks in tokens, not in ids; SettingError for weights that the
    precision cannot hold.
    """
    import torch
    from ctranslate2.converters import transformers as loaders

    from kvfold.hf import load_tokenizer

    paired, tokenizer = source.family.encoder_decoder, load_tokenizer(source.path)
    for name in source.names():
        check_finite(source.read(name), "float32" if weights == "int8" else weights, name, source.path)
    with torch.no_grad():
        if paired:
            loader, spec = ct2_pairs.loader(source), ct2_pairs.specification(source, model)
            ct2_pairs.fill(spec, loader, model)
            loader.set_vocabulary(spec, loader.get_vocabulary(model, tokenizer))
        else:
            loader = loaders.Qwen3Loader() if source.shape.model_type == "qwen3" else loaders.LlamaLoader()
            spec = _specification(source)
            loader.set_decoder(spec.decoder, model.base_model)
            loader.set_linear(spec.decoder.projection, model.get_output_embeddings())
            spec.register_vocabulary(loader.get_vocabulary(model, tokenizer))
        loader.set_config(spec.config, model, tokenizer)
        spec.config.unk_token = spec.config.unk_token or ""  # which a tokenizer of bytes has none of
        spec.validate()
        spec.optimize(quantization=weights)
        spec.save(str(folder))
    return {}


def _specification(source: Checkpoint) -> Any:
    """The empty specification of a decoder of this shape."""
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec
    from ctranslate2.specs.attention_spec import RotaryScalingType

    attention, heads = common_attention(source), kv_heads(source)
    assert attention.rope is not None
    factors, positions = frequency_factors(attention.rope), source.shape.max_positions
    scaling: dict[str, Any] = {}
    if factors is not None:
        # "Su" holds one factor for each frequency; with equal lengths it scales nothing else
        lengths = {"original_max_position_embeddings": positions, "max_position_embeddings": positions}
        scaling = {"rotary_scaling_type": RotaryScalingType.Su, **lengths}
    spec = TransformerDecoderModelSpec.from_config(
        source.shape.num_layers,
        attention.num_attention_heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=attention.rope.theta,
        num_heads_kv=min(heads),
        head_dim=attention.head_dim,
        qk_norm=attention.norms == "pre_rope",
        **scaling,
    )
    for layer, count in zip(spec.decoder.layer, heads, strict=True):
        layer.self_attention.num_heads_kv = np.int32(count)
        if factors is not None:
            layer.self_attention.rotary_scaling_long_factor = factors
            layer.self_attention.rotary_scaling_short_factor = factors
    return spec


def answer(folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
    """Load the export on the CPU and ask it what transformers was asked: logits by text, and greedy answers.

    Raises UnsupportedModel when CTranslate2 refuses to load or to run it.
    """
    try:
        return (ct2_pairs.answer if known.paired else _answer)(folder, known, weights)
    except (ValueError, RuntimeError) as error:  # what its C++ throws
        said = " ".join(str(error).split())[:200]
        raise UnsupportedModel(f"{NAME} cannot run the model: {said}", next="nothing was exported") from error


def _answer(folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
    import ctranslate2
    import torch

    engine = ctranslate2.Generator(
        str(folder),
        device="cpu",
        compute_type="int8" if weights == "int8" else "float32",
        intra_threads=torch.get_num_threads(),
    )
    words = read_json(folder / "vocabulary.json")
    logits = [np.array(engine.forward_batch([text]), dtype=np.float32)[0] for text in known.texts()]
    answers = engine.generate_batch(
        [[words[number] for number in prompt] for prompt in known.prompts],
        max_length=len(known.answers[0]),
        beam_size=1,
        include_prompt_in_result=False,
        return_end_token=True,
    )
    return logits, [list(answer.sequences_ids[0]) for answer in answers]
