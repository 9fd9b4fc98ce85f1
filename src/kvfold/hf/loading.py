"""Loading checkpoints, fresh models and tokenizers through transformers' Auto classes: quietly and strictly."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvfold.contracts.family import Family
from kvfold.contracts.runtimes import ABSORBED, ADDED, stock_type
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import read_object
from kvfold.disk.source import locate
from kvfold.errors import CheckpointError, DataError, KvfoldError, SettingError, choices
from kvfold.families import all_families
from kvfold.hf.attention import NAME
from kvfold.inputs import LARGE, check_regular, load_json, read_bytes

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # SentencePiece's names
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PROBE = "a b"  # a text that every loaded tokenizer must encode and decode
PROBLEMS = ("missing", "unexpected", "mismatched")
"""The ways in which a checkpoint's tensors differ from its architecture's."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(path: str | Path, *, dtype: str = "float32", device: str = "cpu", attention: str = NAME) -> nn.Module:
    """Load a checkpoint, a local directory or a hub id, for inference: `model(ids_BT).logits`.

    An encoder-decoder also takes `decoder_input_ids`. `attention` is `kvfold` or one of transformers' own (`sdpa`,
    `eager`); architectures that compute their attention themselves have `eager` alone. Raises CheckpointError if the
    checkpoint cannot be read or its tensors are not exactly those of its architecture (transformers would initialise
    missing ones at random), and UnsupportedModel if it has no family.
    """
    kind = _dtype(dtype)
    source = Checkpoint.open(path)
    options: dict[str, Any] = {
        "dtype": kind,
        "attn_implementation": _known(attention, source.config),
        **_experts(dtype),
    }
    config = _built(source.config)
    try:
        with quiet():
            if config != source.config:
                options["config"] = AutoConfig.for_model(**config)
            model, found = _auto(config).from_pretrained(source.path, output_loading_info=True, **options)
    except Exception as error:  # transformers wraps no errors
        raise CheckpointError(f"cannot be loaded: {_first_line(error)}", where=path) from error
    known = _constants(model).union(source.buffers)
    check_tensors(path, **{problem: set(found.get(f"{problem}_keys", ())) - known for problem in PROBLEMS})
    model.to(device).eval()
    for name, value in without_negative_ids(vars(model.generation_config)).items():
        setattr(model.generation_config, name, value)
    assert isinstance(model, nn.Module)
    return model


def twin(model: Any, attention: str, *, weights: bool = False) -> Any:
    """A copy of a model with another attention, which shares its weights unless it has `weights` of its own."""
    shared = () if weights else (*model.parameters(), *model.buffers())
    made = copy.deepcopy(model, {id(each): each for each in shared})
    made.set_attn_implementation(attention)
    return made


def load_source(source: Checkpoint, *, device: str = "cpu") -> nn.Module:
    """Load an opened checkpoint as `load` does; a view of another is loaded in its own architecture."""
    return load(source.path, device=device) if source.origin is source else filled(source, device=device)


def filled(source: Checkpoint, *, device: str = "cpu", attention: str = NAME) -> nn.Module:
    """A model in float32 with the tensors of an opened checkpoint, which may be unfinished or a view of another."""
    model = build(source.config, seed=0, attention=attention).eval()
    found = model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    there = set(getattr(model, "all_tied_weights_keys", {})) | _constants(model)
    missing = set(found.missing_keys) - there
    check_tensors(source.path, missing=missing, unexpected=found.unexpected_keys, mismatched=())
    return model.to(device)


def _constants(model: nn.Module) -> set[str]:
    """Tables of positions that are computed, by name: not all checkpoints hold them."""
    return {f"{name}.weight" for name, each in model.named_modules() if hasattr(each, "create_weight")}


def check_tensors(where: object, **problems: Iterable[object]) -> None:
    """Raise CheckpointError for the first of `PROBLEMS` that has names of tensors."""
    for problem in PROBLEMS:
        if names := sorted(map(str, problems[problem])):
            remedy = "is config.json that of these weights?"
            raise CheckpointError(f"{problem} tensors", where=where, got=", ".join(names[:3]), next=remedy)


