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

from kvfold import hf
from kvfold.contracts.cache import cached_by
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import root_teacher, steps_since_root
from kvfold.disk.output import fingerprint
from kvfold.disk.record import Record
from kvfold.errors import CheckpointError, DataError, GateMissed
from kvfold.evaluate import encoder_decoder, gate, loss, recall, samples
from kvfold.evaluate.checks import LONGEST, check_same, find_tasks, for_models, read_control
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.settings import differing
from kvfold.text.pairs import Corpus, check_text, corpus
from kvfold.text.tokens import token_file


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
    asked = {**asdict(settings), **compared}
    path = record.path_of(records, "evaluate", name, identity)
    record.check_replaceable(path)
    made = None if overwrite else record.existing(path, hashes, asked)
    if made is not None:
        progress.say(f"{path}: measured already")
    else:
        models = {"student": model} | ({"teacher": other} if other else {})
        metrics = _measure(settings, models, text, progress)
        if steps := steps_since_root(model):
            metrics["made_by"] = steps
        metrics["cache"] = {who: cached_by(each.shape) for who, each in models.items()}
        made = _make(name, asked, settings, metrics, control)
        seconds = round(time.monotonic() - began, 2)
        made = replace(made, hashes=hashes, identity=identity, wall_seconds=seconds)
        path = record.write(made, records)
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
    settings: EvaluateSettings, checkpoints: Mapping[str, Checkpoint], text: _Text, progress: Progress
) -> dict[str, Any]:
    """All metrics. Text and tasks are checked before a model is loaded."""
    path = checkpoints["student"].path
    if text.corpus:
        models = _load(checkpoints, settings)
        length = settings.sequence_length or LONGEST
        return encoder_decoder.measure(models, path, text.corpus, settings, length=length, progress=progress)
    harness = find_tasks(settings)
    tokenizer = hf.load_tokenizer(path)
    rows = _rows(tokenizer, text.ids_N, settings, progress)
    prompts_BT = samples.prompts(text.ids_N, settings.samples) if settings.samples else None
    models = _load(checkpoints, settings)
    text_bytes = len(samples.decode(tokenizer, text.ids_N[1:]).encode())
    metrics = {"text_bytes": text_bytes, **_loss_and_recall(settings, models, text.ids_N, rows, text_bytes, progress)}
    for who, model in models.items():
        if harness is not None:
            progress.say(f"{who}: lm-eval, {', '.join(harness.tasks)}")
            most = checkpoints["student"].shape.max_positions
            own = metrics if who == "student" else metrics["teacher"]
            own["lm_eval"] = harness.run(
                model, tokenizer, batch_size=settings.batch_size, max_length=most, progress=progress
            )
    if prompts_BT is not None:
        metrics["samples"] = samples.side_by_side(models, tokenizer, prompts_BT, settings.sample_tokens)
    return metrics


@torch.inference_mode()
def _loss_and_recall(
    settings: EvaluateSettings,
    models: Mapping[str, Any],
    ids_N: Tensor,
    rows: recall.Recall,
    text_bytes: int,
    progress: Progress,
) -> dict[str, Any]:
    """The metrics of decoders, and of the student without each part of its attention that can be removed."""
    recalled = partial(rows.measure, batch_size=settings.batch_size, progress=progress)
    score = partial(
        loss.score,
        ids_N=ids_N,
        length=settings.sequence_length or LONGEST,
        stride=settings.stride or LONGEST,
        batch_size=settings.batch_size,
        progress=progress,
    )
    sums = score(models)
    own = {who: loss.summary(sums, who, text_bytes) for who in models}
    if settings.fp8:
        with ExitStack() as stack:
            for model in models.values():
                stack.enter_context(hf.with_attention(model, hf.ATTENTION_FP8))
            rounded = score(models)
        for who in models:
            own[who]["loss_fp8_cache"] = loss.summary(rounded, who, 0)["loss"]
    for who, model in models.items():
        own[who] |= recalled(model, what=f"{who}: recall")
    student, without = models["student"], {}
    for part in hf.removable(student):
        with hf.without(student, part):
            lost = loss.summary(score({"student": student}), "student", 0)["loss"]
            without[part] = {"loss": lost, **recalled(student, what=f"without {part}: recall")}
    return loss.metrics(own, sums) | ({"without": without} if without else {})


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
