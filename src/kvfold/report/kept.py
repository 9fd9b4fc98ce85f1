"""What is kept, per byte: loss, recall and tasks of each student beside its teacher with a quantised cache.

The share of a task that a student keeps is stated above chance: (student - chance) / (teacher - chance).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.report.names import short_names
from kvfold.report.rows import Row, Study, number, spread
from kvfold.report.tables import NONE, Table, cell, headline_place, part_of

CHANCE: Mapping[str, tuple[str, float]] = {  # part of a task's name -> the task, and the accuracy of guessing
    "lambada": ("LAMBADA", 0.0),
    "arc_easy": ("ARC-Easy", 0.25),
    "arc_challenge": ("ARC-Challenge", 0.25),
    "piqa": ("PIQA", 0.5),
    "hellaswag": ("HellaSwag", 0.25),
    "winogrande": ("WinoGrande", 0.5),
    "openbookqa": ("OpenBookQA", 0.25),
    "sciq": ("SciQ", 0.25),
    "boolq": ("BoolQ", 0.5),
}
ABOUT = (
    "Loss in nats per token. Last word: how often greedy decoding gives a rare word that the text contains before. "
    "Copy gain: by how many nats a span is easier the second time, by its distance. Kept: the share of the teacher's "
    "accuracy above chance; ± is the standard error of the questions. The same bytes, quantised: the loss of the "
    "teacher with the better of those caches (fp8, llama.cpp's q4_0) that take no more bytes than the student's."
)
Score = tuple[float, float]
"""An accuracy or a share, with its standard error."""


def kept(study: Study) -> Table | None:
    """One line for the teacher, for each of its quantised caches and for each row; None without recall or tasks."""
    everyone = shown(study)
    tasks = tasks_of(everyone)
    distances = sorted({int(key) for row in everyone for key in row.keyed("copy_gain")})
    if not tasks and not distances and not any(row.metric("last_word") for row in everyone):
        return None
    lines = [
        {
            "model": name,
            **_size(row),
            "loss": cell(row.metric("loss"), 3),
            "last word": percent(last_word(row)),
            **{f"copy gain over {key:,}": cell(row.keyed("copy_gain").get(str(key)), 2) for key in distances},
            **_tasks(study, row, tasks),
            **_speed(study, row),
            "the same bytes, quantised": _quantised(study, row),
        }
        for row, name in zip(everyone, names(study), strict=True)
    ]
    columns = [key for key in lines[0] if key == "model" or any(line[key] != NONE for line in lines)]
    return columns, [[line[key] for key in columns] for line in lines]


def shown(study: Study) -> list[Row]:
    """The teacher, the teacher with quantised caches, the controls, and the students before and after training."""
    return [*([study.teacher, *study.teacher.quantised] if study.teacher else []), *_others(study)]


def _others(study: Study) -> list[Row]:
    return sorted([*study.rows, *study.converted], key=lambda row: row.place)


def names(study: Study) -> list[str]:
    """A short name for each row that is shown."""
    if study.teacher is None:
        return short_names(_others(study))
    first, *rest = short_names([study.teacher, *_others(study)])
    return [first, *(f"teacher, {row.cached} cache" for row in study.teacher.quantised), *rest]


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The tasks with an accuracy and a known chance, in the order of `CHANCE`."""
    known = {task for row in rows for record in row.records for task in record.metrics.get("lm_eval") or {}}
    found = [task for task in sorted(known) if _chance(task) and any(accuracy(row, task) for row in rows)]
    return sorted(found, key=lambda task: list(CHANCE.values()).index(_chance(task) or ("", 0.0)))


def title(task: str) -> str:
    """The name of a task as people write it."""
    return (_chance(task) or (task, 0.0))[0]


def _chance(task: str) -> tuple[str, float] | None:
    return next((found for part, found in CHANCE.items() if part in task), None)


def accuracy(row: Row, task: str) -> Score | None:
    """Accuracy on a task over seeds, which ask the same questions: the standard error is that of one seed."""
    found: list[Mapping[str, Any]] = [(record.metrics.get("lm_eval") or {}).get(task) or {} for record in row.records]
    return _score([each.get("acc") for each in found], [each.get("acc_stderr") for each in found])


def last_word(row: Row) -> Score | None:
    """Accuracy on last words over seeds, which ask the same questions."""
    found = [record.metrics for record in row.records]
    return _score([each.get("last_word") for each in found], [each.get("last_word_stderr") for each in found])


def _score(values: Sequence[Any], errors: Sequence[Any]) -> Score | None:
    mean, error = (spread(map(number, found)) for found in (values, errors))
    return None if mean is None else (mean.mean, error.mean if error else 0.0)


def share(study: Study, row: Row, task: str) -> Score | None:
    """The share of the teacher's accuracy above chance that is kept, with the standard error of a ratio.

    The errors of student and teacher are taken for independent, although both answer the same questions: it is the
    larger one.
    """
    own, theirs, chance = accuracy(row, task), study.teacher and accuracy(study.teacher, task), _chance(task)
    if own is None or not theirs or chance is None or theirs[0] <= chance[1]:
        return None
    above = theirs[0] - chance[1]
    kept = (own[0] - chance[1]) / above
    return kept, math.hypot(own[1], kept * theirs[1]) / above


def _size(row: Row) -> dict[str, str]:
    part = row.cache_bytes and row.teacher_cache_bytes and part_of(row.cache_bytes / row.teacher_cache_bytes)
    return {"bytes/token": NONE if row.cache_bytes is None else f"{row.cache_bytes:,.0f}", "cache": part or NONE}


def _tasks(study: Study, row: Row, tasks: Sequence[str]) -> dict[str, str]:
    cells = {}
    for task in tasks:
        words = title(task) if [*map(title, tasks)].count(title(task)) == 1 else task
        cells[words] = percent(accuracy(row, task))
        cells[f"{words} kept"] = NONE if row is study.teacher else _part(share(study, row, task))
    return cells


def _speed(study: Study, row: Row) -> dict[str, str]:
    place = headline_place(study)
    if place is None:
        return {}
    speed = row.speedups.get(place)
    return {f"decode at {place[0]:,} × {place[1]}": NONE if speed is None else f"{speed:.2f}×"}


def _quantised(study: Study, row: Row) -> str:
    """The quantised cache of the teacher that takes no more bytes than a student and has the lowest loss."""
    if row.role != "student" or study.teacher is None or not row.cache_bytes:
        return NONE
    fitting = [
        (loss.mean, each.cached)
        for each in study.teacher.quantised
        if (loss := each.metric("loss")) and each.cache_bytes and each.cache_bytes <= row.cache_bytes
    ]
    return "{1}: {0:.3f}".format(*min(fitting)) if fitting else NONE


def percent(score: Score | None) -> str:
    """An accuracy with its standard error."""
    return NONE if score is None else f"{score[0]:.1%}" + (f" ± {100 * score[1]:.1f}" if score[1] else "")


def _part(score: Score | None) -> str:
    return NONE if score is None else f"{score[0]:.0%}" + (f" ± {100 * score[1]:.0f}" if score[1] else "")