def without_negative_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, with its nested configs, whose negative token ids are None: older tools write -1 for "no token".

    transformers would index with -1: the last token's embedding would not be trained, and -1 would be generated.
    """

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_negative_ids(value)
        if name.endswith("_token_id") and isinstance(value, list):
            return [each for each in value if clean(name, each) is not None] or None
        negative = name.endswith("_token_id") and isinstance(value, int) and value < 0
        return None if negative else value

    return {name: clean(name, value) for name, value in config.items()}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; kvfold's model types have that of their stock architecture.

    Raises DataError if there is no tokenizer that can be loaded, and CheckpointError if there is no such directory.
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
            tokenizer.decode(tokenizer.encode(PROBE))  # some errors appear only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is not an Exception
        raise DataError(f"no tokenizer can be loaded: {_first_line(error)}", where=path) from error
    return tokenizer


def load_extractor(path: str | Path) -> Any:
    """The feature extractor of a checkpoint that reads sound. Raises DataError if there is none that can be loaded."""
    folder = locate(path)
    name = "preprocessor_config.json"
    if not isinstance(load_json(folder / name, error=DataError), dict):
        raise DataError("is not a JSON object", where=folder / name, next="download it again")
    try:
        return AutoFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # transformers wraps no errors
        raise DataError(f"no feature extractor can be loaded: {_first_line(error)}", where=folder / name) from error


@contextmanager
def _stderr_held() -> Iterator[None]:
    """Buffer stderr, and discard it on an error: Rust prints the trace of every panic."""
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
    """Raise DataError for tokenizer files that are not regular, too large or not JSON."""
    for name in (*SENTENCEPIECE, "merges.txt", "vocab.txt"):
        if os.path.lexists(folder / name):
            check_regular(folder / name, limit=LARGE, error=DataError)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if os.path.lexists(path) and not isinstance(load_json(path, limit=LARGE, error=DataError), dict):
            raise DataError("is not a JSON object", where=path, next="download it again")


def _unnamed(folder: Path) -> list[str]:
    """Special tokens that are empty strings, as in LLaMA-1: transformers would look up their ids forever.

    They become SentencePiece's tokens if the vocabulary has those, else None.
    """
    found: dict[str, None] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for name, value in read_object(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and text == "":
                found[name] = None
    return list(found)


def _check_sentencepiece(folder: Path) -> None:
    """Refuse a tokenizer of SentencePiece alone that transformers cannot read, or reads as another.

    Raises DataError with the missing extra or file.
    """
    if (folder / "tokenizer.json").is_file():
        return
    for name in SENTENCEPIECE:
        # a protobuf begins with its first field; tiktoken's files of that name are text
        if not (folder / name).is_file() or read_bytes(folder / name, limit=LARGE)[:1] != b"\n":
            continue
        try:
            import google.protobuf  # noqa: F401
            import sentencepiece  # noqa: F401
        except ImportError as error:
            what = f"its only tokenizer file is {name}, which needs the packages sentencepiece and protobuf"
            remedy = "pip install 'kvfold[sentencepiece]', or add a tokenizer.json"
            raise DataError(what, where=folder, next=remedy) from error
        # without a class, transformers reads the pieces but loses the space before the first word
        if name == "tokenizer.model" and not read_object(folder / "tokenizer_config.json").get("tokenizer_class"):
            what = f"its only tokenizer file is {name}, and no file names the tokenizer's class"
            remedy = 'add tokenizer_config.json with {"tokenizer_class": "LlamaTokenizer"}, or the class it has'
            raise DataError(what, where=folder, next=remedy)


def _stock_config(folder: Path) -> PreTrainedConfig | None:
    """The config by which transformers chooses the tokenizer's class, for kvfold's model types; None for others.

    For some model types (`qwen2`) transformers chooses a class and ignores tokenizer_config.json.
    """
    config = read_object(folder / "config.json")
    if "model_type" not in config or stock_type(config) == config["model_type"]:
        return None
    same = {key: value for key, value in config.items() if key not in ("model_type", *ADDED)}
    return AutoConfig.for_model(stock_type(config), **same)


def build(config: Mapping[str, Any], *, seed: int, attention: str | None = None, dtype: str = "float32") -> nn.Module:
    """A fresh model of a `config.json`, in training mode; its weights depend on `seed` alone.

    `attention` is as in `load`; None is transformers' default: `sdpa`, or `eager` if logits are capped. Raises
    SettingError if transformers cannot build the config.
    """
    kind = _dtype(dtype)
    try:
        made = AutoConfig.for_model(**_built(config))
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _auto(config).from_config(
                made, attn_implementation=_known(attention, config), dtype=kind, **_experts(dtype)
            )
            _untie(model, config)
    except KvfoldError:
        raise
    except Exception as error:  # transformers wraps no errors
        raise SettingError(f"no model can be built from the config: {_first_line(error)}") from error
    assert isinstance(model, nn.Module)
    return model.train()


def _built(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that is built of another: kvfold's class for the same tensors, where it has one."""
    made = without_negative_ids(config)
    kind = made.get("model_type")
    return {**made, "model_type": ABSORBED.model_type(str(kind))} if kind in ABSORBED.models else made


def _family(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json that may be unchecked."""
    kind = config.get("model_type")
    return next((each for each in all_families().values() if kind in each.architectures), None)


def _known(attention: str | None, config: Mapping[str, Any]) -> str | None:
    """The attention that its classes take of the one that is wanted."""
    family = _family(config)
    return attention if attention is None or family is None or family.interface else "eager"


def _auto(config: Mapping[str, Any]) -> Any:
    family = _family(config)
    if family is not None and family.audio:
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM if family is not None and family.encoder_decoder else AutoModelForCausalLM


def _untie(model: Any, config: Mapping[str, Any]) -> None:
    """Untie the output projection of a fresh model if its config says so.

    transformers ties every fresh T5, but T5.1.1 is not tied and its checkpoints hold two matrices.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.get("tie_word_embeddings") is False and head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.randn_like(head.weight) * head.weight.shape[1] ** -0.5)
        model.all_tied_weights_keys.pop("lm_head.weight", None)


def _experts(dtype: str) -> dict[str, str]:
    """How experts are computed: torch's grouped matrix products, which are transformers' default, have no float64."""
    return {"experts_implementation": "eager"} if dtype == "float64" else {}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SettingError(f"dtype {name!r} is not known", allowed=choices(DTYPES))
    kind: torch.dtype = getattr(torch, name)
    return kind


def _first_line(error: BaseException) -> str:
    """The message of an error without the advice and the traces that libraries add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and log lines of transformers inside the `with` block."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
