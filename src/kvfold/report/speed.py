"""The sections about bytes and seconds: plans beside what was measured, and decode speed over context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.disk.record import Record
from kvfold.formats import count, size
from kvfold.report import figures
from kvfold.report.benches import bench_rows, benches, teacher_times
from kvfold.report.blocks import Block, Section
from kvfold.report.figures import Line
from kvfold.report.folder import Run
from kvfold.report.names import bench_names, plan_names
from kvfold.report.rows import Study
from kvfold.report.studies import plan_of
from kvfold.report.tables import NONE, Table, renamed


def plans(run: Run, found: Sequence[Study]) -> Section:
    """The plans, and beside them what was measured."""
    blocks = []
    uses: dict[tuple[Any, ...], list[Record]] = {}
    for record in run.records:
        if record.kind == "plan" and record.status == "done":
            plan = record.metrics
            use = (plan["context"], plan["batch"], plan["hardware"]["name"], plan["tensor_parallel"], plan["dtype"])
            uses.setdefault(use, []).append(record)
    for (context, batch, device, *_), plans in uses.items():
        warnings = dict.fromkeys(warning for record in plans for warning in record.metrics["warnings"])
        blocks.append(
            Block(
                "table",
                f"Plans for {context:,} tokens × {batch} on {device}",
                " ".join(f"{warning[0].upper()}{warning[1:]}." for warning in warnings),
                table=_plan_table(plans, run.records, found),
                words=3,
                more=("", *map(_settings, plans)),
            )
        )
    for bench in benches(run.records):
        rows = bench_rows(bench)
        place = max((row["context"], row["batch"]) for row in rows)
        names = bench_names(bench, found)
        largest = renamed(_bytes_table(bench_rows(bench, context=place[0], batch=place[1])), names)
        title = "Cache bytes: predicted and measured"
        blocks.append(Block("table", title, _verdict_on_bytes(rows), table=largest, words=2))
        if len(rows) > len(largest[1]):
            every = renamed(_bytes_table(rows), names)
            blocks.append(Block("table", f"All {len(rows)} measurements", table=every, words=2, folded=True))
    about = "A plan reads config.json only. Its bytes are exact; its speed is the roofline bound."
    return Section("plan", "Plan against measured", about, tuple(blocks))


def _plan_table(plans: Sequence[Record], records: Sequence[Record], found: Sequence[Study]) -> Table:
    """The teacher, then one line per plan: decode speed by the roofline and, where it was timed, as measured."""
    columns = ["model", "loads in", "key/value heads", "parameters", "cache bytes/token", "cache", "largest batch"]
    columns += ["decode, at most", "decode, measured"]
    first = plans[0].metrics
    place = (first["context"], first["batch"])
    students = [row for study in found for row in study.students]
    lines = [["teacher", NONE, *_side(first["before"]), "1×", "1×"]]
    for record, name in zip(plans, plan_names(plans), strict=True):
        plan = record.metrics
        own = [row for row in students if plan_of(records, {"method": row.method, **row.settings}) is record]
        timed = next((f"{row.speedups[place]:.2f}×" for row in own if place in row.speedups), NONE)
        engines = ", ".join(engine["name"] for engine in plan["engines"] if engine["loads"])
        lines.append([name, engines or NONE, *_side(plan["after"]), f"{plan['speedup']:.2f}×", timed])
    return columns, lines


def _settings(plan: Record) -> str:
    """Every setting of a plan, in words."""
    settings = plan.metrics["settings"].items()
    words = (f"{key.replace('_', ' ')} {value}" for key, value in settings if value is not None)
    return ", ".join([plan.metrics["method"], *words])


def _side(side: Mapping[str, Any]) -> list[str]:
    return [
        str(side["kv_heads"]),
        count(side["parameters"]),
        f"{side['cache_bytes_per_token']:,}",
        size(side["cache_bytes"]),
        f"{side['largest_batch']:,}",
    ]


def _bytes_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for row in rows:
        predicted, measured = row.get("predicted_cache_bytes"), row["cache_bytes"]
        same = "equal" if predicted == measured else f"{measured / (predicted or 1):.3f}×"
        compared = [NONE, f"{measured:,}", NONE] if predicted is None else [f"{predicted:,}", f"{measured:,}", same]
        lines.append([row["model"], row["cache"], f"{row['context']:,}", str(row["batch"]), *compared])
    return ["model", "cache", "context", "batch", "predicted bytes", "measured bytes", ""], lines


def _verdict_on_bytes(rows: Sequence[Mapping[str, Any]]) -> str:
    checked = [row for row in rows if row.get("predicted_cache_bytes") is not None]
    wrong = sum(row["predicted_cache_bytes"] != row["cache_bytes"] for row in checked)
    if wrong:
        return f"{wrong} of {len(checked)} caches differ from the prediction."
    return "All caches have exactly the predicted size." if checked else ""


def speed(run: Run, found: Sequence[Study]) -> Section:
    """Decode time over context, one figure per batch, and every measurement."""
    blocks = []
    for number, bench in enumerate(benches(run.records)):
        names = bench_names(bench, found)
        for batch in sorted({row["batch"] for row in bench_rows(bench)}):
            blocks.append(_decode_figure(bench, batch, f"decode-{number}-{batch}", names))
        notes = [note for note in bench.metrics.get("notes") or () if "read the cache of another" in note]
        about = " ".join(_note(note, names) for note in notes)
        table = renamed(_times(bench), names)
        blocks.append(Block("table", f"Every measurement of {bench.name}", about, table, words=2, folded=True))
        if largest := largest_batches(bench):
            blocks.append(Block("table", f"The largest batch in {_memory(bench)}", about, renamed(largest, names)))
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
    """The largest batch in a given memory, weights and cache, and its speed; None if it was not measured."""
    rows = bench.metrics.get("largest") or []
    if not rows:
        return None
    teacher = {row["context"]: row["tokens_per_s"] for row in rows if row["model"] == rows[0]["model"]}
    lines = []
    for row in rows:
        base, speed = teacher.get(row["context"]), row["tokens_per_s"]
        ratio = NONE if base is None else f"{speed / base:.2f}×"
        lines.append([row["model"], f"{row['context']:,}", f"{row['batch']:,}", f"{speed:,.0f}", ratio])
    return ["model", "context", f"largest batch in {_memory(bench)}", "tokens/s", "of teacher"], lines


def _memory(bench: Record) -> str:
    return f"{size(bench.metrics['largest'][0]['memory'])}, weights and cache"


def _decode_figure(bench: Record, batch: int, name: str, names: Mapping[str, str]) -> Block:
    series: dict[str, dict[int, float]] = {}
    for row in bench_rows(bench, batch=batch):
        model = names.get(row["model"], row["model"])
        label = model if row["cache"] == "native" else f"{model}, {row['cache']} cache"
        series.setdefault(label, {})[row["context"]] = 1e3 * row["decode_s_per_token"]
    contexts = sorted({context for points in series.values() for context in points})
    rows = [
        [label, *(f"{points[x]:.3f}" if x in points else NONE for x in contexts)] for label, points in series.items()
    ]
    title, about = f"Decode at batch {batch}", "Lower is faster."
    table = (["ms per token", *(f"{x:,}" for x in contexts)], rows)
    if len(contexts) < 2:
        return Block("table", title, about, table)
    drawn = [Line(label, *map(list, zip(*sorted(points.items()), strict=True))) for label, points in series.items()]
    svg = figures.lines(
        name, title, drawn, x_label="context (tokens)", y_label="ms per token", log_x=True, from_zero=True
    )
    return Block("figure", title, about, table, svg)


def _times(bench: Record) -> Table:
    columns = ["model", "cache", "context", "batch", "prefill, ms", "decode, ms/token", "of teacher", "kernel"]
    teacher, lines = teacher_times(bench), []
    for row in bench_rows(bench):
        base, seconds = teacher.get((row["context"], row["batch"])), row["decode_s_per_token"]
        lines.append(
            [
                row["model"],
                row["cache"],
                f"{row['context']:,}",
                str(row["batch"]),
                f"{1e3 * row['prefill_s']:.1f}",
                f"{1e3 * seconds:.3f}",
                NONE if base is None else f"{base / seconds:.2f}×",
                str(row.get("kernel", "")),
            ]
        )
    return columns, lines
