"""Measure what a fold gains: live cache bytes against the plan, prefill and decode time over context x batch.

Teacher and students take turns, round by round, so that whatever else the machine does falls on all of them; each
decodes with the kernel that was fastest for it in a short trial, and the row names it. Beside the teacher stands the
teacher with an fp8 cache: would a flag do? (transformers' own saves bytes and expands all of them for every token.)
Prompts are random tokens: a time does not depend on what is written.

Caches are static, as in serving engines, where no layer has a window: transformers' growing cache copies itself for
every token, and a speed-up over a teacher that copies more would be an artefact.

What layers share is read by all of them: such a student decodes no faster at the same batch. Under `memory` each model
is timed at the largest batch that fits beside its weights too, which is where fewer bytes turn into speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kvfold import hf
from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.record import Record
from kvfold.errors import KvfoldError, SettingError
from kvfold.formats import size
from kvfold.machine import best_device
from kvfold.predict.roofline import decode_step, hardware, processor_memory
from kvfold.progress import SILENT, Progress
from kvfold.settings import MOST, SEEDS, check_range

KERNELS = (hf.ATTENTION, "sdpa", "eager")
TRIALS = 3  # steps of each kernel before one is chosen
QUICK = 0.25  # seconds; prompts that take longer are read once
PIECE = 64  # tokens of each prompt that are read together where as many prompts are read as memory holds
THREADS = 4096  # at most: each is started, and none of them is refused by PyTorch
COPIES = 3  # caches' worth of memory that a model needs while it is measured: its own, and what kernels make of it

K = TypeVar("K")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, how often, and in which numbers."""

    context: tuple[int, ...] = field(default=(1024, 4096), metadata={"help": "Prompt lengths in tokens."})
    batch: tuple[int, ...] = field(default=(1, 8), metadata={"help": "Sequences decoded together."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens decoded after each prompt."})
    repeats: int = field(default=5, metadata={"help": "Rounds, in each of which every model has its turn."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What the models compute in and cache."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads of PyTorch; by default its own choice."})
    fp8: bool = field(default=True, metadata={"help": "Measure the teacher with an fp8 cache too."})
    memory: int | None = field(
        default=None,
        metadata={"help": "Bytes for weights and cache (2G): each model is timed at the largest batch that fits, too."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the prompts."})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, with SettingError."""
        for name in ("context", "batch", "new_tokens", "repeats", "threads", "memory"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or any(number is not None and number < 1 for number in numbers):
                raise SettingError(f"{name} must be at least 1", where="bench", got=value)
        check_range(self, "bench", 1, MOST, "context", "batch", "new_tokens", "repeats")
        check_range(self, "bench", 1, THREADS, "threads")
        check_range(self, "bench", 0, SEEDS - 1, "seed")


def bench(
    models: Sequence[str | Path],
    settings: BenchSettings = BenchSettings(),
    *,
    records: str | Path = "records",
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Record:
    """Measure checkpoints side by side, the first of them the teacher, and write the record.

    A record of the same inputs is returned as it is unless `overwrite`. Raises SettingError, CheckpointError or
    OutputError before anything is measured, and KvfoldError, after the record is written, when a cache holds other
    bytes than the plan promised.
    """
    if not models:
        raise SettingError("no model to measure", where="bench", next="name the teacher, then its students")
    began = time.monotonic()
    opened = [Checkpoint.open(each) for each in models]
    checkpoints = dict(zip(_names([each.path for each in opened], [each.name for each in opened]), opened, strict=True))
    hashes: dict[str, str | None] = {label: each.hash(progress) for label, each in checkpoints.items()}
    name = name or "-".join(checkpoints)
    identity = {**asdict(settings), "models": [str(each) for each in models]}
    path = record.path_of(records, "bench", name, identity)
    record.check_replaceable(path)
    record.check_folder(Path(records))
    made = None if overwrite else record.existing(path, hashes)
    if made is not None:
        progress.say(f"{path}: measured already")
        return made
    _check_room(opened, settings)
    with _threads(settings.threads):
        metrics = _metrics(checkpoints, settings, progress)
        timed = [*metrics["rows"], *metrics["largest"]]
        wrong = next((row for row in timed if row["cache_bytes"] != row["predicted_cache_bytes"]), None)
        error = None if wrong is None else _other_bytes(wrong, path)
        made = record.make(
            "bench",
            name,
            identity,
            metrics,
            hashes=hashes,
            seed=settings.seed,
            status="failed" if error else "done",
            error=None if error is None else str(error),
            wall_seconds=round(time.monotonic() - began, 2),
        )
    record.write(made, records)
    if error is not None:
        raise error
    return made


def interleave(works: Mapping[K, Callable[[], Callable[[], object]]], rounds: int) -> dict[K, list[float]]:
    """Seconds of each work in each round. A work makes ready and returns the call that is timed.

    Every round runs all of them, beginning with another one each time: what else the machine does falls on all alike.
    """
    seconds: dict[K, list[float]] = {key: [] for key in works}
    keys = list(works)
    for number in range(rounds):
        first = number % len(keys)
        for key in keys[first:] + keys[:first]:
            call = works[key]()
            start = _clock()
            call()
            seconds[key].append(_clock() - start)
    return seconds


def _clock() -> float:
    """Seconds on a clock, once the accelerator has done all that it was asked to."""
    if best_device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- before anything is loaded ---------------------------------------------------------------------------------------


def _names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """What the rows call the models: their names, or the shortest ends of their paths where names are alike."""
    parts = [path.resolve().parts[1:] for path in paths]
    if len(set(parts)) < len(parts):
        raise SettingError("a model is named twice", where="bench", next="name each once")
    found, length = list(names), 1
    while len(set(found)) < len(found):
        length += 1
        found = [
            name if names.count(name) == 1 else "/".join(part[-length:])
            for name, part in zip(names, parts, strict=True)
        ]
    return found


def _check_room(checkpoints: Sequence[Checkpoint], settings: BenchSettings) -> None:
    """Refuse what memory cannot hold: all models with their caches, at the largest context and batch."""
    item, context, batch = DTYPE_BYTES[settings.dtype], max(settings.context), max(settings.batch)
    tokens = context + settings.new_tokens
    caches = sum(
        grouped_cache(each.shape).bytes(tokens, batch=batch, itemsize=item, encoder_tokens=context)
        for each in checkpoints
    )
    if settings.memory is not None:
        for each in checkpoints:
            if not _largest_batch(each, context, settings):
                raise SettingError(
                    f"not one sequence of {context:,} tokens fits beside the weights of {each.name}",
                    where="bench",
                    got=f"memory {size(settings.memory)}",
                    next="give more memory, or choose a smaller context",
                )
        caches = max(caches, len(checkpoints) * settings.memory)
    needed = COPIES * caches + item * sum(each.shape.parameters for each in checkpoints)
    gpu = best_device() == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else processor_memory()
    if needed > memory:
        raise SettingError(
            "models and caches do not fit in memory",
            where="bench",
            got=f"{size(needed)} at {context:,} tokens x {batch}",
            allowed=size(memory),
            next="choose a smaller context or batch, or dtype bfloat16",
        )


def _largest_batch(checkpoint: Checkpoint, context: int, settings: BenchSettings) -> int:
    """Sequences whose cache fits into the memory that was given, beside the weights."""
    item = DTYPE_BYTES[settings.dtype]
    room = (settings.memory or 0) - checkpoint.shape.parameters * item
    cache = grouped_cache(checkpoint.shape)
    return max(0, room // cache.bytes(context + settings.new_tokens, itemsize=item, encoder_tokens=context))


def _other_bytes(row: Mapping[str, Any], path: Path) -> KvfoldError:
    return KvfoldError(
        "the cache holds other bytes than the plan says, which is a bug",
        where=f"{row['model']}, {row['cache']} cache, {row['context']:,} tokens x {row['batch']}",
        got=f"{row['cache_bytes']:,}",
        allowed=f"{row['predicted_cache_bytes']:,}",
        next=f"report it with {path}",
    )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Contender:
    """One model with one kind of cache."""

    name: str
    checkpoint: Checkpoint
    model: Any
    fp8: bool = False
    kernel: str = hf.ATTENTION  # of the step that decodes; prompts are read with kvfold's
    held: Any = None  # the cache after the prompts; decoding goes into forks of it
    live: Any = None  # the last of these forks
    encoded_BSD: Tensor | None = None  # what an encoder made of the prompts

    @property
    def spec(self) -> CacheSpec:
        return grouped_cache(self.checkpoint.shape)

    @property
    def cache(self) -> hf.CacheKind:
        """A static cache spares each step the copy of all that is cached; with a window it rolls, and copies too."""
        windowed = any(each.window for site, each in self.checkpoint.shape.sites.items() if site.kind == "self")
        return "fp8" if self.fp8 else "growing" if windowed else "static"

    @property
    def paired(self) -> bool:
        """Does an encoder read the prompts? The decoder then begins with one token of its own."""
        return self.checkpoint.family.encoder_decoder

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those that compute what it is: no sdpa has a soft cap, and T5's own eager attention cannot share heads."""
        if any(site.softcap is not None for site in self.checkpoint.shape.sites.values()):
            return hf.ATTENTION, "eager"
        return KERNELS[:-1] if self.paired else KERNELS

    def predicted_bytes(self, context: int, new_tokens: int, batch: int, dtype: str) -> int:
        """What the plan promises; an fp8 cache adds a float32 scale for the keys and one for the values of a layer."""
        tokens = (1 if self.paired else context) + new_tokens
        if self.fp8:
            return self.spec.bytes(tokens, batch=batch, itemsize=1) + 4 * len(self.spec.slots)
        return self.spec.bytes(tokens, batch=batch, itemsize=DTYPE_BYTES[dtype], encoder_tokens=context)

    def roofline(self, context: int, batch: int, dtype: str, new_tokens: int) -> float:
        """Seconds that one decode step takes at least on this machine."""
        tied = self.checkpoint.family.tied(self.checkpoint.config)
        shape = self.checkpoint.shape
        own, read = (new_tokens, context) if self.paired else (context, 0)
        step = decode_step(shape, self.spec, context=own, batch=batch, dtype=dtype, tied=tied, encoder_context=read)
        if self.fp8:
            step = replace(step, cache_bytes=step.cache_bytes / DTYPE_BYTES[dtype])
        return step.seconds(hardware("local"), dtype)

    def prefill(self, ids_BS: Tensor, new_tokens: int) -> Callable[[], object]:
        """Make ready to read the prompts into a new cache with room for so many new tokens."""
        self.held = self.live = self.encoded_BSD = None  # their memory is needed
        self.model.set_attn_implementation(hf.ATTENTION)
        self.held = hf.new_cache(self.model, self.cache, (1 if self.paired else ids_BS.shape[1]) + new_tokens)
        if not self.paired:
            return lambda: hf.read(self.model, ids_BS, self.held)

        def both() -> None:
            self.encoded_BSD = hf.encode(self.model, ids_BS)
            hf.read(self.model, torch.zeros_like(ids_BS[:, :1]), self.held, self.encoded_BSD)

        return both

    def decode(self, ids_BN: Tensor) -> Callable[[], object]:
        """Make ready to decode these tokens, one column after the other, from the prompts on."""
        self.model.set_attn_implementation(self.kernel)
        self.live = hf.fork(self.held)

        def steps() -> None:
            for n in range(ids_BN.shape[1]):
                hf.read(self.model, ids_BN[:, n : n + 1], self.live, self.encoded_BSD)

        return steps


def _metrics(checkpoints: Mapping[str, Checkpoint], settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    """Rows and ratios of every context and batch, with the seconds of every round."""
    contenders = []
    for name, each in checkpoints.items():
        contenders.append(_Contender(name, each, hf.load(each.path, dtype=settings.dtype, device=best_device())))
    notes = _with_fp8(contenders) if settings.fp8 else []
    beyond = _beyond(list(checkpoints.values()), settings)
    draw = torch.Generator().manual_seed(settings.seed)
    vocabulary = min(each.shape.vocab_size for each in checkpoints.values())
    places = list(dict.fromkeys(product(settings.context, settings.batch)))
    progress.start("bench", sum(context * batch for context, batch in places), "tokens")
    rows, seconds = [], []
    try:
        for context, batch in places:
            shape = (batch, context + settings.new_tokens)
            ids_BT = torch.randint(vocabulary, shape, generator=draw).to(best_device())
            found, raw = _place(contenders, ids_BT, settings)
            rows += found
            seconds += raw
            progress.advance(context * batch, f"{context:,} tokens x {batch}")
        largest: Rows = []
        for context in settings.context if settings.memory is not None else ():
            largest += _at_largest([each for each in contenders if not each.fp8], context, vocabulary, settings, draw)
    finally:
        progress.stop()
    return {
        "rows": rows,
        "ratios": _ratios(contenders, rows, settings),
        "largest": largest,
        "bytes_as_predicted": all(row["cache_bytes"] == row["predicted_cache_bytes"] for row in [*rows, *largest]),
        "beyond_positions": bool(beyond),
        "bandwidth": hardware("local").bandwidth,
        "notes": [*notes, *beyond, *_sharing(contenders)],
        "seconds": seconds,
    }


def _with_fp8(contenders: list[_Contender]) -> list[str]:
    """Put the teacher with an fp8 cache after the teacher, where transformers has one; else say why not."""
    quantised = replace(contenders[0], fp8=True)
    try:
        hf.new_cache(quantised.model, quantised.cache, 1)
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


def _sharing(contenders: Sequence[_Contender]) -> list[str]:
    """What must be said of students whose layers share."""
    told = {}
    for each in contenders:
        shape = each.checkpoint.shape
        reading = sum(each.source is not None and each.kept is None for each in shape.sites.values())
        if reading:
            told[each.name] = (
                f"{each.name}: {reading} of {shape.num_layers} layers read the cache of another; fewer bytes are held, "
                "as many are read in a step, which gets no faster at the same batch"
            )
    return list(told.values())


Rows = list[dict[str, Any]]


def _place(contenders: Sequence[_Contender], ids_BT: Tensor, settings: BenchSettings) -> tuple[Rows, Rows]:
    """One row for each contender at one context and batch, and the seconds of every round behind it."""
    batch = len(ids_BT)
    prompts_BS, ids_BN = ids_BT[:, : -settings.new_tokens], ids_BT[:, -settings.new_tokens :]
    context = prompts_BS.shape[1]
    prefill = _time_prefill(contenders, prompts_BS, settings.new_tokens, settings.repeats)
    for each in contenders:
        each.kernel = _fastest_kernel(each, ids_BN)
    decode = interleave({each: partial(each.decode, ids_BN) for each in contenders}, settings.repeats)
    rows, raw = [], []
    for each in contenders:
        times = decode[each]
        step = statistics.median(times) / settings.new_tokens
        where = {"model": each.name, "cache": "fp8" if each.fp8 else "native", "context": context, "batch": batch}
        rows.append(
            where
            | {
                "cache_bytes": hf.live_cache_bytes(each.live),
                "predicted_cache_bytes": each.predicted_bytes(context, settings.new_tokens, batch, settings.dtype),
                "prefill_s": statistics.median(prefill[each]),
                "decode_s_per_token": step,
                "tokens_per_s": batch / step,
                "kernel": each.kernel if each.fp8 else f"{each.kernel}, {each.cache} cache",
            }
        )
        raw.append(where | {"prefill": prefill[each], "decode": times})
        each.held = each.live = each.encoded_BSD = None
    return rows, raw


def _time_prefill(
    contenders: Sequence[_Contender], prompts_BS: Tensor, new_tokens: int, repeats: int
) -> dict[_Contender, list[float]]:
    """Seconds of reading the prompts, in turns: in every round, or once where it takes longer than `QUICK`."""
    for each in contenders:
        each.prefill(prompts_BS[:, :8], new_tokens)()  # the first call of all loads and allocates
    works = {each: partial(each.prefill, prompts_BS, new_tokens) for each in contenders}
    seconds = interleave(works, 1)
    if max(times[0] for times in seconds.values()) < QUICK:
        seconds = interleave(works, repeats)
    return seconds


def _at_largest(
    contenders: Sequence[_Contender], context: int, vocabulary: int, settings: BenchSettings, draw: torch.Generator
) -> Rows:
    """Each contender with as many sequences as its memory holds, in turns: decode time and throughput."""
    room, works, batches = context + settings.new_tokens, {}, {}
    for each in contenders:
        batch = _largest_batch(each.checkpoint, context, settings)
        ids_BT = torch.randint(vocabulary, (batch, room), generator=draw).to(best_device())
        read = each.prefill(ids_BT[:, :context], settings.new_tokens)  # makes the cache
        if each.paired:
            read()
        else:  # so many prompts are read piece by piece
            for prompts_BN in torch.split(ids_BT[:, :context], PIECE, dim=1):
                hf.read(each.model, prompts_BN, each.held)
        each.kernel = _fastest_kernel(each, ids_BT[:, context:])
        works[each], batches[each] = partial(each.decode, ids_BT[:, context:]), batch
    seconds = interleave(works, settings.repeats)
    rows = []
    for each in contenders:
        step = statistics.median(seconds[each]) / settings.new_tokens
        rows.append(
            {
                "model": each.name,
                "cache": "native",
                "context": context,
                "memory": settings.memory,
                "batch": batches[each],
                "cache_bytes": hf.live_cache_bytes(each.live),
                "predicted_cache_bytes": each.predicted_bytes(
                    context, settings.new_tokens, batches[each], settings.dtype
                ),
                "decode_s_per_token": step,
                "tokens_per_s": batches[each] / step,
                "kernel": f"{each.kernel}, {each.cache} cache",
                "seconds": seconds[each],
            }
        )
        each.held = each.live = each.encoded_BSD = None
    return rows


def _fastest_kernel(contender: _Contender, ids_BN: Tensor) -> str:
    """The kernel with the fastest step after the prompts, of a few steps of each, taking turns; it also warms up."""

    def ready(kernel: str) -> Callable[[], object]:
        contender.kernel = kernel
        return contender.decode(ids_BN[:, :1])

    seconds = interleave({kernel: partial(ready, kernel) for kernel in contender.kernels}, TRIALS)
    return min(contender.kernels, key=lambda kernel: min(seconds[kernel]))


def _ratios(contenders: Sequence[_Contender], rows: Rows, settings: BenchSettings) -> Rows:
    """How many times faster and smaller than the teacher, beside the speed-up that the roofline allows."""
    found = []
    for at in range(0, len(rows), len(contenders)):
        first, *others = rows[at : at + len(contenders)]
        place = (first["context"], first["batch"], settings.dtype, settings.new_tokens)
        for each, row in zip(contenders[1:], others, strict=True):
            found.append(
                {key: row[key] for key in ("model", "cache", "context", "batch")}
                | {
                    "cache_ratio": row["cache_bytes"] / first["cache_bytes"],
                    "decode_speedup": first["decode_s_per_token"] / row["decode_s_per_token"],
                    "roofline_speedup": contenders[0].roofline(*place) / each.roofline(*place),
                    "prefill_speedup": first["prefill_s"] / row["prefill_s"],
                }
            )
    return found
