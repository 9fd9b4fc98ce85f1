"""whisper: encoder-decoders that recognise speech (Radford et al. 2022, arXiv 2212.04356), and distil-whisper.

Two convolutions and an encoder read the log-mel spectrogram of 30 seconds, `(M, F)`. Its output always has F / 2
positions, 1,500 in published models, silence included: they are the cache of cross-attention. The decoder is that of a
BART, with norms before attention and MLP and at the end; q, v and o have biases, k has none. transformers reads
`num_key_value_heads` as another name of `encoder_attention_heads`, so a student, a `kvfold_whisper`, has the fields
`self_num_key_value_heads` and `cross_num_key_value_heads`.
"""

from __future__ import annotations

from dataclasses import replace

from kvfold.contracts.config import POSITIONS, SHARE, WHOLES, WIDTH, YES_NO, Fields, Rule, Rules, whole
from kvfold.contracts.family import Family, Json
from kvfold.contracts.runtimes import HEADS
from kvfold.contracts.site import Shape
from kvfold.families._encoder_decoder import (
    ATTENTIONS,
    BODY,
    NAMES,
    PARTS,
    STACKS,
    architectures,
    check_stacks,
    fields,
    stacked_shape,
)

_KERNEL = 3  # of both convolutions; the second halves the number of frames

_RULES: Rules = {
    **STACKS,
    HEADS: Rule(None, "absent: transformers reads it as encoder_attention_heads"),
    "num_mel_bins": WIDTH.needed,
    "max_source_positions": POSITIONS.needed,
    "max_target_positions": POSITIONS.needed,
    "decoder_start_token_id": Rule(int, "a token id"),
    "suppress_tokens": WHOLES.or_null,
    "begin_suppress_tokens": WHOLES.or_null,
    **dict.fromkeys(("use_weighted_layer_sum", "apply_spec_augment"), YES_NO),
    "classifier_proj_size": WIDTH,
    **{f"mask_{axis}_prob": SHARE for axis in ("time", "feature")},
    **{f"mask_{axis}_{what}": whole(0, 1 << 20) for axis in ("time", "feature") for what in ("length", "min_masks")},
    "median_filter_width": WIDTH,
}


def _check(fields: Fields) -> None:
    fields.check(_RULES)
    check_stacks(fields)
    if fields.config.get("tie_word_embeddings") is False:
        raise fields.refusal("tie_word_embeddings is false, and a Whisper has one embedding")


def _shape(config: Json) -> Shape:
    hidden, read, written = (config[name] for name in ("d_model", "max_source_positions", "max_target_positions"))
    convolutions = _KERNEL * hidden * (config["num_mel_bins"] + hidden) + 2 * hidden
    return stacked_shape(
        config,
        "whisper",
        "qvo",
        encoder=convolutions + (read + 2) * hidden,
        decoder=(written + 2) * hidden,
        positions=written,
        encoder_positions=read,
    )


FAMILY = Family(
    name="whisper",
    architectures=architectures("whisper"),
    about="Whisper (reads sound): decoder self- and cross-attention, the encoder as it is",
    attention=ATTENTIONS,
    tensors=NAMES,
    check=_check,
    shape=_shape,
    fields=fields,
    tiny=lambda: {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": 96,
        "d_model": 32,
        "num_mel_bins": 8,
        "max_source_positions": 12,
        "max_target_positions": 256,
        **{f"{part}_layers": 4 for part in PARTS},
        **{f"{part}_attention_heads": 4 for part in PARTS},
        **{f"{part}_ffn_dim": 48 for part in PARTS},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
        "begin_suppress_tokens": None,
        "dtype": "float32",
    },
    body=replace(BODY, embedding="model.decoder.embed_tokens"),
    examples=("openai/whisper-small", "openai/whisper-large-v3-turbo", "distil-whisper/distil-large-v3"),
    encoder_decoder=True,
    depth="decoder_layers",
    audio=True,
)
