"""GGUF for llama.cpp: written tensor by tensor with gguf-py, and read back.

The layout is that of llama.cpp's own converter, which is the better choice where it knows the tokenizer; it refuses
byte-level tokenizers that are not on its list, and every model with a vocabulary of its own has one. Architectures
`llama` and `deci` rotate neighbouring pairs where transformers rotates halves, so the rows of each head of q and k
change places. `deci` is the architecture whose layers may differ in their key/value heads. For a Phi,
`phi2`, that converter writes as many key/value heads as query heads and an MLP of four times the model's width.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from kvfold.contracts.runtimes import mixed
from kvfold.disk.checkpoint import TIED, Checkpoint
from kvfold.disk.output import read_json
from kvfold.errors import CheckpointError, SettingError, UnsupportedModel
from kvfold.export.agreement import Logits, Reference
from kvfold.export.ask_llama_cpp import greedy, load
from kvfold.export.engine import Engine
from kvfold.export.limits import common_attention, frequency_factors, kv_heads, window

NOT_LOADED = "not loaded: llama-cpp-python is not installed"
SAMPLE = "def fold(heads):\n    return [x ** 2 for x in heads]  # it's 3 of 8, or 1024?\n\nThe café — naïve."
_PAIRED = ("llama", "deci")  # architectures that rotate neighbouring pairs

_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "int8"}
_LIMITS = {  # the smallest number that a kind rounds to infinity; Q8_0 keeps 1/127 of the largest as float16
    "F32": math.inf,
    "F16": 65_520.0,
    "BF16": float.fromhex("0x1.ffp127"),
    "Q8_0": 127 * 65_520.0,
}

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # the pattern of a tokenizer.json -> llama.cpp's name for it
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}\p{{N}}{_REST}": "qwen2",
}


class LlamaCpp(Engine):
    """`model.gguf`, which holds the hyperparameters, the tensors and the vocabulary."""

    name = "llama.cpp"
    package = extra = "gguf"
    file = "model.gguf"

    def __init__(self, *, flash_attention: bool = False) -> None:
        """Flash attention rounds more, so the comparison runs without it."""
        self.flash_attention = flash_attention

    @override
    def loadable(self) -> bool:
        try:
            importlib.import_module("llama_cpp")
        except ImportError:
            return False
        return True

    @override
    def version(self) -> str:
        package = "llama-cpp-python" if self.loadable() else "gguf"
        return f"{package} {importlib.metadata.version(package)}"

    @override
    def write(self, source: Checkpoint, model: Any, folder: Path, weights: str) -> dict[str, Any]:
        """One tensor in memory at a time. `model` is not used.

        Raises UnsupportedModel for tensors that the architecture does not know, SettingError for numbers that the
        dtype cannot hold.
        """
        import gguf

        with closing(gguf.GGUFWriter(folder / self.file, _architecture(source))) as writer:
            _describe(writer, source, weights)
            vocabulary = _vocabulary(writer, source)
            plan = list(_tensors(source, weights))
            for name, _, kind, shape in plan:
                block, size = gguf.GGML_QUANT_SIZES[kind]
                count = math.prod(shape) // block * size
                writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, origin, kind, _ in plan:
                writer.write_tensor_data(_data(source, name, origin, kind))
        return {"vocabulary": vocabulary}

    @override
    def precision(self, source: Checkpoint, weights: str) -> str:
        """`phi2` takes GELU from a table with float16 arguments and values."""
        return "float16" if weights == "float32" and _architecture(source) == "phi2" else weights

    @override
    def inspect(self, source: Checkpoint, folder: Path, weights: str) -> dict[str, Any]:
        """Read the file with gguf-py: the planned tensors with their shapes, the head counts, the vocabulary."""
        import gguf

        reader = gguf.GGUFReader(folder / self.file)
        there = {each.name: (each.tensor_type, tuple(int(n) for n in each.shape[::-1])) for each in reader.tensors}
        wanted = {name: (kind, shape) for name, _, kind, shape in _tensors(source, weights)}
        heads = _head_counts(source)
        found = {key: reader.get_field(f"{_architecture(source)}.attention.{key}").contents() for key in heads}
        if there != wanted or found != heads:
            raise CheckpointError(
                "the file does not hold what was written", where=folder / self.file, got=found, allowed=heads
            )
        found["tensors"] = len(there)
        if self.loadable() and reader.get_field("tokenizer.ggml.model").contents() != "none":
            from kvfold.hf import load_tokenizer

            ids = load_tokenizer(source.path).encode(SAMPLE, add_special_tokens=False)
            with self.refusals(folder):
                engine = self._load(folder, 8, 1)
                found["same_text_ids"] = engine.tokenize(SAMPLE.encode(), add_bos=False, special=False) == ids
                engine.close()
        return found

    @override
    def _answer(self, folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
        import torch

        engine = self._load(folder, len(known.texts()[0]) + 1, torch.get_num_threads())
        logits, answers = [], []
        for text, prompt, wanted in zip(known.texts(), known.prompts, known.answers, strict=True):
            engine.reset()
            engine.eval(text)
            logits.append(np.array(engine.scores[: len(text)], dtype=np.float32))
            answers.append(greedy(engine, prompt, len(wanted))[0])
        engine.close()
        return logits, answers

    def _load(self, folder: Path, context: int, threads: int) -> Any:
        return load(str(folder / self.file), context, threads, flash_attention=self.flash_attention)

    @override
    def notes(self, found: dict[str, Any]) -> list[str]:
        lines = []
        if not found["loaded"]:
            lines.append(f"{NOT_LOADED}; {found['tensors']} tensors were read back and are as planned")
        if isinstance(found["head_count_kv"], list):
            lines.append(
                f"serve it with flash attention: without it, {self.name} keeps V as wide as the widest layer's"
            )
        if found["vocabulary"].startswith("none"):
            lines.append(f"vocabulary: {found['vocabulary']}")
        if found.get("same_text_ids") is False:
            lines.append("vocabulary: llama.cpp splits a sample text otherwise than the tokenizer; give it token ids")
        return lines


def _architecture(source: Checkpoint) -> str:
    """The architecture of the file, by llama.cpp's name."""
    model_type = source.shape.model_type
    return "deci" if mixed(source.shape) else {"mistral": "llama", "phi": "phi2"}.get(model_type, model_type)


