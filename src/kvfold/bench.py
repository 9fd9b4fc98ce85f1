"""Measure what a fold gains: live cache bytes against the plan, prefill and decode time over context x batch.

Teacher and students take turns, round by round, so that whatever else the machine does falls on all of them; each
decodes with the kernel that was fastest for it in a short trial, and the row names it. Beside the teacher stands the
teacher with an fp8 cache: would a flag do? Prompts are random tokens: a time does not depend on what is written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvfold import hf, record
from kvfold.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.progress import SILENT, Progress
from kvfold.record import Record
from kvfold.roofline import decode_step
from kvfold.shape import DTYPE_BYTES, CacheSpec, grouped_cache

KERNELS = (hf.ATTENTION, "sdpa", "eager")
TRIALS = 3  # steps of each kernel before one is chosen


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, how often, and in which numbers."""

    context: tuple[int, ...] = field(default=(1024, 4096), metadata={"help": "Prompt lengths in tokens."})
    batch: tuple[int, ...] = field(default=(1, 8), metadata={"help": "Sequences decoded together."})
    new_tokens: int = field(default=8, metadata={"help": "Tokens decoded after each prompt."})
    repeats: int = field(default=3, metadata={"help": "Rounds, in each of which every model has its turn."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What the models compute in and cache."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads of PyTorch; by default its own choice."})
    fp8: bool = field(default=True, metadata={"help": "Measure the teacher with an fp8 cache too."})
    seed: int = field(default=0, metadata={"help": "Seed of the prompts."})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, with SettingError."""
        for name in ("context", "batch", "new_tokens", "repeats", "threads"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or any(number is not None and number < 1 for number in numbers):
                raise SettingError(f"{name} must be at least 1", where="bench", got=value)


@dataclass(frozen=True)
class _Contender:
    """One model with one kind of cache."""

    name: str
    checkpoint: Checkpoint
    model: Any
    fp8: bool = False

    @property
    def spec(self) -> CacheSpec:
        return grouped_cache(self.checkpoint.shape)

    @property
    def cache(self) -> hf.CacheKind:
        """A static cache spares each step the copy of all that is cached; with a window it rolls, and copies too."""
        windowed = any(site.window for site in self.checkpoint.shape.sites.values())
        return "fp8" if self.fp8 else "growing" if windowed else "static"

    def predicted_bytes(self, tokens: int, batch: int, dtype: str) -> int:
        """What the plan promises; an fp8 cache adds one float32 scale for the keys and one for the values of a layer."""
        if self.fp8:
            return self.spec.bytes(tokens, batch=batch, itemsize=1) + 2 * 4 * self.checkpoint.shape.num_layers
        return self.spec.bytes(tokens, batch=batch, itemsize=DTYPE_BYTES[dtype])

    def moved_bytes(self, context: int, batch: int, dtype: str) -> float:
        """Bytes that the roofline lets one decode step read: weights and cache."""
        tied = bool(self.checkpoint.config.get("tie_word_embeddings", False))
        shape = self.checkpoint.shape
        step = decode_step(shape, self.spec, context=context, batch=batch, dtype=dtype, tied=tied)
        return step.weight_bytes + step.cache_bytes * (1 / DTYPE_BYTES[dtype] if self.fp8 else 1)


def bench(
    models: Sequence[str | Path],
    settings: BenchSettings = BenchSettings(),
    *,
    records: str | Path = "records",
    name: str | None = None,
    progress: Progress = SILENT,
) -> Record:
    """Measure checkpoints side by side, the first of them the teacher, and write the record.

    Raises SettingError or CheckpointError before anything is measured, OutputError when the record cannot be written,
    and AssertionError when a cache holds other bytes than the plan promised: that is a bug of kvfold.
    """
    if not models:
        raise SettingError("no model to measure", where="bench", next="name the teacher, then its students")
    began = time.monotonic()
    checkpoints = [Checkpoint.open(each) for each in models]
    names = _names([each.path for each in checkpoints])
    with _threads(settings.threads):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = [hf.load(each.path, dtype=settings.dtype, device=device) for each in checkpoints]
        contenders = [_Contender(*each) for each in zip(names, checkpoints, loaded, strict=True)]
        notes = _with_fp8(contenders) if settings.fp8 else []
        notes += _beyond(checkpoints, settings)
        rows = _measure(contenders, settings, progress)
        metrics = {"rows": rows, "ratios": _ratios(contenders, rows, settings), "notes": notes}
        identity = {**asdict(settings), "models": [str(each) for each in models]}
        made = record.make(
            "bench",
            name or "-".join(names),
            identity,
            metrics,
            hashes={each: checkpoint.hash(progress) for each, checkpoint in zip(names, checkpoints, strict=True)},
            seed=settings.seed,
            wall_seconds=round(time.monotonic() - began, 2),
        )
    record.write(made, records)
    return made


def _names(paths: Sequence[Path]) -> list[str]:
    """What the rows call the models: the shortest ends of their paths that differ."""
    parts = [path.resolve().parts[1:] for path in paths]
    if len(set(parts)) < len(parts):
        raise SettingError("a model is named twice", where="bench", next="name each once")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different ends")


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_fp8(contenders: list[_Contender]) -> list[str]:
    """Put the teacher with an fp8 cache after the teacher, where transformers has one; else say why not."""
    teacher = contenders[0]
    quantised = _Contender(teacher.name, teacher.checkpoint, teacher.model, fp8=True)
    try:
        hf.new_cache(teacher.model, quantised.cache, 1)
    except SettingError as error:
        return [f"teacher with an fp8 cache: {error}"]
    contenders.insert(1, quantised)
    return []


def _beyond(checkpoints: Sequence[Checkpoint], settings: BenchSettings) -> list[str]:
    positions = min(each.shape.max_positions for each in checkpoints)
    longest = max(settings.context) + settings.new_tokens
    if longest <= positions:
        return []
    return [f"{longest} tokens are more than the {positions} positions of the models: times hold, text would not"]


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(contenders: Sequence[_Contender], settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """One row for each contender, context and batch, contenders taking turns."""
    vocabulary = min(each.checkpoint.shape.vocab_size for each in contenders)
    draw = torch.Generator().manual_seed(settings.seed)
    places = list(product(settings.context, settings.batch))
    work = [context * batch for context, batch in places]
    progress.start("bench", sum(work) * len(contenders) * (settings.repeats + 1), "tokens")
    rows = []
    try:
        for context, batch in places:
            shape = (batch, context + settings.new_tokens)
            ids_BT = torch.randint(vocabulary, shape, generator=draw).to(contenders[0].model.device)
            kernels = []
            for each in contenders:
                kernels.append(_fastest_kernel(each, ids_BT, context))
                progress.advance(context * batch, f"{each.name}: {kernels[-1]}")
            rounds: list[list[_Turn]] = [[] for _ in contenders]
            for _ in range(settings.repeats):
                for each, kernel, turns in zip(contenders, kernels, rounds, strict=True):
                    turns.append(_turn(each, kernel, ids_BT, context))
                    progress.advance(context * batch, f"{context} tokens x {batch}")
            for each, kernel, turns in zip(contenders, kernels, rounds, strict=True):
                rows.append(_row(each, kernel, turns, context, batch, settings))
    finally:
        progress.stop()
    return rows


@dataclass(frozen=True)
class _Turn:
    """What one turn of one contender measured: seconds of the prompt, of each step after it, and live bytes."""

    prefill: float
    steps: list[float]
    cache_bytes: int


def _turn(contender: _Contender, kernel: str, ids_BT: Tensor, context: int) -> _Turn:
    cache = hf.new_cache(contender.model, contender.cache, ids_BT.shape[1])
    prefill = _seconds(contender.model, ids_BT[:, :context], cache)  # with the attention that it was loaded with
    with hf.with_attention(contender.model, kernel):
        steps = [_seconds(contender.model, token_B1, cache) for token_B1 in ids_BT[:, context:].split(1, dim=1)]
    return _Turn(prefill, steps, hf.live_cache_bytes(cache))


def _fastest_kernel(contender: _Contender, ids_BT: Tensor, context: int) -> str:
    """The kernel with the fastest step after this prompt, of a few steps of each, taking turns; it also warms up."""
    cache = hf.new_cache(contender.model, contender.cache, context + TRIALS * len(KERNELS))
    hf.read(contender.model, ids_BT[:, :context], cache)
    best = dict.fromkeys(KERNELS, float("inf"))
    for _ in range(TRIALS):
        for kernel in KERNELS:
            with hf.with_attention(contender.model, kernel):
                best[kernel] = min(best[kernel], _seconds(contender.model, ids_BT[:, :1], cache))
    return min(best, key=lambda kernel: best[kernel])


def _seconds(model: Any, ids_BT: Tensor, cache: Any) -> float:
    gpu = ids_BT.is_cuda
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    hf.read(model, ids_BT, cache)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _row(
    contender: _Contender, kernel: str, turns: Sequence[_Turn], context: int, batch: int, settings: BenchSettings
) -> dict[str, Any]:
    """Medians of a contender's turns; `spread` is how far the medians of the rounds lie apart, over the median."""
    predicted = contender.predicted_bytes(context + settings.new_tokens, batch, settings.dtype)
    held = {turn.cache_bytes for turn in turns}
    if held != {predicted}:
        raise AssertionError(f"{contender.name}: the cache holds {sorted(held)} bytes, the plan says {predicted}")
    rounds = [statistics.median(turn.steps) for turn in turns]
    decode = statistics.median(step for turn in turns for step in turn.steps)
    return {
        "model": contender.name,
        "cache": "fp8" if contender.fp8 else "native",
        "context": context,
        "batch": batch,
        "cache_bytes": held.pop(),
        "predicted_cache_bytes": predicted,
        "prefill_s": statistics.median(turn.prefill for turn in turns),
        "decode_s_per_token": decode,
        "spread": (max(rounds) - min(rounds)) / decode,
        "kernel": kernel if contender.fp8 else f"{kernel}, {contender.cache} cache",
    }


def _ratios(
    contenders: Sequence[_Contender], rows: Sequence[dict[str, Any]], settings: BenchSettings
) -> list[dict[str, Any]]:
    """How many times faster and smaller than the teacher, beside what the bytes of a decode step allow."""
    by_place: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_place.setdefault((row["context"], row["batch"]), []).append(row)
    found = []
    for (context, batch), here in by_place.items():
        moved = [each.moved_bytes(context, batch, settings.dtype) for each in contenders]
        for row, own in list(zip(here, moved, strict=True))[1:]:
            found.append(
                {
                    "model": row["model"],
                    "cache": row["cache"],
                    "context": context,
                    "batch": batch,
                    "decode_speedup": here[0]["decode_s_per_token"] / row["decode_s_per_token"],
                    "roofline_speedup": moved[0] / own,
                    "prefill_speedup": here[0]["prefill_s"] / row["prefill_s"],
                    "cache_bytes_ratio": row["cache_bytes"] / here[0]["cache_bytes"],
                }
            )
    return found
