"""Quality in numbers: loss on held-out text, distance to the teacher, recall, lm-eval tasks, samples, and a gate."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import hf, ranks
from kvfold.contracts.cache import cached_by
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import root_teacher, steps_since_root
from kvfold.disk.output import fingerprint
from kvfold.disk.record import Record
from kvfold.disk.record_commit import versions
from kvfold.errors import CheckpointError, DataError, GateMissed
from kvfold.evaluate import encoder_decoder, gate, loss, recall, samples
from kvfold.evaluate.checks import LONGEST, check_same, find_tasks, for_models, read_control
from kvfold.evaluate.finished import Finished
from kvfold.evaluate.lm_eval import Harness
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.machine import best_device, describe
from kvfold.progress import SILENT, Progress
from kvfold.settings import differing
from kvfold.text.pairs import Corpus, check_text, corpus
from kvfold.text.tokens import token_file

TASKS = ("lm_eval", "lm_eval_tasks_dir", "lm_eval_limit", "dtype")
"""Settings on which the scores of tasks depend."""


def evaluate(
    student: str | Path,
    settings: EvaluateSettings,
    *,
    teacher: str | Path | None = None,
    records: str | Path = "records",
    name: str | None = None,
    row: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Record:
    """Measure a checkpoint and its teacher, and write the record.

    The default teacher is the root of the student's lineage, when it lies near the student; without one nothing is
    compared. `row` describes this model in tables; it is kept with the settings. A record of the same inputs is
    returned as it is unless `overwrite`.

    Raises SettingError, CheckpointError (also for different vocabularies), DataError or OutputError before anything
    is measured, and GateMissed after the record is written.
    """
    began = time.monotonic()
    model = Checkpoint.open(student)
    check_text(settings.data, paired=model.family.encoder_decoder)
    record.check_folder(Path(records))
    control = read_control(settings)
    other = teacher_of(model, teacher, progress)
    settings = for_models(settings, model, other)
    text = _read(settings, model, progress)
    check_same(settings, control, text.tokens_hash)
    hashes = {
        "student": model.hash(progress),
        "teacher": other.hash(progress) if other else None,
        "data": text.hash,
        "tokens": text.tokens_hash,
        "control": None if control is None else fingerprint(control),
    }
    name = name or model.path.resolve().name
    compared = {"student": str(student), "teacher": None if other is None else other.name, "row": dict(row or {})}
    identity = record.identity("evaluate", name, {**differing(settings), **compared})
    asked = {**asdict(settings), "gate": gate.recorded(settings.gate), **compared}
    path = record.path_of(records, "evaluate", name, identity)
    record.check_replaceable(path)
    made = None if overwrite else record.existing(path, hashes, asked)
    if made is not None:
        progress.say(f"{path}: measured already")
    else:
        models = {"student": model} | ({"teacher": other} if other else {})
        known = _known_scores(settings, hashes["teacher"], Path(records))
        finished = Finished.beside(path, fingerprint([asked, hashes, versions(), describe()]), overwrite=overwrite)
        before = sum(finished.seconds.values())
        if finished.found:
            progress.say(f"continuing after {', '.join(finished.found)}")
        metrics = _measure(settings, models, text, known, finished, progress)
        if steps := steps_since_root(model):
            metrics["made_by"] = steps
        metrics["cache"] = {who: cached_by(each.shape) for who, each in models.items()}
        made = _make(name, asked, settings, metrics, control)
        seconds = round(before + time.monotonic() - began, 2)
        made = replace(made, hashes=hashes, identity=identity, wall_seconds=seconds)
        path = record.write(made, records)
        finished.remove()
    if made.status == "failed":
        raise CheckpointError(f"{made.error}", where=made.name, next=f"the weights are damaged; see {path}")
    if made.status == "gate_missed":
        raise GateMissed(f"gate missed: {gate.missed_line(made.metrics['gate']['rows'])}", where=made.name)
    return made


def teacher_of(student: Checkpoint, given: str | Path | None, progress: Progress) -> Checkpoint | None:
    """The given teacher, or the root of the lineage; None, with a line of progress, when it is not found."""
    if given is not None:
        return Checkpoint.open(given)
    found = root_teacher(student, progress)
    if found is None and student.root_hash() != student.hash():
        name = (student.lineage or {})["root"]["name"]
        progress.say(f"the teacher {name} is not near the student: nothing is compared with it; give it with --teacher")
    return found


@dataclass(frozen=True)
class _Text:
    """The held-out text: one long row of ids, or the corpus of an encoder-decoder."""

    hash: str
    tokens_hash: str
    ids_N: Tensor
    corpus: Corpus | None = None


def _read(settings: EvaluateSettings, model: Checkpoint, progress: Progress) -> _Text:
    """Read the text with the model's tokenizer. Raises DataError for too little text and for unknown tokens."""
    vocabulary = model.shape.vocab_size
    if model.family.encoder_decoder:
        length = settings.sequence_length or LONGEST
        pairs = corpus(settings.data, model.path, max_tokens=settings.tokens, progress=progress)
        pairs.check(batch_size=1, length=length, vocab_size=vocabulary)
        read = fingerprint([pairs.hash, len(pairs), length, settings.seed])
        return _Text(pairs.hash, read, torch.empty(0, dtype=torch.int64), pairs)
    tokens = token_file(settings.data, model.path, max_tokens=settings.tokens + 1, progress=progress)
    if len(tokens) < 2:
        raise DataError("the text has no token to predict", where=settings.data, got=f"{len(tokens)} tokens")
    tokens.check(batch_size=1, length=1, vocab_size=vocabulary)
    ids_N = torch.from_numpy(tokens.tokens[: settings.tokens + 1].astype("int64"))
    return _Text(tokens.hash, hashlib.sha256(ids_N.numpy().tobytes()).hexdigest(), ids_N)


