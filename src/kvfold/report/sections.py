"""The sections of a report: tables, figures, samples, commands. A section without data is left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvfold.report import figures, tables
from kvfold.report.blocks import Block, Section, tabulated
from kvfold.report.comparison import comparison_section
from kvfold.report.figures import Line, Point
from kvfold.report.folder import RECIPE, Run, commands, findings
from kvfold.report.kept import ABOUT, kept, shown
from kvfold.report.names import short_names
from kvfold.report.outcome import cache_itemsize, settings_of
from kvfold.report.planes import planes_section
from kvfold.report.rows import Study, compact, number, spread
from kvfold.report.speed import plans, speed
from kvfold.report.tables import NONE, asked, headline, recall, renamed

_LOGGED = ("step", "tokens", "stage", "lr", "grad_norm", "tokens_per_second", "seconds")  # the rest are losses
_LOSSES = {"ce": "Cross-entropy", "kl": "KL to the teacher", "attention": "Attention outputs", "loss": "Objective"}
_RECORD = ["kind", "name", "status", "seed", "seconds", "date", "hashes"]
_DRAWN = 160  # points of a training curve


def sections(run: Run) -> list[Section]:
    """Every section of a run that has something to show, in reading order."""
    found = run.studies
    made = [
        comparison_section(run.records),
        *(section for number, study in enumerate(found) for section in _of_study(study, run, number)),
        plans(run, found),
        planes_section(run),
        _training(run),
        speed(run, found),
        _gates(run),
        _samples(found),
        _failures(run),
        _commands(run),
        _provenance(run),
    ]
    return [section for section in made if section.blocks]


# --- quality ---------------------------------------------------------------------------------------------------------


def _of_study(study: Study, run: Run, number: int) -> list[Section]:
    suffix = f"-{number + 1}" if number else ""
    again = f" ({number + 1})" if number else ""
    about = "Loss is in nats per token of held-out text. "
    if any(row.recovered is not None for row in study.rows):
        about += "Recovered: the share of the loss added by the conversion that training removed. "
    if any(row.gap_closed is not None for row in study.rows):
        about += f"Gap closed: {tables.GAP_CLOSED}; 100% is the teacher. "
    if any(len(row.records) > 1 for row in study.rows):
        about += "± is the standard deviation over seeds. "
    place = tables.headline_place(study)
    if place:
        about += "Decode: the speed relative to the teacher's at context × batch, measured in one run. "
    blocks = (*_quality(study, run, suffix), *_recall(study, suffix))
    return [
        Section(f"kept{suffix}", f"What is kept, per byte{again}", "", _kept(study)),
        Section(f"result{suffix}", f"Result{again}", about.strip(), (_result(study),)),
        Section(f"quality{suffix}", f"Quality{again}", "", blocks),
    ]


def _kept(study: Study) -> tuple[Block, ...]:
    table = kept(study)
    more = tuple("" if row.role == "teacher" else settings_of(row) for row in shown(study))
    return (Block("table", "", ABOUT, table=table, more=more),) if table else ()


def _result(study: Study) -> Block:
    """The headline with short names; settings and training of each row are folded."""
    columns, rows = headline(study)
    kept = [at for at, column in enumerate(columns) if column != "training"]
    names = short_names(study.everyone)
    shown = [[name, *(row[at] for at in kept[1:])] for name, row in zip(names, rows, strict=True)]
    return Block(
        "table",
        "Bytes, quality and speed",
        "Select a model for its settings.",
        table=([columns[at] for at in kept], shown),
        more=tuple("" if row.role == "teacher" else settings_of(row) for row in study.everyone),
    )


def quality_points(study: Study, *, schooled: bool = True, itemsize: int | None = None) -> list[Point]:
    """Cache bytes per token against loss above the teacher's, for every row with both.

    Hover texts have all settings, and if `schooled` the training. With `itemsize`, the bytes of a cached number, the
    teacher and its students follow again with an fp8 cache.
    """
    points, rounded = [], []
    for row, name in zip(study.everyone, short_names(study.everyone), strict=True):
        loss, fp8 = row.metric("loss"), row.metric("loss_fp8_cache")
        above = 0.0 if row.role == "teacher" else row.loss_lost
        if row.cache_bytes is None or loss is None or above is None:
            continue
        shift, about = above - loss.mean, row.label if schooled else row.name
        point = Point(
            name,
            row.cache_bytes,
            above,
            loss.low + shift,
            loss.high + shift,
            group=row.group,
            in_front=row.role != "control",
            about=about if about != name else "",
        )
        points.append(point)
        if itemsize and fp8 is not None and row.role != "control":
            twin = Point(f"{name}, fp8 cache", row.cache_bytes / itemsize, fp8.mean + shift, group=row.group)
            rounded.append(replace(twin, hollow=True, labelled=row.role == "teacher", in_front=False))
    return points + rounded


def _quality(study: Study, run: Run, suffix: str) -> Iterator[Block]:
    points = quality_points(study, itemsize=cache_itemsize(run.records))
    if len(points) < 2:
        return
    title = "Quality against bytes"
    about = "Down and to the left is better. The line is the front: no student with an unquantised cache beats one "
    about += "on it in both bytes and loss. "
    about += "A hollow mark is the same model with an fp8 cache. " if any(point.hollow for point in points) else ""
    about += "A bar is the range over seeds. " if any(len(row.records) > 1 for row in study.rows) else ""
    about += "Point at a mark for its numbers."
    axes = {"x_label": "cache bytes per token", "y_label": "loss above the teacher’s (nats)"}
    drawn = ""
    for kind, width in (("for-wide", figures.WIDE), ("for-narrow", figures.NARROW)):
        svg = figures.scatter(f"scatter-{kind}{suffix}", title, points, width=width, **axes)
        drawn += f'<div class="{kind}">{svg}</div>'
    rows = [[point.label, f"{point.x:,.0f}", f"{point.y:+.4f}"] for point in points]
    table = (["model", "cache bytes/token", "loss above the teacher’s"], rows)
    yield Block("figure", title, about, table=table, content=drawn, wide=True)


def _recall(study: Study, suffix: str) -> Iterator[Block]:
    rows, names = asked(study, "copy_loss"), _names(study)
    if rows:
        title = "Copy loss by distance"
        lines = []
        for row in rows:
            values = row.keyed("copy_loss")
            bounds = zip(*((value.mean, value.low, value.high) for value in values.values()), strict=True)
            lines.append(Line(names[row.label], list(map(float, values)), *map(list, bounds)))
        about = "Loss on the second occurrence of a random span, by its distance in tokens. Only recall lowers it."
        drawn = figures.lines(
            f"copy{suffix}", title, lines, x_label="distance (tokens)", y_label="copy loss (nats)", log_x=True
        )
        yield Block("figure", title, about, table=renamed(recall(rows, "copy_loss"), names), content=drawn)
    for name, title in (("passkey", "Passkey retrieval"), ("passkey_loss", "Loss on the passkey")):
        if rows := asked(study, name):
            yield Block("table", title, "By context.", table=renamed(recall(rows, name), names))
    tasks = list(_tasks(study))
    if tasks:
        models = [
            names[row.label] for row in study.everyone if any(each.metrics.get("lm_eval") for each in row.records)
        ]
        yield Block("table", "lm-eval", table=(["task", *models], tasks))


def _names(study: Study) -> dict[str, str]:
    """The label of each row, also without a part of its attention -> its short name."""
    found: dict[str, str] = {}
    for row, name in zip(study.everyone, short_names(study.everyone), strict=True):
        found |= {part.label: f"{name}, without its {part.left_out}" for part in row.parted}
        found[row.label] = name
    return found


def _tasks(study: Study) -> Iterator[list[str]]:
    """lm-eval: one line per task and metric, one column per model."""
    found = [[record.metrics.get("lm_eval") or {} for record in row.records] for row in study.everyone]
    found = [each for each in found if any(each)]
    names = sorted({(task, name) for each in found for results in each for task in results for name in results[task]})
    for task, name in names:
        values = [spread(number(results.get(task, {}).get(name)) for results in each) for each in found]
        if any(value is not None for value in values):
            yield [f"{task}, {name}", *(tables.cell(value, 3) for value in values)]


def _training(run: Run) -> Section:
    blocks = []
    parts = {part for lines in run.logs.values() for line in lines for part in line if part not in _LOGGED}
    if len(parts) > 1:
        parts.discard("loss")  # the weighted sum of the others
    for part in sorted(parts, key=lambda part: (list(_LOSSES).index(part) if part in _LOSSES else 9, part)):
        curves = {
            name: [(line["tokens"], line[part]) for line in lines if isinstance(line.get(part), int | float)]
            for name, lines in run.logs.items()
        }
        drawn = [Line(_short(name), *_smooth(points)) for name, points in curves.items() if len(points) > 1]
        if drawn:
            title = _LOSSES.get(part, part)
            svg = figures.lines(
                f"training-{part}",
                f"{title} over tokens",
                drawn,
                x_label="tokens",
                y_label="nats per token" if part in ("ce", "kl") else title.lower(),
                marked=False,
            )
            rows = [[line.label, f"{line.x[-1]:,.0f}", f"{line.y[0]:.4f}", f"{line.y[-1]:.4f}"] for line in drawn]
            table = (["run", "tokens", "first", "last"], rows)
            blocks.append(Block("figure", f"{title} over tokens", "On the training text, smoothed.", table, svg))
    paces = [
        [
            _short(name),
            f"{lines[-1]['tokens']:,}",
            f"{statistics.median(line.get('tokens_per_second', 0) for line in lines):,.0f}",
            f"{lines[-1].get('seconds', 0) / 60:.1f}",
        ]
        for name, lines in run.logs.items()
        if lines
    ]
    pace = tabulated("Pace", ["run", "tokens", "tokens/s, median", "minutes"], paces)
    return Section("training", "Loss over tokens", "", (*blocks, *pace))


def _short(name: str) -> str:
    return name.removeprefix("uptrained/")


def _smooth(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """A running mean over a twentieth of the points, at no more points than a figure can show."""
    half = len(points) // 40
    values = [value for _, value in points]
    smooth = [statistics.fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(points))]
    step = max(1, -(-len(points) // _DRAWN))
    kept = sorted({*range(0, len(points), step), len(points) - 1})
    return [points[at][0] for at in kept], [smooth[at] for at in kept]


# --- gate, samples, failures -----------------------------------------------------------------------------------------


def _gates(run: Run) -> Section:
    rows = [
        [
            record.name,
            row["expr"],
            *(NONE if row[side] is None else f"{row[side]:.4f}" for side in ("left", "right")),
            "holds" if row["passed"] else "MISSED",
        ]
        for record in run.records
        for row in (record.metrics.get("gate") or {}).get("rows", [])
    ]
    columns = ["model", "threshold", "measured", "bound", ""]
    return Section("gate", "Gate", "", tabulated("Thresholds", columns, rows, words=2))


def _samples(found: Sequence[Study]) -> Section:
    """Continuations of the same prompts by teacher and students, for one seed."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    names = {label: name for study in found for label, name in _names(study).items()}
    for row in (row for study in found for row in study.rows):
        for sample in row.records[0].metrics.get("samples") or []:
            first = [("teacher", sample["teacher"])] if "teacher" in sample else []
            prompts.setdefault(sample["prompt"], first).append((names[row.label], sample["student"]))
    blocks = (Block("samples", "", content=prompts),) if prompts else ()
    return Section("samples", "Samples side by side", "Greedy continuations of the same held-out text.", blocks)


