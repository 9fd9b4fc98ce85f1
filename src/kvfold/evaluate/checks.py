"""Checks before a model is loaded: settings that do not fit the models, the control or the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import vocabulary_difference
from kvfold.disk.output import read_json
from kvfold.disk.record import Record
from kvfold.errors import CheckpointError, SettingError, choices
from kvfold.evaluate import gate, lm_eval, samples
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.text.copies import SPAN

LONGEST = 1024  # of a window, by default
SAME = ("sequence_length", "stride", "copy_trials", "last_words", "passkey_trials", "lm_eval_limit", "seed", "dtype")


def for_models(settings: EvaluateSettings, student: Checkpoint, teacher: Checkpoint | None) -> EvaluateSettings:
    """The settings with lengths filled in.

    Raises CheckpointError for different vocabularies, and SettingError for what the models cannot do.
    """
    models = [each for each in (student, teacher) if each is not None]
    difference = None if teacher is None else vocabulary_difference(student, teacher)
    if teacher is not None and difference:
        raise CheckpointError(
            "student and teacher have different vocabularies",
            where=teacher.path,
            got=difference,
            next="compare with the teacher that the student was made from",
        )
    length = settings.sequence_length or min(LONGEST, *(model.known_length for model in models))
    stride = settings.stride or length
    most = min(each.shape.max_positions for each in models)
    for setting, values, besides in (
        ("sequence_length", (length,), 0),
        ("copy_distances", settings.copy_distances, 2 * SPAN),
        ("passkey_contexts", settings.passkey_contexts, 0),
        ("sample_tokens", (settings.sample_tokens,) if settings.samples else (), samples.PROMPT),
    ):
        if max(values, default=0) + besides > most:
            raise SettingError(
                f"{setting} is too large for the model's {most} positions",
                got=max(values),
                allowed=f"at most {most - besides}",
            )
    if stride > length:
        raise SettingError("stride skips tokens between windows", got=stride, allowed=f"1 to {length}")
    if student.family.encoder_decoder and settings.lm_eval:
        raise SettingError("lm-eval needs a decoder-only model", where="evaluate", got=settings.lm_eval)
    for row in gate.parse(settings.gate):
        if row.needs_teacher and teacher is None:
            raise SettingError(
                "the gate compares with a teacher, but there is none", where="gate", got=row.expr, next="give --teacher"
            )
    return replace(settings, sequence_length=length, stride=stride)


def read_control(settings: EvaluateSettings) -> dict[str, Any] | None:
    """The JSON of the control's record: the unconverted teacher, trained and evaluated on the same tokens.

    Raises SettingError for another file, and for a record without a metric of the gate.
    """
    if settings.control is None:
        return None
    found = read_json(Path(settings.control))
    known, _ = record.parse(found, settings.control)
    if not isinstance(found, dict) or known is None or known.kind != "evaluate":
        raise SettingError("is not the record of an evaluation", where="control", got=settings.control)
    for row in gate.parse(settings.gate):
        if row.reference == "control" and not _holds(known, row):
            raise SettingError(
                "the control's record lacks a metric of the gate",
                where=settings.control,
                got=row.expr,
                next="evaluate the control with the same settings",
            )
    return found


def _holds(known: Record, row: gate.Threshold) -> bool:
    try:
        return gate.lookup(known.metrics, row.metric, row.key) is not None
    except (TypeError, ValueError, AttributeError):  # not a number, or not a mapping
        return False


def check_same(settings: EvaluateSettings, control: Mapping[str, Any] | None, tokens_hash: str) -> None:
    """Raise SettingError for a control that was measured on other tokens, or in other windows or tests."""
    if control is None:
        return
    differ = [] if control["hashes"].get("tokens") == tokens_hash else ["data"]
    # an older record lacks the settings of metrics that it does not hold
    differ += [
        each for each in SAME if control["settings"].get(each, getattr(settings, each)) != getattr(settings, each)
    ]
    if differ:
        raise SettingError(
            f"the control was measured with other {', '.join(differ)}",
            where=settings.control,
            next="evaluate the control with the same settings",
        )


def find_tasks(settings: EvaluateSettings) -> lm_eval.Harness | None:
    """The tasks of lm-eval. Raises SettingError for a row of the gate whose task or metric they lack."""
    if not settings.lm_eval:
        return None
    found = lm_eval.find_tasks(settings.lm_eval, settings.lm_eval_tasks_dir, settings.lm_eval_limit)
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
