"""The sections about bytes and seconds: the plan beside what was measured, and decode speed over context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvfold.disk.record import Record
from kvfold.formats import count, size
from kvfold.report import figures
from kvfold.report import rows as tables
from kvfold.report.blocks import Block, Section, renamed
from kvfold.report.figures import Line
from kvfold.report.folder import Run
from kvfold.report.names import bench_names, plan_names
from kvfold.report.rows import NONE, Study, Table


def plans(run: Run, found: Sequence[Study]) -> Section:
    """What was planned, and beside it what was measured."""
    blocks = []
    uses: dict[tuple[Any, ...], list[Record]] = {}
    for record in run.records:
        if record.kind == "plan" and record.status == "done":
            plan = record.metrics
            use = (plan["context"], plan["batch"], plan["hardware"]["name"], plan["tensor_parallel"], plan["dtype"])
            uses.setdefault(use, []).append(record)
    for (context, batch, device, *_), plans in uses.items():
        title = f"Plans for {context:,} tokens × {batch} on {device}"
        said = dict.fromkeys(warning for record in plans for warning in record.metrics["warnings"])
        about = " ".join(f"{warning[0].upper()}{warning[1:]}." for warning in said)
        more = ("", *(", ".join(_settings(plan.metrics)) for plan in plans))
        blocks.append(Block("table", title, about, table=_plan_table(plans, run.records, found), words=3, more=more))
    for bench in tables.benches(run.records):
        rows = tables.bench_rows(bench)
        place = max((row["context"], row["batch"]) for row in rows)
        names = bench_names(bench, found)
        largest = renamed(_bytes_table(tables.bench_rows(bench, context=place[0], batch=place[1])), names)
        title = "Cache bytes: predicted and measured"
        blocks.append(Block("table", title, _verdict_on_bytes(rows), table=largest, words=2))
        if len(rows) > len(largest[1]):
            every = renamed(_bytes_table(rows), names)
            blocks.append(Block("table", f"All {len(rows)} measurements", table=every, words=2, folded=True))
    about = "A plan reads config.json only. Its bytes are exact; its speed is the roofline bound."
    return Section("plan", "Plan against measured", about, tuple(blocks))


def _plan_table(plans: Sequence[Record], records: Sequence[Record], found: Sequence[Study]) -> Table:
    """The teacher, then one line per plan; decode speed by the roofline and, where it was timed there, as measured."""
    columns = ["model", "loads in", "key/value heads", "parameters", "cache bytes/token", "cache", "largest batch"]
    columns += ["decode, at most", "decode, measured"]
    first = plans[0].metrics
    lines = [["teacher", NONE, *_side(first["before"]), "1×", "1×"]]
    place = (first["context"], first["batch"])
    for record, name in zip(plans, plan_names(plans), strict=True):
        plan = record.metrics
        own = [
            row
            for study in found
            for row in study.rows
            if row.role == "student" and tables.plan_of(records, {"method": row.method, **row.settings}) is record
        ]
        timed = next((f"{row.speedups[place]:.2f}×" for row in own if place in row.speedups), NONE)
        engines = ", ".join(engine["name"] for engine in plan["engines"] if engine["loads"])
        lines.append([name, engines or NONE, *_side(plan["after"]), f"{plan['speedup']:.2f}×", timed])
    return columns, lines


def _settings(plan: Mapping[str, Any]) -> list[str]:
    """Every setting of a plan, in words."""
    settings = (f"{key.replace('_', ' ')} {value}" for key, value in plan["settings"].items() if value is not None)
    return [plan["method"], *settings]


def _side(side: Mapping[str, Any]) -> list[str]:
    return [
        str(side["kv_heads"]),
        count(side["parameters"]),
        f"{side['cache_bytes_per_token']:,}",
        size(side["cache_bytes"]),
        f"{side['largest_batch']:,}",
    ]


def _bytes_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["model", "cache", "context", "batch", "predicted bytes", "measured bytes", ""]
    return columns, [
        [
            row["model"],
            row["cache"],
            f"{row['context']:,}",
            str(row["batch"]),
            NONE if row.get("predicted_cache_bytes") is None else f"{row['predicted_cache_bytes']:,}",
            f"{row['cache_bytes']:,}",
            NONE
            if row.get("predicted_cache_bytes") is None
            else "equal"
            if row["predicted_cache_bytes"] == row["cache_bytes"]
            else f"{row['cache_bytes'] / row['predicted_cache_bytes']:.3f}×",
        ]
        for row in rows
    ]


def _verdict_on_bytes(rows: Sequence[Mapping[str, Any]]) -> str:
    checked = [row for row in rows if row.get("predicted_cache_bytes") is not None]
    wrong = [row for row in checked if row["predicted_cache_bytes"] != row["cache_bytes"]]
    if not checked:
        return ""
    return (
        f"{len(wrong)} of {len(checked)} caches differ from the prediction."
        if wrong
        else "All caches have exactly the predicted size."
    )


def speed(run: Run) -> Section:
    """Decode time over context, one figure a batch, and every measurement."""
    blocks = []
    for number, bench in enumerate(tables.benches(run.records)):
        names = bench_names(bench, run.studies)
        blocks += [_decode_figure(bench, batch, f"decode-{number}-{batch}", names) for batch in _batches(bench)]
        columns = ["model", "cache", "context", "batch", "prefill, ms", "decode, ms/token", "of teacher", "kernel"]
        table = renamed((columns, list(_times(bench))), names)
        notes = [note for note in bench.metrics.get("notes") or () if "read the cache of another" in note]
        said = " ".join(_note(note, names) for note in notes)
        blocks.append(Block("table", f"Every measurement of {bench.name}", said, table=table, words=2, folded=True))
        if largest := largest_batches(bench):
            blocks.append(Block("table", f"The largest batch in {_memory(bench)}", said, table=renamed(largest, names)))
    about = "Medians. Teacher and students are interleaved in one run, each with its fastest kernel. Compare ratios: "
    about += "seconds depend on the machine."
    return Section("speed", "Decode speed over context", about, tuple(blocks))


def _note(note: str, names: Mapping[str, str]) -> str:
    """A note of a benchmark as a sentence, with the short name of its model."""
    model, colon, words = note.partition(": ")
    if colon and model in names:
        return f"{names[model]}: {words}."
    return f"{note[0].upper()}{note[1:]}."


def largest_batches(bench: Record) -> Table | None:
    """What fits into a given memory, weights and cache, and how fast it is; None when it was not measured."""
    rows = bench.metrics.get("largest") or []
    if not rows:
        return None
    teacher = {row["context"]: row for row in rows if row["model"] == rows[0]["model"]}
    columns = ["model", "context", f"largest batch in {_memory(bench)}", "tokens/s", "of teacher"]
    return columns, [
        [
            row["model"],
            f"{row['context']:,}",
            f"{row['batch']:,}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / teacher[row['context']]['tokens_per_s']:.2f}×"
            if row["context"] in teacher
            else NONE,
        ]
        for row in rows
    ]


def _memory(bench: Record) -> str:
    return f"{size(bench.metrics['largest'][0]['memory'])}, weights and cache"


def _batches(bench: Record) -> list[int]:
    return sorted({row["batch"] for row in tables.bench_rows(bench)})


def _decode_figure(bench: Record, batch: int, name: str, names: Mapping[str, str]) -> Block:
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in tables.bench_rows(bench, batch=batch):
        model = names.get(row["model"], row["model"])
        series.setdefault((model, row["cache"]), []).append((row["context"], 1e3 * row["decode_s_per_token"]))
    drawn = [
        Line(model if cache == "native" else f"{model}, {cache} cache", *map(list, zip(*sorted(points), strict=True)))
        for (model, cache), points in series.items()
    ]
    title, about = f"Decode at batch {batch}", "Lower is faster."
    contexts = sorted({int(x) for line in drawn for x in line.x})
    rows = [
        [line.label, *(f"{at[x]:.3f}" if x in at else NONE for x in contexts)]
        for line in drawn
        for at in [dict(zip(line.x, line.y, strict=True))]
    ]
    table = (["ms per token", *(f"{x:,}" for x in contexts)], rows)
    if len(contexts) < 2:
        return Block("table", title, about, table)
    svg = figures.lines(
        name, title, drawn, x_label="context (tokens)", y_label="ms per token", log_x=True, from_zero=True
    )
    return Block("figure", title, about, table, svg)


def _times(bench: Record) -> Iterator[list[str]]:
    teacher = {
        (row["context"], row["batch"]): row["decode_s_per_token"]
        for row in tables.bench_rows(bench, model=tables.teacher_model(bench), cache="native")
    }
    for row in tables.bench_rows(bench):
        base = teacher.get((row["context"], row["batch"]))
        yield [
            row["model"],
            row["cache"],
            f"{row['context']:,}",
            str(row["batch"]),
            f"{1e3 * row['prefill_s']:.1f}",
            f"{1e3 * row['decode_s_per_token']:.3f}",
            NONE if base is None else f"{base / row['decode_s_per_token']:.2f}×",
            str(row.get("kernel", "")),
        ]
