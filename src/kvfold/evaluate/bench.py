"""What a student gains: live cache bytes against the plan, prefill and decode time over context x batch.

Teacher and students take turns, round by round, so that whatever else the machine does slows all of them; each decodes
with the kernel that was fastest for it in a short trial, and the row names it. The teacher is also measured with an
fp8 cache, the alternative that needs no student. (transformers' own saves bytes, and expands all of them for every
token.) Prompts are random tokens: times do not depend on the text.

Caches are static where no layer has a window, as in serving engines: transformers' growing cache copies itself for
every token, and a speed-up over a teacher that copies more would be an artefact.

Shared layers are read by every layer that shares them: such a student decodes no faster at the same batch. With
`memory`, each model is also timed at the largest batch that fits beside its weights, where fewer bytes become speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.record import Record
from kvfold.errors import KvfoldError, SettingError
from kvfold.evaluate.settings import BenchSettings
from kvfold.evaluate.timing import Contender, Rows, time_decode, time_prefill
from kvfold.formats import size
from kvfold.machine import best_device, device_memory
from kvfold.predict.roofline import hardware
from kvfold.progress import SILENT, Progress, task
from kvfold.settings import differing

PIECE = 64  # tokens of each prompt that are read together at the largest batch
COPIES = 3  # caches' worth of memory that a model needs while it is measured: its own, and what kernels make of it


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
    bytes than the plan predicts.
    """
    if not models:
        raise SettingError("no model to measure", where="bench", next="name the teacher, then its students")
    began = time.monotonic()
    opened = [Checkpoint.open(each) for each in models]
    for each in opened:
        if each.family.audio:
            raise SettingError("bench reads texts, and this model sound", where=each.path, next="kvfold plan counts it")
    checkpoints = dict(
        zip(distinct_names([each.path for each in opened], [each.name for each in opened]), opened, strict=True)
    )
    name = name or "-".join(checkpoints)
    places = {"models": [str(each) for each in models]}
    asked = {**asdict(settings), **places}
    identity = record.identity("bench", name, {**differing(settings), **places})
    path = record.path_of(records, "bench", name, identity)
    record.check_replaceable(path)
    record.check_folder(Path(records))
    hashes: dict[str, str | None] = {label: each.hash(progress) for label, each in checkpoints.items()}
    made = None if overwrite else record.existing(path, hashes, asked)
    if made is not None:
        progress.say(f"{path}: measured already")
        return made
    _check_room(opened, settings)
    with _threads(settings.threads):
        metrics = _measure(checkpoints, settings, progress)
        error = _other_bytes([*metrics["rows"], *metrics["largest"]], path)
        made = record.make(
            "bench",
            name,
            asked,
            {**metrics, "bytes_as_predicted": error is None},
            identity=identity,
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


def _other_bytes(rows: Rows, path: Path) -> KvfoldError | None:
    """The error of the first row whose cache holds other bytes than predicted."""
    wrong = next((row for row in rows if row["cache_bytes"] != row["predicted_cache_bytes"]), None)
    if wrong is None:
        return None
    return KvfoldError(
        "the cache holds other bytes than the plan predicts, which is a bug",
        where=f"{wrong['model']}, {wrong['cache']} cache, {wrong['context']:,} tokens x {wrong['batch']}",
        got=f"{wrong['cache_bytes']:,}",
        allowed=f"{wrong['predicted_cache_bytes']:,}",
        next=f"report it with {path}",
    )


def distinct_names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The models' names in the rows, or the shortest ends of their paths where names are alike."""
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
    caches = sum(batch * _sequence_bytes(each, context, settings) for each in checkpoints)
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
    memory = device_memory(best_device())
    if needed > memory:
        raise SettingError(
            "models and caches do not fit in memory",
            where="bench",
            got=f"{size(needed)} at {context:,} tokens x {batch}",
            allowed=size(memory),
            next="choose a smaller context or batch, or dtype bfloat16",
        )


def _sequence_bytes(checkpoint: Checkpoint, context: int, settings: BenchSettings) -> int:
    """Bytes of the cache of one sequence."""
    tokens, item = context + settings.new_tokens, DTYPE_BYTES[settings.dtype]
    return grouped_cache(checkpoint.shape).bytes(tokens, itemsize=item, encoder_tokens=context)


def _largest_batch(checkpoint: Checkpoint, context: int, settings: BenchSettings) -> int:
    """Sequences whose caches fit into `memory` beside the weights."""
    room = (settings.memory or 0) - checkpoint.shape.parameters * DTYPE_BYTES[settings.dtype]
    return max(0, room // _sequence_bytes(checkpoint, context, settings))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(checkpoints: Mapping[str, Checkpoint], settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    """Rows and ratios of every context and batch, with the seconds of every round."""
    dtype = settings.dtype
    contenders = [
        Contender(name, each, hf.load(each.path, dtype=dtype, device=best_device()), dtype, settings.new_tokens)
        for name, each in checkpoints.items()
    ]
    notes = _with_fp8(contenders) if settings.fp8 else []
    positions = min(each.shape.max_positions for each in checkpoints.values())
    longest = max(settings.context) + settings.new_tokens
    if longest > positions:
        notes += [f"{longest} tokens are more than the {positions} positions of the models: times hold, text would not"]
    draw = torch.Generator().manual_seed(settings.seed)
    vocabulary = min(each.shape.vocab_size for each in checkpoints.values())

    def drawn(batch: int, context: int) -> torch.Tensor:
        return torch.randint(vocabulary, (batch, context + settings.new_tokens), generator=draw).to(best_device())

    places = list(dict.fromkeys(product(settings.context, settings.batch)))
    rows: Rows = []
    ratios: Rows = []
    seconds: Rows = []
    largest: Rows = []
    with task(progress, "bench", sum(context * batch for context, batch in places), "tokens"):
        for context, batch in places:
            found, raw = _place(contenders, drawn(batch, context), settings)
            rows += found
            seconds += raw
            ratios += _ratios(contenders, found)
            progress.advance(context * batch, f"{context:,} tokens x {batch}")
        for context in settings.context if settings.memory is not None else ():
            lots = {}
            for each in contenders:
                if each.stored == "native":
                    lots[each] = drawn(_largest_batch(each.checkpoint, context, settings), context)
                    each.prefill(lots[each][:, :context], piece=PIECE)()
            found, times = time_decode(lots, settings.repeats)
            for row, each_round in zip(found, times, strict=True):
                largest.append(row | {"memory": settings.memory, "seconds": each_round})
    return {
        "rows": rows,
        "ratios": ratios,
        "largest": largest,
        "beyond_positions": longest > positions,
        "bandwidth": hardware("local").bandwidth,
        "notes": [*notes, *_sharing(checkpoints)],
        "seconds": seconds,
    }


def _with_fp8(contenders: list[Contender]) -> list[str]:
    """Insert the teacher with an fp8 cache after the teacher; where transformers has none, return the reason."""
    quantised = replace(contenders[0], stored="fp8")
    try:
        hf.new_cache(quantised.model, quantised.cache, 1)
    except SettingError as error:
        return [f"teacher with an fp8 cache: {error}"]
    contenders.insert(1, quantised)
    return []


def _sharing(checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Notes on students whose layers share."""
    for name, each in checkpoints.items():
        sites = each.shape.sites.values()
        reading = sum(site.source is not None and site.kept is None for site in sites)
        if reading:
            yield (
                f"{name}: {reading} of {each.shape.num_layers} layers read the cache of another; fewer bytes are held, "
                "as many are read in a step, which gets no faster at the same batch"
            )


def _place(contenders: Sequence[Contender], ids_BT: torch.Tensor, settings: BenchSettings) -> tuple[Rows, Rows]:
    """One row for each contender at one context and batch, and the seconds of every round."""
    prefill = time_prefill(contenders, ids_BT[:, : -settings.new_tokens], settings.repeats)
    rows, decode = time_decode(dict.fromkeys(contenders, ids_BT), settings.repeats)
    raw = []
    for each, row, times in zip(contenders, rows, decode, strict=True):
        row["prefill_s"] = statistics.median(prefill[each])
        where = {key: row[key] for key in ("model", "cache", "context", "batch")}
        raw.append(where | {"prefill": prefill[each], "decode": times})
    return rows, raw


def _ratios(contenders: Sequence[Contender], rows: Rows) -> Iterator[dict[str, Any]]:
    """Bytes and speed relative to the teacher at one context and batch, with the speed-up that the roofline allows."""
    teacher, first = contenders[0], rows[0]
    place = first["context"], first["batch"]
    for each, row in zip(contenders[1:], rows[1:], strict=True):
        yield {key: row[key] for key in ("model", "cache", "context", "batch")} | {
            "cache_ratio": row["cache_bytes"] / first["cache_bytes"],
            "decode_speedup": first["decode_s_per_token"] / row["decode_s_per_token"],
            "roofline_speedup": teacher.roofline(*place) / each.roofline(*place),
            "prefill_speedup": first["prefill_s"] / row["prefill_s"],
        }
