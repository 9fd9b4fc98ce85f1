"""What a real language model keeps per byte: the tables and the figure of the README and of docs/smollm2.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvfold.disk.record import Record
from kvfold.report import figures, kept, tables
from kvfold.report.figures import Point
from kvfold.report.outcome import spent
from kvfold.report.rows import Row, Study
from kvfold.report.studies import studies
from kvfold.report.tables import markdown
from pages.students import bare_name

MILLION = 1e6


@dataclass(frozen=True)
class Goal:
    """What was to be kept of each task above chance, at a part of the cache and after so many tokens of training."""

    cache: str
    over: float  # students with more than this part of the teacher's cache
    most: float  # and at most this
    tokens: float
    shares: Mapping[str, float]


def _goals(cache: str, over: float, most: float, *shares: Sequence[float]) -> list[Goal]:
    names = ("LAMBADA", "ARC-Easy", "PIQA")
    budgets = (0.0, MILLION, 20 * MILLION)
    return [
        Goal(cache, over, most, tokens, dict(zip(names, each, strict=bool(each))))
        for tokens, each in zip(budgets, shares, strict=True)
    ]


GOALS = (
    *_goals("50%", 0.345, 0.505, (0.9, 0.9, 0.9), (0.95, 0.95, 0.95), (0.98, 0.98, 0.98)),
    *_goals("33%", 0.13, 0.345, (0.5, 0.75, 0.75), (0.8, 0.88, 0.88), (0.92, 0.95, 0.95)),
    *_goals("12.5%", 0.0, 0.13, (), (0.65, 0.65, 0.65), (0.8, 0.8, 0.8)),
)


def kept_tables(records: Sequence[Record]) -> Iterator[str]:
    """The table of every study that has recall or tasks, and how it is read."""
    for study in studies(records):
        if (table := kept.kept(study)) is not None:
            yield markdown(table)
            yield f"{kept.ABOUT} {_measured(study)}"


def short_tables(records: Sequence[Record]) -> Iterator[str]:
    """The same of studies with tasks, for a newcomer: few columns, and no student that another beats in all of them."""
    for study in studies(records):
        table = kept.kept(study)
        if table is None or not kept.tasks_of(study.everyone):
            continue
        columns, rows = table
        first = f"{kept.title(kept.tasks_of(study.everyone)[0])} kept"
        at = [
            columns.index(each) for each in ("model", "cache", "loss", "last word", first, "the same bytes, quantised")
        ]
        front = [line for row, line in zip(kept.shown(study), rows, strict=True) if not _beaten(row, study)]
        yield markdown(([columns[each] for each in at], [[row[each] for each in at] for row in front]))
        yield f"{kept.ABOUT} {_measured(study)}"


def _beaten(row: Row, study: Study) -> bool:
    """Whether another student of no more bytes has a lower loss."""
    loss = row.metric("loss")
    return row.role == "student" and any(
        (other.cache_bytes or 0) <= (row.cache_bytes or 0) and found.mean < loss.mean
        for other in [*study.students, *study.converted]
        if loss and (found := other.metric("loss"))
    )


def _measured(study: Study) -> str:
    record = study.everyone[0].records[0]
    settings, questions = record.settings, record.settings.get("lm_eval_limit")
    tasks = f", {questions:,} questions of each task" if questions and record.metrics.get("lm_eval") else ""
    controls = [f" {row.name.capitalize()} ({row.schooling})." for row in study.rows if row.role == "control"]
    devices = dict.fromkeys(tables.plain(each.device) for row in study.everyone for each in row.records)
    measured = f"On `{bare_name(settings.get('data'))}`{tasks}, in {settings['dtype']}, on {' or '.join(devices)}."
    return measured + "".join(controls)


def goal_tables(records: Sequence[Record]) -> Iterator[str]:
    """Each goal beside the best student of its bytes and training: the one that keeps most, over all tasks."""
    for study in studies(records):
        tasks = {kept.title(task): task for task in kept.tasks_of(study.everyone)}
        if not tasks:
            continue
        lines: list[list[str]] = []
        bold: set[tuple[int, int]] = set()
        for goal in GOALS:
            best = _best(study, goal, list(tasks.values()))
            training = "none" if not goal.tokens else f"at most {goal.tokens / MILLION:.0f}M tokens"
            line = [goal.cache, training, _name(study, best) if best else "not measured"]
            for name, task in tasks.items():
                wanted, found = goal.shares.get(name), best and kept.share(study, best, task)
                reached = bool(found and wanted is not None and found[0] >= wanted)
                bold |= {(len(lines), len(line))} if reached else set()
                shown = f"{found[0]:.0%} ± {100 * found[1]:.0f}" if found else tables.NONE
                line.append(shown if wanted is None else f"{shown} of {wanted:.0%}")
            lines.append(line)
        yield markdown((["cache", "training", "best student", *tasks], lines), words=3, bold=bold)
        yield "Share kept above chance, with its standard error, *of* the goal; bold: reached."


def _best(study: Study, goal: Goal, tasks: Sequence[str]) -> Row | None:
    found = []
    for row in [*study.students, *study.converted]:
        part = (row.cache_bytes or 0) / (row.teacher_cache_bytes or 1)
        shares = [share[0] for task in tasks if (share := kept.share(study, row, task))]
        tokens = spent(row)[1]
        trained_so = tokens == 0 if goal.tokens == 0 else 0 < tokens <= goal.tokens
        if goal.over < part <= goal.most and trained_so and len(shares) == len(tasks):
            found.append((sum(shares), row))
    return max(found, key=lambda each: each[0])[1] if found else None


def _name(study: Study, row: Row) -> str:
    return dict(zip(map(id, kept.shown(study)), kept.names(study), strict=True))[id(row)]


def task_figure(records: Sequence[Record], task: str = "LAMBADA") -> str | None:
    """Cache bytes per token against the share of a task that is lost: an SVG; None without such a task."""
    for study in studies(records):
        points = []
        for row, name in zip(kept.shown(study), kept.names(study), strict=True):
            found = next((each for each in kept.tasks_of(study.everyone) if kept.title(each) == task), None)
            share = kept.share(study, row, found) if found else None
            if share is None or row.cache_bytes is None:
                continue
            part = tables.part_of(row.cache_bytes / (row.teacher_cache_bytes or row.cache_bytes))
            points.append(
                Point(
                    name if row is study.teacher else f"{name}\n{part} of the bytes, {share[0]:.0%} kept",
                    row.cache_bytes,
                    1 - share[0],
                    1 - share[0] - share[1],
                    1 - share[0] + share[1],
                    group=row.cached or row.group,
                    hollow=bool(row.cached),
                    in_front=row.role == "student" or row is study.teacher,
                )
            )
        if len(points) > 1:
            label = f"share of the teacher’s {task} lost"
            drawn = figures.scatter(
                "kept", f"Cache bytes per token against {label}", points, x_label="cache bytes per token", y_label=label
            )
            return figures.standalone(drawn)
    return None
