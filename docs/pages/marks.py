"""Tables from records, between marks in pages that people write.

A mark names a table and its runs; each run of docs/generate.py writes the table again:

    <!-- records: students headline -->
    <!-- records end -->

    students       every student of the runs beside its teacher
    front          the students that no other beats in both bytes and loss, in the columns that a newcomer needs
    equal-bytes    students that cache as much and were trained on as much, the best first
    largest-batch  what fits into a given memory, and how fast it then is
    recall         what they remember: copy loss by distance and the loss on a pass key, also without a part
    ratios         a benchmark's variants as parts of what it holds them against
    kept           loss, recall and tasks of each student beside its teacher with quantised caches; `kept-short` in
                   the columns that a newcomer needs, or `front` where no task and no recall was measured
    heads          the heads of each layer that training chose within a budget
    goals          what was to be kept of a real language model, beside the best student
    serving        what each engine computed of each kind of student
    bench          a benchmark's models: bytes predicted and allocated, and speed beside the first one
    inspection     how well inspections predicted: losses of folds, and the heads that copy
    compared       a teacher and its students beside quantisation, pruning and others
    levels         uptraining on two levels of depth beside one of the same FLOPs
    readers        readers of passages: right answers, time by part of the model, bytes of a passage
    pivot          a benchmark's rows: `pivot RUN: LIST LINE COLUMN CELL` names a list in its metrics and fields of the
                   list's rows; COLUMN may be several between commas

Runs before a `|` are taken if there is a record of one of them, else those behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvfold.disk.record import Record
from kvfold.errors import DataError
from kvfold.report import tables
from kvfold.report.benches import benches
from kvfold.report.rows import Row, Study
from kvfold.report.speed import largest_batches
from kvfold.report.studies import studies
from kvfold.report.tables import asked, markdown, recall
from pages.budgets import heads_by_layer
from pages.compared import compared_tables
from pages.inspection import inspection_tables
from pages.kept import goal_tables, kept_tables, short_tables
from pages.levels import levels_tables
from pages.miniature import compare, front, of_runs
from pages.readers import reader_tables
from pages.serving import serving_tables
from pages.students import bare_name

SHORT = ("model", "cache bytes", "of teacher", "loss", "agreement", "decode")  # columns of `front`
START, END = "<!-- records: {} -->", "<!-- records end -->"
_MARKED = re.compile(r"<!-- records: ([^\n]*?) -->\n(?:.*?\n)??<!-- records end -->", re.S)


def with_tables(text: str, records: Sequence[Record]) -> str:
    """A page with what it asks for between its marks; a page without marks as it is.

    Raises DataError when a mark asks for what is not known.
    """
    return _MARKED.sub(lambda found: "\n".join([START.format(found[1]), *_written(found[1], records), END]), text)


def _written(asked: str, records: Sequence[Record]) -> list[str]:
    before, _, behind = asked.partition(":")
    kind, *names = _chosen(before, records).split()
    if kind not in KINDS or not names or len(behind.split()) != (4 if kind == "pivot" else 0):
        raise DataError(f"a page asks for {asked!r}", allowed=f"{', '.join(KINDS)}, and names of runs")
    made = "\n\n".join(KINDS[kind](of_runs(records, lambda name: name.partition("/")[0] in names), *behind.split()))
    return [made] if made else []


def _chosen(asked: str, records: Sequence[Record]) -> str:
    """The kind, and the first of several lots of runs that has a record."""
    kind, _, lots = asked.partition(" ")
    runs = {each.run for each in records}
    named = [lot for lot in lots.split("|") if runs & set(lot.split())]
    return f"{kind} {named[0] if named else lots.rpartition('|')[2]}"


def _kept_short(records: Sequence[Record]) -> Iterator[str]:
    """What is kept in a few columns, else the front, each with a sentence before it."""
    found = list(short_tables(records))
    if found:
        yield "SmolLM2-135M-Instruct, a real language model: [what broke, why, and what fixed it](docs/smollm2.md)."
        yield from found
        return
    yield (
        "The included checkpoint (3M parameters), converted and trained on 600,000 tokens; `supra` on a quarter of "
        "them."
    )
    yield from _front(records)
    yield (
        "A student is listed if no other student has both fewer bytes and a lower loss. The cache of `supra` does not "
        "grow with the text; its row gives the bytes per token at 512 tokens. This `supra` student keeps a window of "
        "16 tokens and no state."
    )


def _students(records: Sequence[Record]) -> Iterator[str]:
    """The headline of every study."""
    for study in studies(records):
        yield markdown(tables.headline(study), words=2)
        yield _read(study)


def _read(study: Study) -> str:
    """How a headline is read, below it."""
    speed = "; decode speed is the teacher's time over the student's" if tables.headline_place(study) else ""
    seeds = " ± is the standard deviation over seeds." if any(len(row.records) > 1 for row in study.rows) else ""
    return f"{_about(study)}{speed}{_gap(study)}.{seeds} {_device(study)}"


def _front(records: Sequence[Record]) -> Iterator[str]:
    """The best students of every study: bytes, loss, agreement, speed."""
    for study in studies(records):
        best = front(study)
        columns, lines = tables.headline(best)
        kept = [at for at, name in enumerate(columns) if name.startswith(SHORT) and name != "loss before training"]
        yield markdown(([columns[at] for at in kept], [[line[at] for at in kept] for line in lines]))
        yield _read(replace(best, rows=tuple(replace(row, gap_closed=None) for row in best.rows)))


def _about(study: Study) -> str:
    settings = study.everyone[0].records[0].settings
    return f"Loss in nats per token of `{bare_name(settings.get('data'))}`"


def _gap(study: Study) -> str:
    gaps = any(row.gap_closed is not None for row in study.rows)
    return f". *Gap closed* is {tables.GAP_CLOSED}" if gaps else ""


def _device(study: Study) -> str:
    return f"Measured on {tables.plain(next(row.records[0].device for row in study.everyone))}."


def _equal_bytes(records: Sequence[Record]) -> Iterator[str]:
    """Who is best at the same bytes and tokens, and whether the seeds can tell."""
    for study in studies(records):
        lines: list[list[str]] = []
        bold, lots = set(), _alike(study)
        distances = sorted({int(key) for lot in lots for row in lot for key in row.keyed("copy_gain")})
        for alike in lots:
            best = alike[0]
            bold.add((len(lines), 1))
            for row in alike:
                part = (row.cache_bytes or 0) / (row.teacher_cache_bytes or 1)
                lines.append([f"{part:.3g}", row.name, row.schooling, tables.cell(row.metric("loss")), _kl(row)])
                lines[-1] += _copied(row, distances)
                lines[-1].append(tables.NONE if row.gap_closed is None else f"{row.gap_closed:.0%}")
                lines[-1].append(tables.NONE if row is best else _behind(best, row))
        if lines:
            columns = ["of the teacher's cache", "student", "training", "loss", "KL"]
            columns += [*(f"copy gain over {key:,}" for key in distances), "gap closed", "behind the best"]
            yield markdown((columns, lines), words=3, bold=bold)
            loss = study.teacher.metric("loss") if study.teacher else None
            teacher = f", the teacher's {loss.mean:.4f}" if loss else ""
            if study.teacher and distances:
                teacher += f" (copy gain {', '.join(_copied(study.teacher, distances))})"
            yield f"{_about(study)}{teacher}{_gap(study)}. {_device(study)}"


def _alike(study: Study) -> list[list[Row]]:
    """Students of equal bytes and tokens, where there are several: most bytes first, each lot by its loss."""
    lots: dict[tuple[float, str], list[Row]] = {}
    for row in study.rows:
        if row.role == "student" and row.cache_bytes and row.metric("loss"):
            tokens = str([row.training.get(key) for key in ("alpha", "tokens")])
            lots.setdefault((row.cache_bytes, tokens), []).append(row)
    several = {place: lot for place, lot in lots.items() if len(lot) > 1}
    return [sorted(lot, key=_loss) for _, lot in sorted(several.items(), key=lambda each: (-each[0][0], each[0][1]))]


def _loss(row: Row) -> float:
    loss = row.metric("loss")
    return float("inf") if loss is None else loss.mean


def _copied(row: Row, distances: Sequence[int]) -> list[str]:
    """By how many nats a span is easier the second time, at each distance."""
    return [tables.cell(row.keyed("copy_gain").get(str(key)), 2) for key in distances]


def _kl(row: Row) -> str:
    return tables.cell(row.metric("kl"))


def _behind(best: Row, row: Row) -> str:
    """How far, in nats, and whether the seeds can tell."""
    lower, higher = best.metric("loss"), row.metric("loss")
    assert lower is not None  # as _alike keeps them
    assert higher is not None
    unclear = " (within the seeds' spread)" if compare(lower, higher) == "unclear" else ""
    return f"{higher.mean - lower.mean:.4f}{unclear}"


def _recall(records: Sequence[Record]) -> Iterator[str]:
    """What each model of a study remembers, and how far back."""
    for study in studies(records):
        if rows := asked(study, "copy_loss"):
            yield markdown(recall(rows, "copy_loss", "passkey_loss"))
            yield f"{_about(study)}. {_device(study)}"


def _ratios(records: Sequence[Record]) -> Iterator[str]:
    """Of each benchmark, a table for each shape: a line for each variant, a column for each dtype."""
    for record in (each for each in records if each.kind == "benchmark"):
        shapes: dict[str, dict[str, Mapping[str, float]]] = {}
        for place, found in record.metrics.items():
            ratios = _over(found)
            if ratios is not None:
                dtype, _, shape = place.partition(", ")
                shapes.setdefault(shape, {})[dtype] = ratios
        for shape, by_dtype in shapes.items():
            variants = list(dict.fromkeys(name for ratios in by_dtype.values() for name in ratios))
            lines = [[name, *(_ratio(ratios.get(name)) for ratios in by_dtype.values())] for name in variants]
            yield markdown(([f"heads of {shape}", *by_dtype], lines))
        yield f"Time as a part of multi-head's best. {_where(record)}"


def _ratio(value: float | None) -> str:
    return tables.NONE if value is None else f"{value:.2f}"


def _over(found: Any) -> Mapping[str, float] | None:
    ratios = found.get("over_multi_head") if isinstance(found, Mapping) else None
    return ratios if isinstance(ratios, Mapping) else None  # a target is a number under the same name


def _pivot(records: Sequence[Record], part: str, line: str, column: str, cell: str) -> Iterator[str]:
    """A line for each value of one field, a column for each value of others."""
    for record in (each for each in records if each.kind == "benchmark"):
        cells: dict[str, dict[str, str]] = {}
        for row in record.metrics[part]:
            place = ", ".join(_words(row[name]) for name in column.split(","))
            cells.setdefault(_words(row[line]), {})[place] = (
                f"{row[cell]:,.3g}" if row[cell] < 1000 else f"{row[cell]:,.0f}"
            )
        columns = list(dict.fromkeys(place for found in cells.values() for place in found))
        lines = [[name, *(found.get(place, tables.NONE) for place in columns)] for name, found in cells.items()]
        yield markdown(([line, *columns], lines))
        yield _where(record)


def _bench(records: Sequence[Record]) -> Iterator[str]:
    """A line for each model and place of a benchmark of whole models."""
    for record in (each for each in records if each.kind == "benchmark"):
        first: dict[tuple[int, int], Mapping[str, Any]] = {}
        lines = []
        for row in record.metrics["rows"]:
            place = row["context"], row["batch"]
            teacher = first.setdefault(place, row)
            part = tables.part_of(row["cache_bytes"] / teacher["cache_bytes"])
            size = [f"{row[name]:,}" for name in ("predicted_cache_bytes", "cache_bytes")]
            speed = [f"{teacher[name] / row[name]:.2f}×" for name in ("decode_s_per_token", "prefill_s")]
            lines.append([row["model"], f"{place[0]:,} × {place[1]}", *size, part, *speed])
        columns = [
            "model",
            "tokens × batch",
            "predicted bytes",
            "allocated bytes",
            "of multi-head",
            "decode",
            "prefill",
        ]
        yield markdown((columns, lines))
        yield _where(record)


def _words(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _where(record: Record) -> str:
    note = f" ({record.settings['note']})" if record.settings.get("note") else ""
    return f"Measured on {tables.plain(record.device)}{note}."


def _largest_batch(records: Sequence[Record]) -> Iterator[str]:
    """What fits into a given memory, by every benchmark that measured it."""
    for bench in benches(records):
        if largest := largest_batches(bench):
            yield markdown(largest)
            yield _where(bench)


KINDS: Mapping[str, Callable[..., Iterator[str]]] = {
    "students": _students,
    "front": _front,
    "equal-bytes": _equal_bytes,
    "largest-batch": _largest_batch,
    "recall": _recall,
    "kept": kept_tables,
    "kept-short": _kept_short,
    "heads": heads_by_layer,
    "goals": goal_tables,
    "ratios": _ratios,
    "bench": _bench,
    "pivot": _pivot,
    "serving": serving_tables,
    "inspection": inspection_tables,
    "compared": compared_tables,
    "levels": levels_tables,
    "readers": reader_tables,
}
