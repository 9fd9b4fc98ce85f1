"""GGUF files to stock checkpoints: transformers dequantises a file, and refuses to save what it has loaded."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvfold.errors import CheckpointError
from kvfold.hf.loading import quiet

_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id", "dtype")
_SPLITS: dict[str, Any] = {  # `tokenizer.ggml.pre` -> the pre-tokenizer that transformers does not read from the file
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}
_PROBE = 64  # tokens on which the logits of both models are compared


def dequantise(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder` in bfloat16, with its tokenizer, as transformers saves its own.

    Raises CheckpointError when the file cannot be read, or the rebuilt model's float32 logits differ from the file's.
    """
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its reader of GGUF draws a bar of its own
            read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers raises whatever a field of the file made go wrong
        raise CheckpointError(f"cannot be read: {' '.join(str(error).split())[:200]}", where=file) from error
    model = _stock(read)
    ids_BT = torch.arange(_PROBE)[None] % read.config.vocab_size
    with torch.inference_mode():
        difference = float((model(ids_BT).logits - read(ids_BT).logits).abs().max())
    if difference != 0:
        raise CheckpointError("the rebuilt model has other logits", where=file, got=f"{difference:g}", allowed="0")
    if (split := _SPLITS.get(_field(file, "tokenizer.ggml.pre"))) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split
    with quiet():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _stock(read: Any) -> Any:
    """A model of the same architecture and weights that does not know of the file it comes from."""
    config = {key: value for key, value in read.config.to_dict().items() if key not in _OF_THE_FILE}
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))  # the file holds a float32: 1e-5 again
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict(read.state_dict(), strict=True)
    return model.eval()


def _field(file: Path, name: str) -> str:
    """A string of the file's metadata; empty when it has none of that name."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(name)
    return "" if field is None else str(field.contents())