def _measure(
    settings: EvaluateSettings,
    checkpoints: Mapping[str, Checkpoint],
    text: _Text,
    known: Mapping[str, Any] | None,
    finished: Finished,
    progress: Progress,
) -> dict[str, Any]:
    """All metrics. Text and tasks are checked before a model is loaded; `known` are the teacher's scores of tasks."""
    path = checkpoints["student"].path
    if text.corpus:
        return ranks.everywhere(_measure_pairs, checkpoints, text.corpus, settings, finished, progress=progress)
    harness = find_tasks(settings)
    tokenizer = hf.load_tokenizer(path)
    rows = _rows(tokenizer, text.ids_N, settings, progress)
    prompts_BT = samples.prompts(text.ids_N, settings.samples) if settings.samples else None
    text_bytes = len(samples.decode(tokenizer, text.ids_N[1:]).encode())
    most = checkpoints["student"].shape.max_positions
    tests = _Tests(settings, tokenizer, text.ids_N, rows, harness, most, known, text_bytes, prompts_BT, finished)
    return ranks.everywhere(_measure_text, checkpoints, tests, progress=progress)


def _measure_pairs(
    checkpoints: Mapping[str, Checkpoint],
    read: Corpus,
    settings: EvaluateSettings,
    finished: Finished,
    *,
    progress: Progress,
) -> dict[str, Any]:
    """The metrics of encoder-decoders, on all ranks."""
    models, path = _load(checkpoints, settings), checkpoints["student"].path
    length = settings.sequence_length or LONGEST
    return encoder_decoder.measure(models, path, read, settings, finished, length=length, progress=progress)


def _measure_text(checkpoints: Mapping[str, Checkpoint], tests: _Tests, *, progress: Progress) -> dict[str, Any]:
    """The metrics of decoders, on all ranks."""
    tests, models = replace(tests, progress=progress), _load(checkpoints, tests.settings)
    metrics = {"text_bytes": tests.text_bytes, **tests.measure(models)}
    if tests.prompts_BT is not None and ranks.current().main:
        count = tests.settings.sample_tokens
        metrics["samples"] = samples.side_by_side(models, tests.tokenizer, tests.prompts_BT, count)
    return metrics


