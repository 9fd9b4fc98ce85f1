"""Loading checkpoints and building fresh models through transformers' Auto classes: quiet, strict, one clear error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvfold.contracts.runtimes import ADDED, stock_type
from kvfold.disk.checkpoint import Checkpoint, locate
from kvfold.disk.output import read_json
from kvfold.errors import CheckpointError, DataError, KvfoldError, SettingError, choices
from kvfold.families import all_families
from kvfold.hf.attention import NAME
from kvfold.inputs import LARGE, check_regular, load_json, read_bytes

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # SentencePiece's own names
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PROBE = "a b"  # what a tokenizer encodes and decodes before it is handed out
DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu", attention: str = NAME) -> nn.Module:
    """Load a checkpoint, a local directory or a hub id, for inference: `model(ids_BT).logits`.

    An encoder-decoder takes `decoder_input_ids` besides.

    `attention` is `kvfold`, or one of transformers' own (`sdpa`, `eager`). Raises CheckpointError when the checkpoint
    cannot be read, or its tensors are not exactly those of its architecture (transformers would make up what is
    missing); UnsupportedModel when no family takes it.
    """
    kind = _dtype(dtype)
    source = Checkpoint.open(path)
    options: dict[str, Any] = {"dtype": kind, "attn_implementation": attention}
    config = without_negative_ids(source.config)
    try:
        with quiet():
            if config != source.config:
                options["config"] = AutoConfig.for_model(**config)
            model, found = _auto(config).from_pretrained(source.path, output_loading_info=True, **options)
    except Exception as error:  # transformers raises whatever a file of it made go wrong
        raise CheckpointError(f"cannot be loaded: {_first_line(error)}", where=path) from error
    for problem in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in found.get(f"{problem}_keys", ()))
        if names:
            raise CheckpointError(
                f"{problem} tensors", where=path, got=", ".join(names[:3]), next="is config.json that of these weights?"
            )
    model.to(device).eval()
    for name, value in without_negative_ids(vars(model.generation_config)).items():
        setattr(model.generation_config, name, value)
    assert isinstance(model, nn.Module)
    return model


def without_negative_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose token ids below 0 are None, also in its parts: older tools write -1 for "there is none".

    As it is, transformers would take -1 for the last token: it would never train its embedding, and generate -1.
    """

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_negative_ids(value)
        if not name.endswith("_token_id"):
            return value
        if isinstance(value, list):
            return [each for each in value if not _negative(each)] or None
        return None if _negative(value) else value

    return {name: clean(name, value) for name, value in config.items()}


