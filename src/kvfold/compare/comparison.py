"""A teacher, its students and other ways to make it cheaper, measured alike: quality row by row, speed in one run.

Each row is a record of its quality and bytes, so that the same command continues a comparison that stopped. Then all
rows are in memory together and take turns, each with its cache and its fastest kernel. Rows that cannot run say why.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.compare.settings import CompareSettings
from kvfold.compare.variants import MADE, TEACHER, Variant, asked, variants
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.site import DTYPE_BYTES
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import check_apart
from kvfold.disk.record import Record
from kvfold.errors import CheckpointError, SettingError, TrainingError
from kvfold.evaluate import loss, recall
from kvfold.evaluate.bench import COPIES, distinct_names
from kvfold.evaluate.checks import find_tasks, for_models
from kvfold.evaluate.lm_eval import Harness
from kvfold.evaluate.memory import peak_bytes, weight_bytes
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.evaluate.timing import Contender, time_decode, time_prefill
from kvfold.formats import size
from kvfold.machine import best_device, device_memory
from kvfold.progress import SILENT, Progress, task
from kvfold.report.comparison import ROW, TIMES
from kvfold.report.folder import Run
from kvfold.report.page import check_page, render, write_page
from kvfold.settings import differing
from kvfold.text.pairs import check_text
from kvfold.text.tokens import token_file

PAGE = "report.html"


def compare(
    source: str | Path,
    students: Sequence[str | Path] = (),
    settings: CompareSettings = CompareSettings("stdlib:heldout"),
    *,
    out: str | Path | None = None,
    records: str | Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> list[Record]:
    """Compare a checkpoint, its students and the alternatives that the settings name; return the records.

    The first is that of all times, and one of each row's quality follows. `out` is the folder of the page
    (`report.html`), of the models that rows need, and of the records unless `records` names another.
    Raises SettingError, CheckpointError, DataError or OutputError before anything is measured.
    """
    teacher = Checkpoint.open(source)
    if teacher.family.encoder_decoder or teacher.family.audio:
        raise SettingError("compare reads decoders", where=teacher.name, next="use kvfold evaluate and kvfold bench")
    opened = [Checkpoint.open(each) for each in students]
    labels = distinct_names([each.path for each in (teacher, *opened)], [each.name for each in (teacher, *opened)])
    named = dict(zip(labels[1:], opened, strict=True))
    name = name or default_name(teacher.name)
    out = Path(out or Path("runs") / name)
    reads: dict[str, object] = {"source": teacher.path, "data": settings.data, "train_data": settings.train_data}
    reads |= {f"student {label}": student.path for label, student in named.items()}
    for folder in MADE:
        check_apart(out / folder, reads)
    check_page(out / PAGE)
    records = Path(records or out / "records")
    record.check_folder(records)
    for text in (settings.data, settings.train_data):
        if text is not None:
            check_text(text, paired=False)
    evaluation = settings.evaluation
    for model in (teacher, *opened):
        evaluation = for_models(evaluation, model, teacher)
        model.require_finite(progress)
    rows = asked(settings, variants(teacher, named, settings, out, overwrite, progress))
    tests = Tests.of(evaluation, teacher, progress)
    work = _Work(teacher, settings, tests, records, name, overwrite, progress)
    made = [work.row(each) for each in rows]
    made = [work.times(list(zip(rows, made, strict=True))), *made]
    write_page(lambda: render(Run(out, tuple(made), (), {}, None)), out / PAGE)
    return made


def default_name(source: str) -> str:
    """The name of a comparison, from that of its source."""
    return f"compare-{re.sub(r'[^A-Za-z0-9_.-]+', '-', source)}"


@dataclass(frozen=True)
class Tests:
    """What each row is measured by, as `kvfold evaluate` measures it."""

    settings: EvaluateSettings
    tokenizer: Any
    ids_N: Tensor
    hashes: Mapping[str, str]  # of the text and of its tokens
    rows: recall.Recall
    harness: Harness | None
    max_length: int

    @classmethod
    def of(cls, settings: EvaluateSettings, teacher: Checkpoint, progress: Progress) -> Tests:
        """Read the text and find the tasks. Raises DataError or SettingError."""
        tokens = token_file(settings.data, teacher.path, max_tokens=settings.tokens + 1, progress=progress)
        tokens.check(batch_size=1, length=1, vocab_size=teacher.shape.vocab_size)
        ids_N = torch.from_numpy(tokens.tokens[: settings.tokens + 1].astype("int64"))
        tokenizer = hf.load_tokenizer(teacher.path)
        rows = recall.Recall.of(tokenizer, ids_N, settings)
        hashes = {"data": tokens.hash, "tokens": record.identity("tokens", "", {"ids": ids_N.tolist()})}
        return cls(settings, tokenizer, ids_N, hashes, rows, find_tasks(settings), teacher.shape.max_positions)

    @torch.inference_mode()
    def measure(self, model: nn.Module, teacher: nn.Module | None, what: str, progress: Progress) -> dict[str, Any]:
        """Loss, distance to the teacher, recall and tasks of a model; `teacher` is None for the teacher itself."""
        settings, models = self.settings, {"student": model} | ({"teacher": teacher} if teacher is not None else {})
        assert settings.sequence_length is not None
        assert settings.stride is not None
        lengths = {"length": settings.sequence_length, "stride": settings.stride, "batch_size": settings.batch_size}
        progress.say(what)
        sums = loss.score(models, self.ids_N, **lengths, progress=progress)
        found = loss.summary(sums, "student", 0) | (loss.distance(sums) if teacher is not None else {"kl": 0.0})
        found |= self.rows.measure(model, batch_size=settings.batch_size, what="recall", progress=progress)
        if self.harness is not None:
            most, size_of_batch = self.max_length, settings.batch_size
            found["lm_eval"] = self.harness.run(
                model, self.tokenizer, batch_size=size_of_batch, max_length=most, progress=progress
            )
        return found


@dataclass
class _Work:
    """One comparison: its models in memory, and where its records go."""

    teacher: Checkpoint
    settings: CompareSettings
    tests: Tests
    records: Path
    name: str
    overwrite: bool
    progress: Progress
    plain: dict[Path, nn.Module] = field(default_factory=dict)  # unchanged models, by the path of their checkpoint
    models: dict[str, nn.Module] = field(default_factory=dict)  # by row

    def model(self, row: Variant) -> nn.Module:
        """The model of a row. Raises KvfoldError if it cannot be made."""
        if row.name not in self.models:
            self.models[row.name] = row.build(self._loaded)
        return self.models[row.name]

    def _loaded(self, checkpoint: Checkpoint) -> nn.Module:
        if checkpoint.path not in self.plain:
            loaded = hf.load(checkpoint.path, dtype=self.settings.dtype, device=best_device())
            self.plain[checkpoint.path] = loaded
        return self.plain[checkpoint.path]

    def row(self, row: Variant) -> Record:
        """The record of a row's quality and bytes, measured unless it is there; of a row that cannot run, why."""
        began = time.monotonic()
        shown = {"name": row.name, "group": row.group, "about": row.about}
        own, name = {"context": max(self.settings.context), "row": shown}, f"{self.name}/{row.name}"
        where = {**asdict(self.tests.settings), **own}
        identity = record.identity(ROW, name, {**differing(self.tests.settings), **own})
        path = record.path_of(self.records, ROW, name, identity)
        record.check_replaceable(path)
        hashes, metrics, error = dict[str, str | None](self.tests.hashes), dict[str, Any](), None
        try:
            hashes |= {"student": row.checkpoint.hash(), "teacher": self.teacher.hash()}
            kept = None if self.overwrite else record.existing(path, hashes, where)
            if kept is not None:
                return kept
            teacher = None if row.name == TEACHER else self._loaded(self.teacher)
            found = self.tests.measure(self.model(row), teacher, row.name, self.progress)
            if not math.isfinite(found["loss"] + found["kl"]):
                raise SettingError(f"the loss is {found['loss']}, the KL {found['kl']}")
            metrics = {**found, **self._bytes(row), "training_tokens": row.training_tokens}
            if not row.timed:
                del self.models[row.name]
        except (SettingError, CheckpointError, TrainingError) as problem:
            error = problem
            self.progress.say(f"{row.name}: {problem}")
        status: Any = "done" if error is None else "failed"
        more = {"seed": self.settings.seed, "status": status, "error": error and str(error), "identity": identity}
        seconds = round(time.monotonic() - began, 2)
        made = record.make(ROW, name, where, metrics, hashes=hashes, wall_seconds=seconds, **more)
        record.write(made, self.records)
        return made

    def _bytes(self, row: Variant) -> dict[str, float]:
        """Bytes of the weights, and of the cache for each token of the longest context, in the checkpoint's format."""
        shape, context = row.checkpoint.shape, max(self.settings.context)
        itemsize = DTYPE_BYTES[shape.dtype]
        part = 1.0 if row.stored == "native" else hf.DECODED[row.stored][1] / (8 * itemsize)
        cached = grouped_cache(shape).bytes(context, itemsize=itemsize) / context
        return {"weight_bytes": weight_bytes(self.model(row), itemsize), "cache_bytes_per_token": part * cached}

    # --- speed -------------------------------------------------------------------------------------------------------

    def times(self, rows: Sequence[tuple[Variant, Record]]) -> Record:
        """The record of all rows' times and peak memory, in one interleaved run, unless it is there."""
        began, timing = time.monotonic(), self.settings.timing
        running = [(row, made) for row, made in rows if made.status == "done" and row.timed]
        where = {**asdict(timing), "rows": [made.identity for _, made in rows]}
        identity = record.identity(TIMES, self.name, where)
        path = record.path_of(self.records, TIMES, self.name, identity)
        record.check_replaceable(path)
        hashes = {row.name: made.hashes["student"] for row, made in running}
        kept = None if self.overwrite else record.existing(path, hashes, where)
        if kept is not None:
            self.progress.say(f"{path}: measured already")
            return kept
        self._check_room([row for row, _ in running])
        contenders = [
            Contender(row.name, row.checkpoint, self.model(row), timing.dtype, timing.new_tokens, row.stored)
            for row, _ in running
        ]
        metrics = {"rows": self._timed(contenders), "peaks": self._peaks(contenders)}
        seconds = round(time.monotonic() - began, 2)
        known = {"identity": identity, "hashes": hashes, "seed": timing.seed, "wall_seconds": seconds}
        made = record.make(TIMES, self.name, where, metrics, **known)
        record.write(made, self.records)
        return made

    def _timed(self, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
        """One row for each contender, context and batch."""
        timing, rows = self.settings.timing, []
        places = [(context, batch) for context in timing.context for batch in timing.batch]
        with task(self.progress, "speed", sum(context * batch for context, batch in places), "tokens"):
            for context, batch in places:
                ids_BT = self._prompts(context + timing.new_tokens, batch)
                prefill = time_prefill(contenders, ids_BT[:, :context], timing.repeats)
                found, _ = time_decode(dict.fromkeys(contenders, ids_BT), timing.repeats)
                for each, row in zip(contenders, found, strict=True):
                    rows.append(row | {"prefill_s": sorted(prefill[each])[len(prefill[each]) // 2]})
                self.progress.advance(context * batch, f"{context:,} tokens x {batch}")
        return rows

    def _peaks(self, contenders: Sequence[Contender]) -> dict[str, int]:
        """Bytes at the largest moment of reading the longest prompts and decoding one token, weights included."""
        timing, found = self.settings.timing, {}
        ids_BT = self._prompts(max(timing.context) + timing.new_tokens, max(timing.batch))
        for each in contenders:

            def work(each: Contender = each) -> None:
                each.prefill(ids_BT[:, : -timing.new_tokens])()
                each.decode(ids_BT[:, -1:])()

            held = weight_bytes(each.model, DTYPE_BYTES[timing.dtype])
            found[each.name] = held + peak_bytes(work)
            each.release()
        return found

    def _prompts(self, tokens: int, batch: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.settings.seed)
        return torch.randint(self.teacher.shape.vocab_size, (batch, tokens), generator=draw).to(best_device())

    def _check_room(self, rows: Sequence[Variant]) -> None:
        """Refuse what memory cannot hold: all models with their caches, at the largest context and batch."""
        timing = self.settings.timing
        item, tokens = DTYPE_BYTES[timing.dtype], max(timing.context) + timing.new_tokens
        own = {row.name if row.change else row.checkpoint.path: row.checkpoint.shape.parameters for row in rows}
        caches = sum(
            grouped_cache(row.checkpoint.shape).bytes(tokens, batch=max(timing.batch), itemsize=item) for row in rows
        )
        needed, memory = COPIES * caches + item * sum(own.values()), device_memory(best_device())
        if needed > memory:
            raise SettingError(
                "models and caches do not fit in memory together",
                where="compare",
                got=size(needed),
                allowed=size(memory),
                next="choose fewer rows, or a smaller context or batch",
            )