def _describe(writer: Any, source: Checkpoint, weights: str) -> None:
    """The hyperparameters of the file."""
    import gguf

    attention, shape, limit = common_attention(source), source.shape, window(source)
    assert attention.rope is not None
    kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "int8": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_file_type(gguf.LlamaFileType[kinds[weights]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(min(shape.max_positions, limit or shape.max_positions))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(int(source.config["intermediate_size"]))
    writer.add_head_count(attention.num_attention_heads)
    writer.add_head_count_kv(_head_counts(source)["head_count_kv"])
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.rope.dims)
    writer.add_rope_freq_base(attention.rope.theta)
    if _architecture(source) == "phi2":
        writer.add_layer_norm_eps(float(source.config.get("layer_norm_eps", 1e-5)))
    else:
        writer.add_layer_norm_rms_eps(float(source.config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(shape.vocab_size)


def _head_counts(source: Checkpoint) -> dict[str, Any]:
    """Heads, and key/value heads as one number or a list with each layer's."""
    heads = kv_heads(source)
    shared = heads if mixed(source.shape) else heads[0]
    return {"head_count": common_attention(source).num_attention_heads, "head_count_kv": shared}


# --- tensors --------------------------------------------------------------------------------------------------------


def _tensors(source: Checkpoint, weights: str) -> Iterator[tuple[str, str, Any, tuple[int, ...]]]:
    """Name in the file, name in the checkpoint ("" for rotary factors), stored kind and shape of each tensor."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _architecture(source))
    names = gguf.get_tensor_name_map(architecture, source.shape.num_layers)
    wanted = gguf.GGMLQuantizationType[next(kind for kind, dtype in _KINDS.items() if dtype == weights)]
    attention = common_attention(source)
    if frequency_factors(attention.rope) is not None:
        yield "rope_freqs.weight", "", gguf.GGMLQuantizationType.F32, (attention.head_dim // 2,)
    origins = {each: each for each in source.names() if not each.endswith("rotary_emb.inv_freq")}  # by the base
    if source.config.get("tie_word_embeddings"):
        origins.pop(TIED, None)  # the embedding itself
        if _architecture(source) == "phi2":  # which needs a projection of its own
            origins[TIED] = f"{source.family.body.embedding}.weight"
    for tensor, origin in origins.items():
        name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModel(f"llama.cpp has no place for tensor {origin}", where=source.path)
        shape = source.spec(origin).shape
        kind = wanted
        if len(shape) == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # its rows do not divide into blocks
        yield name, origin, kind, shape


def _data(source: Checkpoint, name: str, origin: str, kind: Any) -> NDArray[Any]:
    """One tensor as the file holds it."""
    import gguf

    attention = common_attention(source)
    if not origin:
        factors = frequency_factors(attention.rope)
        assert factors is not None
        return factors
    values: NDArray[np.float32] = source.read(origin).float().numpy()
    if _architecture(source) in _PAIRED:
        if ".attn_q." in name:
            values = interleave(values, attention.num_attention_heads)
        elif ".attn_k." in name:
            values = interleave(values, kv_heads(source)[int(name.split(".")[1])])
    largest, limit = float(np.abs(values).max(initial=0)), _LIMITS.get(kind.name, math.inf)
    if not largest < limit:  # also when it is not a number
        raise SettingError(
            f"{_KINDS[kind.name]} cannot hold {origin}",
            got=f"{largest:.3g}",
            allowed=f"less than {limit:.6g}",
            next="choose float32" if kind.name == "BF16" else "choose bfloat16 or float32",
        )
    stored: NDArray[Any] = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    return stored


def interleave(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from halves `0 1 2 3` to neighbours `0 2 1 3`; `heads` are those of this very tensor."""
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


# --- vocabulary -----------------------------------------------------------------------------------------------------


def _vocabulary(writer: Any, source: Checkpoint) -> str:
    """Write the tokenizer where llama.cpp can run it; return its name, or the reason why there is none."""
    import gguf

    tokenizer = read_json(source.path / "tokenizer.json")
    split = byte_level_split(tokenizer) if isinstance(tokenizer, dict) else None
    if split is None:
        writer.add_tokenizer_model("none")
        return "none: not a byte-level tokenizer that llama.cpp splits the same way; it takes and gives token ids"
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    added = {each["id"]: each for each in tokenizer["added_tokens"]}
    tokens, types = [], []
    for number in range(source.shape.vocab_size):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(words.get(number, f"[PAD{number}]"))
            types.append(gguf.TokenType.NORMAL if number in words else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(source.path, load_merges=True, n_vocab=source.shape.vocab_size)
    special.add_to_gguf(writer, quiet=True)
    return f"byte-level BPE, split as {split}"


def byte_level_split(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level `tokenizer.json` splits text before its merges; None when it has none."""
    model, first = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        return None
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return "gpt-2" if last.get("use_regex", True) and not tokenizer.get("normalizer") else None
    digits = {"type": "Digits", "individual_digits": True}
    if steps[:-1] == [digits] and last.get("use_regex", True) and not tokenizer.get("normalizer"):
        return "smollm"
    if len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        return _SPLITS.get(pattern) if steps[0].get("behavior") == "Isolated" else None
    return None