@dataclass(frozen=True)
class _Tests:
    """What decoders are measured by."""

    settings: EvaluateSettings
    tokenizer: Any
    ids_N: Tensor
    rows: recall.Recall
    harness: Harness | None
    max_length: int
    known: Mapping[str, Any] | None  # scores that the teacher has of these tasks
    text_bytes: int
    prompts_BT: Tensor | None  # of samples
    finished: Finished
    progress: Progress = SILENT

    @torch.inference_mode()
    def measure(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """Loss, recall and tasks of every model; a model alone is measured with quantised caches too.

        A student is also measured without each part of its attention that can be removed.
        """
        sums = self._score(models, "loss")
        own = {who: loss.summary(sums, who, self.text_bytes) | self._rest(model, who) for who, model in models.items()}
        student = models["student"]
        if self.settings.fp8 and len(models) == 1:
            quantised = {name: self._quantised(student, name) for name in hf.QUANTISED}
            own["student"] |= {"loss_fp8_cache": quantised["fp8"]["loss"], "quantised_cache": quantised}
        elif self.settings.fp8:
            with ExitStack() as stack:
                for model in models.values():
                    stack.enter_context(hf.with_attention(model, hf.QUANTISED["fp8"][0]))
                rounded = self._score(models, "fp8 cache: loss")
            for who in models:
                own[who]["loss_fp8_cache"] = loss.summary(rounded, who, 0)["loss"]
        without = {}
        for part in hf.removable(student):
            with hf.without(student, part):
                without[part] = {**self._loss(student, f"without {part}"), **self._recall(student, f"without {part}")}
        return loss.metrics(own, sums) | ({"without": without} if without else {})

    def _quantised(self, model: Any, name: str) -> dict[str, Any]:
        """The same of a model over a quantised cache, with the bits of a cached number."""
        attention, bits = hf.QUANTISED[name]
        with hf.with_attention(model, attention):
            return {"bits": bits, **self._loss(model, f"{name} cache"), **self._rest(model, f"{name} cache")}

    def _score(self, models: Mapping[str, Any], name: str) -> dict[str, Tensor]:
        settings = self.settings
        length, stride = settings.sequence_length or LONGEST, settings.stride or LONGEST
        sizes = {"length": length, "stride": stride, "batch_size": settings.batch_size}
        score = partial(loss.score, models, self.ids_N, **sizes, progress=self.progress)
        return self.finished.sums(name, score)

    def _loss(self, model: Any, who: str) -> dict[str, Any]:
        return {"loss": loss.summary(self._score({"student": model}, f"{who}: loss"), "student", 0)["loss"]}

    def _recall(self, model: Any, who: str) -> dict[str, Any]:
        what, batch_size = f"{who}: recall", self.settings.batch_size
        measure = partial(self.rows.measure, model, batch_size=batch_size, what=what, progress=self.progress)
        found: dict[str, Any] = self.finished.once(what, measure)
        return found

    def _rest(self, model: Any, who: str) -> dict[str, Any]:
        """Recall and tasks."""
        found = self._recall(model, who)
        if self.harness is None:
            return found
        if who == "teacher" and self.known:
            return {**found, "lm_eval": self.known}
        run = partial(self._tasks, self.harness, model, who)
        return {**found, "lm_eval": self.finished.once(f"{who}: lm-eval", run)}

    def _tasks(self, harness: Harness, model: Any, who: str) -> dict[str, Any]:
        self.progress.say(f"{who}: lm-eval, {', '.join(harness.tasks)}")
        batch_size, most = self.settings.batch_size, self.max_length
        return harness.run(model, self.tokenizer, batch_size=batch_size, max_length=most, progress=self.progress)


def _known_scores(settings: EvaluateSettings, teacher: str | None, records: Path) -> Mapping[str, Any] | None:
    """The teacher's scores of the same tasks from a record beside this one: they take as long as the student's."""
    alike = {each: getattr(settings, each) for each in TASKS}
    for each in record.read_all(records) if teacher and settings.lm_eval else ():
        same = fingerprint({key: each.settings.get(key) for key in TASKS}) == fingerprint(alike)
        if same and each.kind == "evaluate" and each.hashes.get("student") == teacher and each.metrics.get("lm_eval"):
            return dict(each.metrics["lm_eval"])
    return None


def _rows(tokenizer: Any, ids_N: Tensor, settings: EvaluateSettings, progress: Progress) -> recall.Recall:
    """The rows of recall. Raises DataError when the gate names last words and the text has none that qualify."""
    rows = recall.Recall.of(tokenizer, ids_N, settings)
    count = 0 if rows.last_words is None else len(rows.last_words.answers)
    for row in gate.parse(settings.gate):
        if gate.METRICS[row.metric][1] == "last_words" and not count:
            raise DataError(
                "no passage of the text ends in a rare word that it contains before",
                where=settings.data,
                got=f"{len(ids_N):,} tokens, gate {row.expr}",
                next="evaluate on more text",
            )
    if count < settings.last_words:
        progress.say(f"{count} of {settings.last_words} last-word questions: the text has no more")
    return rows


def _load(checkpoints: Mapping[str, Checkpoint], settings: EvaluateSettings) -> dict[str, Any]:
    """Student and teacher in memory."""
    return {who: hf.load(each.path, dtype=settings.dtype, device=best_device()) for who, each in checkpoints.items()}


def _make(
    name: str,
    identity: Mapping[str, Any],
    settings: EvaluateSettings,
    metrics: dict[str, Any],
    control: Mapping[str, Any] | None,
) -> Record:
    """The record with its gate judged; a loss that is not a number is a failure."""
    if not math.isfinite(metrics["loss"]):
        error = f"the loss is {metrics['loss']}"
        return record.make("evaluate", name, identity, {}, seed=settings.seed, status="failed", error=error)
    rows = [
        threshold.judge(metrics, metrics.get("teacher"), (control or {}).get("metrics"))
        for threshold in gate.parse(settings.gate)
    ]
    passed = all(row["passed"] for row in rows)
    if rows:
        metrics["gate"] = {"passed": passed, "rows": rows}
    return record.make(
        "evaluate", name, identity, metrics, seed=settings.seed, status="done" if passed else "gate_missed"
    )