def _failures(run: Run) -> Section:
    rows = [[record.kind, record.name, record.error or ""] for record in run.records if record.status == "failed"]
    return Section("failed", "Failures", "", tabulated("", ["kind", "name", "error"], rows, words=3))


# --- provenance ------------------------------------------------------------------------------------------------------


def _commands(run: Run) -> Section:
    blocks = []
    if run.recipe is not None:
        blocks.append(Block("code", "The whole run", content=f"kvfold run {RECIPE}"))
        blocks.append(Block("code", RECIPE, content=run.recipe.strip(), folded=True))
    by_hash = {checkpoint.lineage["hash"]: checkpoint.name for checkpoint in run.checkpoints}
    for checkpoint in run.checkpoints:
        text = commands(checkpoint, by_hash)
        blocks.append(Block("code", checkpoint.name, content=text, folded=run.recipe is not None))
    return Section("again", "Reproduce this run", "Every setting is explicit.", tuple(blocks))


def _provenance(run: Run) -> Section:
    checkpoints = [
        [
            checkpoint.name,
            str(checkpoint.lineage["hash"])[:16],
            f"{checkpoint.lineage['root']['name']} {str(checkpoint.lineage['root']['hash'])[:16]}",
            " → ".join(_step(step) for step in checkpoint.lineage["steps"]),
            str(checkpoint.lineage.get("tokenizer") or NONE)[:16],
        ]
        for checkpoint in run.checkpoints
    ]
    found = [[checkpoint.name, line] for checkpoint in run.checkpoints for line in findings(checkpoint.lineage)]
    made_by = sorted({("device", record.device) for record in run.records if record.device})
    made_by += sorted({("commit", record.commit) for record in run.records if record.commit})
    made_by += sorted({pair for record in run.records for pair in record.versions.items()})
    records = [
        [
            record.kind,
            record.name,
            record.status,
            NONE if record.seed is None else str(record.seed),
            NONE if record.wall_seconds is None else f"{record.wall_seconds:,.1f}",
            record.date,
            ", ".join(f"{key} {str(value)[:12]}" for key, value in record.hashes.items() if value) or NONE,
        ]
        for record in run.records
    ]
    blocks = (
        *tabulated("Checkpoints", ["checkpoint", "hash", "root teacher", "lineage", "tokenizer"], checkpoints, words=5),
        *tabulated("Conversion findings", ["checkpoint", "finding"], found, words=2),
        *tabulated("Versions and device", ["", ""], [list(pair) for pair in made_by], words=2),
        *tabulated("Records", _RECORD, records, words=7, folded=True),
    )
    return Section("provenance", "Hashes, lineage, versions", "", blocks)


def _step(step: Mapping[str, Any]) -> str:
    tokens = f" {compact(step['tokens'])} tokens" if step.get("tokens") else ""
    return f"{step['stage']}{tokens}"
