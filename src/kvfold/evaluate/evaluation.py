"""Quality in numbers: loss on held-out text, distance to the teacher, recall, lm-eval tasks, samples, and a gate.

`scores` says what loss, KL and agreement are, `probes` what copy loss and pass keys are, `gate` how thresholds read.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvfold import hf
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import known_length, root_teacher, steps_since_root, vocabulary_difference
from kvfold.disk.output import fingerprint, read_json
from kvfold.disk.record import Record
from kvfold.errors import CheckpointError, DataError, GateMissed, SettingError, choices
from kvfold.evaluate import encoder_decoder, gate, probes
from kvfold.evaluate import loss as loss_of
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.settings import MOST, SEEDS, check_range
from kvfold.text.pairs import Corpus, corpus
from kvfold.text.tokens import token_file

DEFAULT_LENGTH = 1024
BEAMS = 1024  # at most: each has a cache of its own
TRIALS = 1_000_000  # at most: all of them are drawn before the first is asked
OF_PAIRS = ("beams", "answers", "answer_tokens")  # settings that say nothing about a decoder alone
_ASKED = {
    **dict.fromkeys(("copy_loss", "copy_gain"), "copy_distances"),
    **dict.fromkeys(("passkey", "passkey_loss"), "passkey_contexts"),
}


@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure, on which text, and what must hold."""

    data: str = field(metadata={"help": "Held-out text: a file, a folder, a hub data set, stdlib:heldout."})
    tokens: int = field(default=65_536, metadata={"help": "Tokens of the text that count, from its beginning."})
    sequence_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a window; by default what the models were trained on, at most 1024."},
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from window to window; by default a whole window, so none overlap."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows of one forward pass."})
    copy_distances: tuple[int, ...] = field(
        default=(16, 64, 128), metadata={"help": "Tokens between a random span and its repetition."}
    )
    copy_trials: int = field(default=64, metadata={"help": "Spans for each distance."})
    passkey_contexts: tuple[int, ...] = field(
        default=(), metadata={"help": "Lengths in tokens of texts that hide a number; small models fail all."}
    )
    passkey_trials: int = field(default=32, metadata={"help": "Numbers hidden for each context."})
    samples: int = field(default=3, metadata={"help": "Prompts that student and teacher go on from, greedily."})
    sample_tokens: int = field(default=48, metadata={"help": "Tokens that they write."})
    fp8: bool = field(default=True, metadata={"help": "Measure the loss with an fp8 cache too: would a flag do?"})
    beams: tuple[int, ...] = field(
        default=(1, 4), metadata={"help": "Numbers of beams with which an encoder-decoder answers pairs; 1 is greedy."}
    )
    answers: int = field(default=256, metadata={"help": "Pairs that it answers, from the beginning; 0 for none."})
    answer_tokens: int = field(default=64, metadata={"help": "Tokens of an answer, at most."})
    lm_eval: tuple[str, ...] = field(default=(), metadata={"help": "Tasks of lm-eval."})
    lm_eval_tasks_dir: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Documents of each task; by default all."})
    gate: str | None = field(
        default=None, metadata={"help": "What must hold, as in 'loss<=teacher+0.05, agreement>=0.8'; else exit 3."}
    )
    control: str | None = field(
        default=None, metadata={"help": "Record of the control's evaluation, for gates that name it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the probes."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What the models compute in."}
    )

    def __post_init__(self) -> None:
        """Refuse what no model could do, with SettingError, before anything is loaded."""
        least = {"sequence_length": 1, "stride": 1, "tokens": 1, "batch_size": 1, "copy_trials": 1, "samples": 0}
        least |= {"passkey_trials": 1, "sample_tokens": 1, "lm_eval_limit": 1, "answers": 0, "answer_tokens": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise SettingError(f"{name} must be at least {smallest}", where="evaluate", got=value)
        if any(distance < 0 for distance in self.copy_distances):
            raise SettingError("copy_distances must not be negative", where="evaluate", got=self.copy_distances)
        check_range(self, "evaluate", 1, BEAMS, "beams")
        check_range(self, "evaluate", 1, MOST, "sequence_length", "stride", "batch_size", "passkey_contexts")
        check_range(self, "evaluate", 0, MOST, "copy_distances", "sample_tokens", "answer_tokens")
        check_range(self, "evaluate", 0, TRIALS, "copy_trials", "passkey_trials", "samples")
        check_range(self, "evaluate", 0, SEEDS - 1, "seed")
        if self.lm_eval_tasks_dir is not None and not self.lm_eval:
            raise SettingError("lm_eval_tasks_dir needs tasks", where="evaluate", next="name them with lm_eval")
        measured: dict[str, tuple[object, ...]] = {
            "copy_loss": self.copy_distances,
            "copy_gain": self.copy_distances,
            "passkey": self.passkey_contexts,
            "passkey_loss": self.passkey_contexts,
            **dict.fromkeys(encoder_decoder.KEYED, self.beams if self.answers else ()),
        }
        for row in gate.parse(self.gate):
            if row.metric in measured and row.key not in [str(value) for value in measured[row.metric]]:
                raise SettingError(
                    f"{row.metric} is not measured at {row.key}",
                    where="gate",
                    got=row.expr,
                    allowed=choices(measured[row.metric]) or None,
                    next=f"add it to {_ASKED.get(row.metric, 'beams')}",
                )
            if row.metric == "lm_eval" and not self.lm_eval:
                raise SettingError("no lm-eval task is measured", where="gate", got=row.expr, next="add it to lm_eval")
            if row.reference == "control" and self.control is None:
                raise SettingError(
                    "the gate names the control, and there is none",
                    where="gate",
                    got=row.expr,
                    next="give the record of its evaluation as control",
                )


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
    """Measure a checkpoint, and beside it its teacher, and write the record.

    The default teacher is the root of the student's lineage, when it lies near the student; without one nothing is
    compared. `row` is what a table says of this model; it is kept with the settings. A record of the same inputs is
    returned as it is unless `overwrite`.

    Raises SettingError, CheckpointError (also for different vocabularies), DataError or OutputError before anything
    is measured, and GateMissed after the record is written.
    """
    began = time.monotonic()
    model = Checkpoint.open(student)
    other = teacher_of(model, teacher, progress)
    settings = _resolve(settings, model, other)
    control = _control(settings)
    record.check_folder(Path(records))
    text = _read(settings, model, progress)
    hashes = {
        "student": model.hash(progress),
        "teacher": other.hash(progress) if other else None,
        "data": text.hash,
        "tokens": text.tokens_hash,
        "control": None if control is None else fingerprint(control),
    }
    _same_text(settings, control, hashes)
    name = name or model.path.resolve().name
    kept = {key: value for key, value in asdict(settings).items() if text.corpus or key not in OF_PAIRS}
    identity = {
        **kept,
        "student": str(student),
        "teacher": None if other is None else other.name,
        "row": dict(row or {}),
    }
    path = record.path_of(records, "evaluate", name, identity)
    record.check_replaceable(path)
    made = None if overwrite else record.existing(path, hashes)
    if made is not None:
        progress.say(f"{path}: measured already")
    else:
        if text.corpus:
            models = _models(settings, model, other)
            measured = encoder_decoder.measure(models, model.path, text.corpus, progress=progress, **_pairs(settings))
        else:
            measured = _measure(settings, model, other, text.ids_N, progress)
        if steps := steps_since_root(model):
            measured["made_by"] = steps
        made = _make(name, identity, settings, measured, control)
        made = replace(made, hashes=hashes, wall_seconds=round(time.monotonic() - began, 2))
        path = record.write(made, records)
    return _judged(made, path)


@dataclass(frozen=True)
class _Text:
    """What is read: one long row of ids, or the corpus of an encoder-decoder."""

    hash: str
    tokens_hash: str
    ids_N: Tensor
    corpus: Corpus | None = None


def _read(settings: EvaluateSettings, model: Checkpoint, progress: Progress) -> _Text:
    """The text as the model reads it. Raises DataError when there is too little, or tokens it does not know."""
    vocabulary, none = model.shape.vocab_size, torch.empty(0, dtype=torch.int64)
    if model.family.encoder_decoder:
        length = settings.sequence_length or DEFAULT_LENGTH
        pairs = corpus(settings.data, model.path, max_tokens=settings.tokens, progress=progress)
        pairs.check(batch_size=1, length=length, vocab_size=vocabulary)
        return _Text(pairs.hash, fingerprint([pairs.hash, len(pairs), length, settings.seed]), none, pairs)
    tokens = token_file(settings.data, model.path, max_tokens=settings.tokens + 1, progress=progress)
    if len(tokens) < 2:
        raise DataError("the text has no token to predict", where=settings.data, got=f"{len(tokens)} tokens")
    tokens.check(batch_size=1, length=1, vocab_size=vocabulary)
    ids_N = torch.from_numpy(tokens.tokens[: settings.tokens + 1].astype("int64"))
    return _Text(tokens.hash, hashlib.sha256(ids_N.numpy().tobytes()).hexdigest(), ids_N)


# --- before anything is loaded ---------------------------------------------------------------------------------------


def teacher_of(student: Checkpoint, given: str | Path | None, progress: Progress) -> Checkpoint | None:
    """The teacher that was given, or the root of the lineage; None, and said, when that is not to be found."""
    if given is not None:
        return Checkpoint.open(given)
    found = root_teacher(student, progress)
    if found is None and student.root_hash() != student.hash():
        name = (student.lineage or {})["root"]["name"]
        progress.say(f"the teacher {name} is not near the student: nothing is compared with it; give it with --teacher")
    return found


def _resolve(settings: EvaluateSettings, student: Checkpoint, teacher: Checkpoint | None) -> EvaluateSettings:
    """Fill in what depends on the model, and refuse what it cannot do."""
    models = [each for each in (student, teacher) if each is not None]
    difference = None if teacher is None else vocabulary_difference(student, teacher)
    if teacher is not None and difference:
        raise CheckpointError(
            "student and teacher have different vocabularies",
            where=teacher.path,
            got=difference,
            next="compare with the teacher that the student was made from",
        )
    most = min(each.shape.max_positions for each in models)
    length = settings.sequence_length or min(DEFAULT_LENGTH, *map(known_length, models))
    stride = settings.stride or length
    if length > most:
        raise SettingError("sequence_length is more than the model has positions", got=length, allowed=f"1 to {most}")
    if stride > length:
        raise SettingError("stride leaves tokens out between windows", got=stride, allowed=f"1 to {length}")
    for setting, needed, values in (
        ("copy_distances", 2 * probes.SPAN, settings.copy_distances),
        ("passkey_contexts", 0, settings.passkey_contexts),
    ):
        for value in values:
            if value + needed > most:
                raise SettingError(
                    f"{setting}: the model has {most} positions", got=value, allowed=f"to {most - needed}"
                )
    if settings.samples and probes.PROMPT + settings.sample_tokens > most:
        raise SettingError(
            f"the model has {most} positions",
            where="sample_tokens",
            got=settings.sample_tokens,
            allowed=f"1 to {most - probes.PROMPT}",
        )
    if student.family.encoder_decoder and settings.lm_eval:
        raise SettingError("lm-eval is asked of decoders alone", where="evaluate", got=settings.lm_eval)
    for row in gate.parse(settings.gate):
        if row.needs_teacher and teacher is None:
            raise SettingError(
                "the gate compares with a teacher, and there is none", where="gate", got=row.expr, next="give --teacher"
            )
    return replace(settings, sequence_length=length, stride=stride)


def _control(settings: EvaluateSettings) -> dict[str, Any] | None:
    """The control's record, which must hold what the gate asks of it."""
    if settings.control is None:
        return None
    found = read_json(Path(settings.control))
    known, _ = record.parse(found, settings.control)
    if not isinstance(found, dict) or known is None or known.kind != "evaluate":
        raise SettingError("is not the record of an evaluation", where="control", got=settings.control)
    for row in gate.parse(settings.gate):
        if row.reference == "control" and not _holds(known, row):
            raise SettingError(
                "the control's record does not hold what the gate asks for",
                where=settings.control,
                got=row.expr,
                next="evaluate the control with the same settings",
            )
    return found


def _holds(known: Record, row: gate.Threshold) -> bool:
    """Is the metric of a gate's row a number in this record?"""
    try:
        return gate.lookup(known.metrics, row.metric, row.key) is not None
    except (TypeError, ValueError, AttributeError):  # another value, or no mapping where keys are asked for
        return False


def _same_text(settings: EvaluateSettings, control: Mapping[str, Any] | None, hashes: Mapping[str, Any]) -> None:
    """Refuse a control that was measured on other tokens, or in other windows or probes."""
    if control is None:
        return
    differ = [] if control["hashes"].get("tokens") == hashes["tokens"] else ["data"]
    same = ("sequence_length", "stride", "copy_trials", "passkey_trials", "lm_eval_limit", "seed", "dtype")
    differ += [each for each in same if control["settings"].get(each) != getattr(settings, each)]
    if differ:
        raise SettingError(
            f"the control was measured with other {', '.join(differ)}",
            where=settings.control,
            next="evaluate the control with the same settings",
        )


def _find_tasks(settings: EvaluateSettings) -> probes.Harness | None:
    """The tasks of lm-eval, which must have what the gate asks of them."""
    if not settings.lm_eval:
        return None
    found = probes.find_tasks(settings.lm_eval, settings.lm_eval_tasks_dir, settings.lm_eval_limit)
    for row in gate.parse(settings.gate):
        if row.metric != "lm_eval":
            continue
        task, _, metric = (row.key or "").rpartition(".")
        if task not in found.metrics:
            raise SettingError(
                f"task {task!r} is not measured", where="gate", got=row.expr, allowed=choices(found.metrics)
            )
        if metric.partition("/")[0].removesuffix("_stderr") not in found.metrics[task]:
            raise SettingError(
                f"{task} has no metric {metric!r}", where="gate", got=row.expr, allowed=choices(found.metrics[task])
            )
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    settings: EvaluateSettings, student: Checkpoint, teacher: Checkpoint | None, ids_N: Tensor, progress: Progress
) -> dict[str, Any]:
    """Everything but the gate."""
    harness = _find_tasks(settings)
    tokenizer = hf.load_tokenizer(student.path)
    asked = probes.ask(
        tokenizer,
        ids_N,
        copy_distances=settings.copy_distances,
        copy_trials=settings.copy_trials,
        passkey_contexts=settings.passkey_contexts,
        passkey_trials=settings.passkey_trials,
        samples=settings.samples,
        seed=settings.seed,
    )
    models = _models(settings, student, teacher)
    with torch.inference_mode():
        sums = _score(models, ids_N, settings, progress)
        rounded = _score_fp8(models, ids_N, settings, progress) if settings.fp8 else {}
        text_bytes = len(probes.decode(tokenizer, ids_N[1:]).encode())
        own = {who: loss_of.summary(sums, who, text_bytes) for who in models}
        for who, loss in rounded.items():
            own[who]["loss_fp8_cache"] = loss
        for who, model in models.items():
            own[who] |= asked.recall(model, batch_size=settings.batch_size, what=f"{who}: recall", progress=progress)
        without = _without(models["student"], asked, ids_N, settings, progress)
    for who, model in models.items():
        if harness is not None:
            progress.say(f"{who}: lm-eval, {', '.join(harness.tasks)}")
            own[who]["lm_eval"] = harness.run(
                model,
                tokenizer,
                batch_size=settings.batch_size,
                max_length=student.shape.max_positions,
                progress=progress,
            )
    metrics = {
        "tokens": int(sums["tokens"].sum()),
        "windows": len(sums["tokens"]),
        "text_bytes": text_bytes,
        **own["student"],
        **({"without": without} if without else {}),
    }
    if teacher is not None:
        metrics |= {"teacher_loss": own["teacher"]["loss"], **loss_of.distance(sums), "teacher": own["teacher"]}
    if settings.samples:
        metrics["samples"] = probes.side_by_side(models, tokenizer, asked.prompts, settings.sample_tokens)
    return metrics


def _without(
    student: Any, asked: probes.Asked, ids_N: Tensor, settings: EvaluateSettings, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Loss and recall of the student without each part of its attention that it can do without: what is owed to it."""
    found = {}
    for part in hf.removable(student):
        with hf.without(student, part):
            loss = loss_of.summary(_score({"student": student}, ids_N, settings, progress), "student", 1)["loss"]
            recall = asked.recall(
                student, batch_size=settings.batch_size, what=f"without {part}: recall", progress=progress
            )
        found[part] = {"loss": loss, **recall}
    return found


def _models(settings: EvaluateSettings, student: Checkpoint, teacher: Checkpoint | None) -> dict[str, Any]:
    """Student and teacher in memory."""
    there = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    return {who: hf.load(each.path, dtype=settings.dtype, device=best_device()) for who, each in there.items()}


def _pairs(settings: EvaluateSettings) -> dict[str, Any]:
    """What is asked of an encoder-decoder."""
    return {
        "length": settings.sequence_length or DEFAULT_LENGTH,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "beams": settings.beams,
        "count": settings.answers,
        "new_tokens": settings.answer_tokens,
        "samples": settings.samples,
    }


def _score(
    models: Mapping[str, Any], ids_N: Tensor, settings: EvaluateSettings, progress: Progress
) -> dict[str, Tensor]:
    """The sums of each window, as `scores` defines them."""
    return loss_of.score(
        models,
        ids_N,
        length=settings.sequence_length or DEFAULT_LENGTH,
        stride=settings.stride or DEFAULT_LENGTH,
        batch_size=settings.batch_size,
        progress=progress,
    )


def _score_fp8(
    models: Mapping[str, Any], ids_N: Tensor, settings: EvaluateSettings, progress: Progress
) -> dict[str, float]:
    """The loss of each model when its attention reads keys and values rounded to fp8."""
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(hf.with_attention(model, hf.ATTENTION_FP8))
        sums = _score(models, ids_N, settings, progress)
    return {who: float(loss_of.summary(sums, who, 1)["loss"]) for who in models}


# --- the record ------------------------------------------------------------------------------------------------------


def _make(
    name: str,
    identity: Mapping[str, Any],
    settings: EvaluateSettings,
    metrics: dict[str, Any],
    control: Mapping[str, Any] | None,
) -> Record:
    """The record of what was measured, its gate judged; a loss that is not a number is a failure."""
    if not math.isfinite(metrics["loss"]):
        return record.make(
            "evaluate", name, identity, {}, seed=settings.seed, status="failed", error=f"the loss is {metrics['loss']}"
        )
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


def _judged(made: Record, path: Path) -> Record:
    """The record, or the error that its status stands for."""
    if made.status == "failed":
        raise CheckpointError(f"{made.error}", where=made.name, next=f"the weights are damaged; see {path}")
    if made.status == "gate_missed":
        raise GateMissed(f"gate missed: {gate.missed_line(made.metrics['gate']['rows'])}", where=made.name)
    return made
