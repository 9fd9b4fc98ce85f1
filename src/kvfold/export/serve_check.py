"""One student in one engine, beside transformers: greedy tokens, logits, and the bytes of the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.runtimes import MLA, stock_type
from kvfold.contracts.site import DTYPE_BYTES
from kvfold.contracts.student_site import WITH_KERNELS
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import DataError, SettingError, UnsupportedModel, choices, did_you_mean
from kvfold.export import agreement
from kvfold.export.ctranslate2 import CTranslate2
from kvfold.export.engine import Engine
from kvfold.export.engine_process import Answered, EngineProcess
from kvfold.export.gguf import LlamaCpp
from kvfold.export.settings import ServeSettings
from kvfold.predict.engines import ONE_GROUPING
from kvfold.progress import SILENT, Progress, task

TEXT = """The harbour lay quiet in the early light, and only two of the boats had their lamps lit. Anna counted the
crates twice, as her father had taught her, and wrote 48 in the book. "There should be fifty," she said.
def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
Water boils at 100 degrees at sea level; on a mountain 3,000 metres high it boils at about 90, so that rice needs longer
to cook. The committee met on Tuesday and decided, by seven votes to two, to repair the old bridge instead of building
a new one, because the stones of the piers were found to be sound."""

_BOOKKEEPING = 0.01  # of the cache, that an engine may allocate besides keys and values
_PLUGIN = "students of kvfold's own model types need kvfold beside vLLM: pip install --no-deps kvfold"
_WIDTHS = f"vLLM has kernels for latents of {WITH_KERNELS} (on a CPU, the first alone)"
_VLLM = EngineProcess("vLLM", "vllm", "pip install vllm", "ask_vllm.py", _PLUGIN)
_LLAMA_CPP = EngineProcess("llama.cpp", "llama_cpp", "pip install llama-cpp-python", "ask_llama_cpp.py")


@dataclass(frozen=True)
class ServeCheck:
    """What an engine answered, beside transformers."""

    engine: str
    version: str
    dtype: str
    positions: int  # whose logits the engine gives
    max_difference: float
    relative_difference: float
    tolerance: float
    tokens: int
    same_tokens: int
    partings: tuple[agreement.Parting, ...]
    near_ties: int
    predicted_cache_bytes_per_token: float | None
    cache_bytes_per_token: float | None
    problem: str | None

    @property
    def equal(self) -> bool:
        """Whether the engine computes what transformers does, and allocates what was predicted."""
        return self.problem is None

    def as_dict(self) -> dict[str, Any]:
        """Every field, and `equal`."""
        return {**asdict(self), "equal": self.equal}

    def rows(self) -> list[tuple[str, str]]:
        """The comparison as a table of two columns."""
        found = [
            ("greedy tokens the same", f"{self.same_tokens} of {self.tokens}"),
            ("largest difference of logits", f"{self.max_difference:.2g} at {self.positions} positions"),
            ("difference over their spread", f"{self.relative_difference:.2g} (tolerance {self.tolerance:g})"),
        ]
        for each in self.partings:
            kind = "near tie" if each.near_tie(self.max_difference) else "differs"
            found.append(
                (
                    f"prompt {each.prompt + 1}, token {each.step + 1}: {kind}",
                    f"{each.token} (logit {each.logit:.6g}), the engine's {each.other} ({each.other_logit:.6g})",
                )
            )
        if self.cache_bytes_per_token is not None:
            size = f"{self.cache_bytes_per_token:,.0f}, predicted {self.predicted_cache_bytes_per_token:,.0f}"
            found.append(("cache bytes per token", size))
        return found


def serve_check(
    student: str | Path,
    engine: str,
    settings: ServeSettings = ServeSettings(),
    *,
    python: str | None = None,
    progress: Progress = SILENT,
) -> ServeCheck:
    """Compare a checkpoint in an engine with transformers in float32.

    vLLM reads the checkpoint itself; for the others, it is exported to a temporary folder. vLLM and llama.cpp run in
    `python`, by default this one. Raises SettingError if the engine is not installed, UnsupportedModel if it cannot
    hold the model, and DataError for a text that is too short.
    """
    from kvfold.hf import load  # imports transformers

    if engine not in _ASK:
        raise SettingError(
            f"no engine is called {engine!r}", where="--engine", allowed=choices(_ASK), next=did_you_mean(engine, _ASK)
        )
    if python is not None and engine == "ctranslate2":
        raise SettingError("CTranslate2 runs in kvfold's own Python", where="--python", next="leave --python out")
    source = Checkpoint.open(student)
    with task(progress, f"comparing {engine} with transformers", 2, "answers"), tempfile.TemporaryDirectory() as place:
        stock = source.config["model_type"] == stock_type(source.config)
        model = load(source.path, attention="sdpa" if stock else "kvfold")
        known = agreement.reference(model, _prompts(source, settings), new_tokens=settings.new_tokens)
        progress.advance(1, "transformers")
        answered = _ASK[engine](source, model, known, settings.dtype, Path(place), python)
        progress.advance(1, engine)
    return _checked(engine, source, known, answered, settings.dtype)


def _checked(engine: str, source: Checkpoint, known: agreement.Reference, answered: Answered, dtype: str) -> ServeCheck:
    found = agreement.compare(known, answered.logits, answered.answers)
    tolerance = agreement.TOLERANCE[dtype]
    problem = agreement.disagreement(found, tolerance)
    predicted = None
    if answered.cache_bytes_per_token is not None:
        predicted = float(grouped_cache(source.shape).bytes_per_token(DTYPE_BYTES[dtype]))
        if problem is None and abs(answered.cache_bytes_per_token / predicted - 1) > _BOOKKEEPING:
            problem = f"its cache takes {answered.cache_bytes_per_token:,.0f} bytes per token, not {predicted:,.0f}"
    return ServeCheck(
        engine=engine,
        version=answered.version,
        dtype=dtype,
        tolerance=tolerance,
        partings=tuple(agreement.partings(known, answered.answers)),
        predicted_cache_bytes_per_token=predicted,
        cache_bytes_per_token=answered.cache_bytes_per_token,
        problem=problem,
        **{name: value for name, value in found.items() if name != "differing_answers"},
    )


# --- the engines ----------------------------------------------------------------------------------------------------


def _exported(engine: Engine, source: Checkpoint, model: Any, folder: Path, dtype: str) -> None:
    engine.available()
    engine.check(source)
    engine.write(source, model, folder, dtype)


def _in_ctranslate2(
    source: Checkpoint, model: Any, known: agreement.Reference, dtype: str, folder: Path, python: str | None
) -> Answered:
    engine = CTranslate2()
    _exported(engine, source, model, folder, dtype)
    return Answered(f"CTranslate2 {engine.version()}", *engine.answer(folder, known, dtype))


def _in_llama_cpp(
    source: Checkpoint, model: Any, known: agreement.Reference, dtype: str, folder: Path, python: str | None
) -> Answered:
    import torch

    engine = LlamaCpp()
    _exported(engine, source, model, folder, dtype)
    return _LLAMA_CPP.ask(folder / engine.file, known, dtype, torch.get_num_threads(), python)


def _in_vllm(
    source: Checkpoint, model: Any, known: agreement.Reference, dtype: str, folder: Path, python: str | None
) -> Answered:
    import torch

    if source.family.encoder_decoder:
        raise UnsupportedModel("vLLM has no encoder-decoders of text", where=source.path, next="use ctranslate2")
    if source.shape.decoupled:
        raise UnsupportedModel(f"vLLM {ONE_GROUPING}", where=source.path, next="make the student without --no-servable")
    latent = MLA.holds(source.shape)
    biased = latent and source.config.get("attention_bias")  # vLLM's own class has no such bias
    options = {"model_impl": "transformers"} if biased else {}
    engine = replace(_VLLM, advice=_WIDTHS) if latent else _VLLM
    return engine.ask(source.path, known, dtype, torch.get_num_threads(), python, options)


_ASK: Mapping[str, Callable[..., Answered]] = {
    "vllm": _in_vllm,
    "llama.cpp": _in_llama_cpp,
    "ctranslate2": _in_ctranslate2,
}


# --- the prompts ----------------------------------------------------------------------------------------------------


def _prompts(source: Checkpoint, settings: ServeSettings) -> list[list[int]]:
    """Prompts of one length, spread over the text; random ids for a checkpoint without a tokenizer and no text.

    Raises DataError for a text that is shorter than a prompt.
    """
    from kvfold.hf import load_tokenizer
    from kvfold.text.documents import read_texts

    length, count = settings.prompt_tokens, settings.prompts
    room = source.shape.max_positions - settings.new_tokens
    if length > room:
        raise SettingError(
            "prompt and answer are longer than the model's context", where="prompt_tokens", got=length, allowed=room
        )
    if settings.data is None and source.tokenizer_hash is None:
        return agreement.random_prompts(source.shape.vocab_size, length, count)
    texts = [TEXT] if settings.data is None else islice(read_texts(settings.data), 100)
    ids = load_tokenizer(source.path).encode("\n".join(texts)[: 100 * length * count], add_special_tokens=False)
    if len(ids) < length:
        raise DataError("the text is shorter than a prompt", where=settings.data, got=f"{len(ids)} tokens")
    last = len(ids) - length
    starts = [number * last // max(1, count - 1) for number in range(count)]
    return [ids[start : start + length] for start in starts]