def _negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; a model type of ours has that of the stock architecture it is made from.

    Raises DataError when it has none, CheckpointError when there is no such place.
    """
    folder = locate(path)
    _check_files(folder)
    _check_sentencepiece(folder)
    unnamed = _unnamed(folder)
    try:
        with quiet(), _stderr_held():
            tokenizer = AutoTokenizer.from_pretrained(folder, config=_stock_config(folder), **dict.fromkeys(unnamed))
            for name in unnamed:
                if SPECIAL.get(name) in tokenizer.get_vocab():
                    setattr(tokenizer, name, SPECIAL[name])
            tokenizer.decode(tokenizer.encode(PROBE))  # some of what is wrong shows only now
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and its panics are not even those
        raise DataError(f"no tokenizer can be loaded: {_first_line(error)}", where=path) from error
    return tokenizer


@contextmanager
def _stderr_held() -> Iterator[None]:
    """Hold back what is written to stderr, and drop it on an error: Rust prints a trace of every panic by itself."""
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        shown = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
            sys.stderr.flush()
            held.seek(0)
            os.write(shown, held.read())
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _check_files(folder: Path) -> None:
    """Refuse files of a tokenizer that are no regular files, too large, or no JSON. Raises DataError."""
    for name in (*SENTENCEPIECE, "merges.txt", "vocab.txt"):
        if os.path.lexists(folder / name):
            check_regular(folder / name, limit=LARGE, error=DataError)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if os.path.lexists(path) and not isinstance(load_json(path, limit=LARGE, error=DataError), dict):
            raise DataError("is not a JSON object", where=path, next="download it again")


def _unnamed(folder: Path) -> list[str]:
    """Special tokens that are empty strings, as LLaMA-1 has them: transformers would ask itself for their ids forever.

    They are SentencePiece's own where the vocabulary holds those, else there are none.
    """
    found: list[str] = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        said = read_json(folder / file)
        for name, value in said.items() if isinstance(said, dict) else ():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and text == "" and name not in found:
                found.append(name)
    return found


def _check_sentencepiece(folder: Path) -> None:
    """Refuse a tokenizer of SentencePiece alone where transformers cannot read it, or reads it as another.

    Raises DataError that names the extra, or the file that is missing.
    """
    if (folder / "tokenizer.json").is_file():
        return
    for name in SENTENCEPIECE:
        path = folder / name
        # a protobuf begins with its first field; tiktoken's files of that name are text
        if path.is_file() and read_bytes(path, limit=LARGE)[:1] == b"\n":
            try:
                import google.protobuf  # noqa: F401
                import sentencepiece  # noqa: F401
            except ImportError as error:
                raise DataError(
                    f"its tokenizer is {name} alone, which needs the packages sentencepiece and protobuf",
                    where=folder,
                    next="pip install 'kvfold[sentencepiece]', or add a tokenizer.json",
                ) from error
            named = read_json(folder / "tokenizer_config.json")
            # without a class, transformers reads the pieces and forgets the space before the first word
            if name == "tokenizer.model" and not (isinstance(named, dict) and named.get("tokenizer_class")):
                raise DataError(
                    f"its tokenizer is {name} alone, and nothing names the tokenizer's class",
                    where=folder,
                    next='add tokenizer_config.json with {"tokenizer_class": "LlamaTokenizer"}, or the class it has',
                )


def _stock_config(folder: Path) -> PreTrainedConfig | None:
    """What the tokenizer's class is chosen by, for a model type of ours; None leaves it to config.json.

    For some model types (`qwen2`) transformers takes a class of its own choice, whatever tokenizer_config.json says.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config or stock_type(config) == config["model_type"]:
        return None
    same = {key: value for key, value in config.items() if key not in ("model_type", *ADDED)}
    return AutoConfig.for_model(stock_type(config), **same)


def build(config: Mapping[str, Any], *, seed: int, attention: str | None = None, dtype: str = "float32") -> nn.Module:
    """A fresh model of a `config.json`, in training mode; its weights depend on `seed` alone.

    `attention` is as for `load`; None is what transformers takes: `sdpa`, or `eager` where logits are capped. Raises
    SettingError when transformers cannot read the config.
    """
    kind = _dtype(dtype)
    try:
        made = AutoConfig.for_model(**without_negative_ids(config))
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _auto(config).from_config(made, attn_implementation=attention, dtype=kind)
            _untie(model, config)
    except KvfoldError:
        raise
    except Exception as error:  # transformers raises whatever a field made go wrong
        raise SettingError(f"the config makes no model: {_first_line(error)}") from error
    assert isinstance(model, nn.Module)
    return model.train()


def _auto(config: Mapping[str, Any]) -> Any:
    """The Auto class that makes the model of a config."""
    paired = [kind for family in all_families().values() if family.encoder_decoder for kind in family.model_types]
    return AutoModelForSeq2SeqLM if config.get("model_type") in paired else AutoModelForCausalLM


def _untie(model: Any, config: Mapping[str, Any]) -> None:
    """Give a fresh model the output projection of its own that its config asks for.

    transformers ties every fresh T5, although T5.1.1 says otherwise and its checkpoints hold two matrices.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.get("tie_word_embeddings") is False and head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.randn_like(head.weight) * head.weight.shape[1] ** -0.5)
        model.all_tied_weights_keys.pop("lm_head.weight", None)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SettingError(f"dtype {name!r} is not known", allowed=choices(DTYPES))
    kind = getattr(torch, name)
    assert isinstance(kind, torch.dtype)
    return kind


def _first_line(error: BaseException) -> str:
    """What went wrong, without the advice and the traces that libraries add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no log lines of transformers, for the length of one call."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
