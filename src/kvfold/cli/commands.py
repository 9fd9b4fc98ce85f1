"""The command line: the same functions as the Python API, with flags generated from their settings.

Exit 0 done, 2 a mistake that the user can mend (one line on standard error), 3 a gate missed, 130 interrupted. Anything
else is a fault of kvfold: 1, with its traceback and a line that says so.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from kvfold import __version__
from kvfold.cli.console import ERR, OUT, Bars, Lines, silence, table
from kvfold.cli.flags import Command
from kvfold.errors import Interrupted, KvfoldError, SettingError
from kvfold.families import all_families
from kvfold.faults import fault_of
from kvfold.methods import all_methods
from kvfold.progress import Progress
from kvfold.settings import decode

FAULT = 1  # the exit status of what is no mistake of the user: a fault of kvfold

Source = Annotated[str, typer.Argument(help="A checkpoint: a directory, a hub id, or kvfold:demo.", metavar="SRC")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of other inputs or settings.")]
MethodName = Annotated[str, typer.Option("--method", help="How to fold; `kvfold methods` lists them.")]
Teacher = Annotated[str | None, typer.Option(help="The teacher; by default the root of the student's lineage.")]
Records = Annotated[str, typer.Option(help="Folder for the record of this result.", metavar="DIR")]
Name = Annotated[str | None, typer.Option(help="Name of the record; by default that of the directory.")]


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; a user's mistake costs one line on standard error."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind, handler in before.items():
        if handler is not signal.SIG_IGN:  # as a shell has it for what it runs in the background
            signal.signal(kind, stop)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _interrupted() if stopped else _fault(error)  # an import in C makes an ImportError of Ctrl-C
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _run(arguments: Sequence[str]) -> int:
    """Run one command, and say in one line what the user can mend."""
    try:
        asked = next((word for word in arguments if not word.startswith("-")), None)
        left = build(asked)(args=list(arguments) or ["--help"], standalone_mode=False)
        if left == Interrupted.exit_code:  # typer swallows Ctrl-C, and returns this instead
            raise KeyboardInterrupt
    except KvfoldError as error:
        _line(str(error))
        return error.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.Exit as leaving:
        return leaving.exit_code
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise RuntimeError("a library ended the process") from leaving
        silence(sys.stdout)  # typer's, when the reader of its help has left
        return 0
    except Exception as error:  # typer's own usage errors come in classes that moved between its releases
        fault = fault_of(error, paths=True)
        if fault is not None:
            _line(str(fault))
            return fault.exit_code
        said = getattr(error, "format_message", None)
        if said is None:
            raise
        _line(said())
        return KvfoldError.exit_code
    return 0


def _line(message: str) -> None:
    ERR.show(f"kvfold: {' '.join(message.split())}")


def _interrupted() -> int:
    _line("interrupted; the same command goes on from what was finished")
    return Interrupted.exit_code


def _fault(error: Exception) -> int:
    """Say what nobody but us can mend, with everything that we need to know of it."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        ERR.show(line)
    _line(
        f"this is a fault of kvfold {__version__}, not of yours: please report the lines above, with the command and "
        "the versions of torch and transformers"
    )
    return FAULT


# --- the table of commands -----------------------------------------------------------------------------------------

COMMANDS: dict[str, Command] = {}


def command(*settings: str, methods: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command under its function's name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        COMMANDS[function.__name__.strip("_")] = Command(function, settings, methods)
        return function

    return register


def build(asked: str | None) -> typer.Typer:
    """The command line, with the flags of one command: building those of all would import everything."""
    app = typer.Typer(
        name="kvfold",
        help="Fold the KV cache of a trained transformer: plan, convert, uptrain, evaluate, bench, report.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_top)
    for name, each in COMMANDS.items():
        app.command(name)(each.with_flags() if name == asked else _listed(each.function))
    return app


def _listed(function: Callable[..., None]) -> Callable[[], None]:
    def listed() -> None:
        raise AssertionError("only listed: its flags were not built")

    listed.__doc__ = function.__doc__
    return listed


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"kvfold {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fold the KV cache of a trained transformer: plan, convert, uptrain, evaluate, bench, report."""


def _progress() -> Progress:
    return Bars() if ERR.is_terminal else Lines()


def _print_json(value: Any) -> None:
    OUT.print(json.dumps(value, indent=2, default=str), markup=False, soft_wrap=True)  # ASCII, controls escaped


def _finish(value: Mapping[str, Any], as_json: bool, line: str) -> None:
    """End of a stage: JSON for machines, or one line for people."""
    if as_json:
        _print_json(value)
    else:
        OUT.show(line)


# --- the commands, in the order of the house -----------------------------------------------------------------------


@command("predict.plan:PlanSettings", methods=True)
def plan(*, src: Source, given: list[dict[str, Any]], method: MethodName = "gqa", as_json: AsJson = False) -> None:
    """Say what a conversion would save and cost, from config.json alone."""
    from kvfold.predict.plan import PlanSettings
    from kvfold.predict.plan import plan as make

    made = make(src, method, given[1], options=decode(PlanSettings, given[0], "plan"))
    if as_json:
        _print_json(made.as_dict())
        return
    table(f"{src}: {method}", ["", "before", "after"], made.rows())
    for warning in made.warnings:
        OUT.show(f"warning: {warning}")


@command("convert.conversion:ConvertSettings", methods=True)
def convert(
    *,
    src: Source,
    dst: Annotated[Path, typer.Argument(help="Where the student goes.", metavar="DST")],
    given: list[dict[str, Any]],
    method: MethodName = "gqa",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint into a student with a smaller cache; no training."""
    from kvfold.convert.conversion import ConvertSettings
    from kvfold.convert.conversion import convert as make

    options = decode(ConvertSettings, given[0], "convert")
    made = make(src, dst, method, given[1], options=options, overwrite=overwrite, progress=_progress())
    _finish({"path": str(made)}, as_json, f"student: {made}")


@command("train.uptrain:UptrainSettings")
def uptrain(
    *,
    student: Annotated[str, typer.Argument(help="The converted checkpoint.", metavar="STUDENT")],
    out: Annotated[Path, typer.Argument(help="Where the trained student goes.", metavar="OUT")],
    given: list[dict[str, Any]],
    teacher: Teacher = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a student back to quality; stopped at any moment, the same command goes on."""
    from kvfold.train.uptrain import UptrainSettings
    from kvfold.train.uptrain import uptrain as make

    settings = decode(UptrainSettings, given[0], "uptrain")
    made = make(student, out, settings, teacher=teacher, overwrite=overwrite, progress=_progress())
    _finish({"path": str(made)}, as_json, f"uptrained: {made}")


@command("evaluate.evaluation:EvaluateSettings")
def evaluate(
    *,
    model: Annotated[str, typer.Argument(help="The checkpoint to evaluate.", metavar="OUT")],
    given: list[dict[str, Any]],
    teacher: Teacher = None,
    records: Records = "records",
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure quality: perplexity, distance to the teacher, recall, lm-eval tasks, samples, and a gate."""
    from kvfold.evaluate.evaluation import EvaluateSettings
    from kvfold.evaluate.evaluation import evaluate as measure

    settings = decode(EvaluateSettings, given[0], "evaluate")
    made = measure(
        model, settings, teacher=teacher, records=records, name=name, overwrite=overwrite, progress=_progress()
    )
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


@command("evaluate.bench:BenchSettings")
def bench(
    *,
    models: Annotated[list[str], typer.Argument(help="The teacher, then its students.", metavar="SRC OUT...")],
    given: list[dict[str, Any]],
    records: Records = "records",
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure cache bytes, prefill and decode time, teacher and students side by side."""
    from kvfold.evaluate.bench import BenchSettings
    from kvfold.evaluate.bench import bench as measure
    from kvfold.formats import size

    settings = decode(BenchSettings, given[0], "bench")
    made = measure(models, settings, records=records, name=name, overwrite=overwrite, progress=_progress())
    if as_json:
        _print_json(dataclasses.asdict(made))
        return
    table(
        made.name,
        ["tokens x batch", "model", "cache", "prefill ms", "decode ms", "kernel"],
        [
            [
                f"{row['context']:,} x {row['batch']}",
                row["model"] + (", fp8" if row["cache"] == "fp8" else ""),
                size(row["cache_bytes"]),
                f"{1e3 * row['prefill_s']:.4g}",
                f"{1e3 * row['decode_s_per_token']:.4g}",
                row["kernel"],
            ]
            for row in made.metrics["rows"]
        ],
    )
    if made.metrics["largest"]:
        table(
            f"largest batch in {size(settings.memory or 0)}",
            ["tokens", "model", "batch", "cache", "tokens/s"],
            [
                [
                    f"{row['context']:,}",
                    row["model"],
                    f"{row['batch']:,}",
                    size(row["cache_bytes"]),
                    f"{row['tokens_per_s']:,.0f}",
                ]
                for row in made.metrics["largest"]
            ],
        )
    for note in made.metrics["notes"]:
        OUT.show(note)


@command()
def report(
    *,
    run_dir: Annotated[Path, typer.Argument(help="A folder with checkpoints and records.", metavar="RUN_DIR")],
    out: Annotated[Path | None, typer.Option(help="The page; by default RUN_DIR/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page and the model cards of a run."""
    from kvfold.report import report as write

    made = write(run_dir, out=out, progress=_progress())
    _finish({"path": str(made)}, as_json, f"report: {made}")


@command()
def run(
    *,
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes, strict YAML files, in this order.", metavar="RECIPE...")
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key of the recipe.", metavar="KEY=VALUE")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Do all of it from one recipe, over its grid and seeds; safe to repeat."""
    from kvfold.run.runner import run as work

    if out is not None and len(recipes) > 1:
        raise SettingError(
            "several recipes cannot share a folder", where="--out", got=out, next="leave it out: each has runs/NAME"
        )
    for recipe in recipes:
        made = work(recipe, out=out, changes=changes or (), overwrite=overwrite, progress=_progress())
        _summary(made.parent, made, as_json)


@command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fold the checkpoint that ships with the package: GQA and MQA, uptrained, measured, reported."""
    from kvfold.run.runner import demo_recipe
    from kvfold.run.runner import run as work

    made = work(demo_recipe(), out=out, overwrite=overwrite, progress=_progress())
    _summary(made.parent, made, as_json)


def _summary(folder: Path, page: Path, as_json: bool) -> None:
    from kvfold.report import summary
    from kvfold.report.folder import collect

    records = collect(folder).records
    if as_json:
        _print_json({"report": str(page), "records": [dataclasses.asdict(each) for each in records]})
        return
    columns, rows = summary(records)
    table("", columns, rows)
    OUT.show(f"report: {page}")


@command("train.pretrain:PretrainSettings")
def pretrain(
    *,
    config: Annotated[Path, typer.Argument(help="A config.json of a supported architecture, or a recipe.")],
    out: Annotated[Path, typer.Argument(help="Where the model goes.", metavar="OUT")],
    given: list[dict[str, Any]],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from nothing, with a tokenizer of its own, in the same loop."""
    from kvfold.train.pretrain import PretrainSettings
    from kvfold.train.pretrain import pretrain as make

    settings = decode(PretrainSettings, given[0], "pretrain")
    made = make(config, out, settings, overwrite=overwrite, progress=_progress())
    _finish({"path": str(made)}, as_json, f"model: {made}")


@command("export:ExportSettings")
def export(
    *,
    src: Source,
    dst: Annotated[Path, typer.Argument(help="Where the export goes.", metavar="DST")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="The engine: ctranslate2, gguf, or transformers (with the code that a student needs).",
            metavar="ENGINE",
        ),
    ],
    given: list[dict[str, Any]],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another engine's format, and check it by loading it there."""
    from kvfold.export import ExportSettings
    from kvfold.export import export as write

    settings = decode(ExportSettings, given[0], "export")
    made = write(src, dst, to, settings, overwrite=overwrite, progress=_progress())
    _finish({"path": str(made)}, as_json, f"export: {made}")


@command()
def methods(*, as_json: AsJson = False) -> None:
    """List the methods and their settings."""
    found = {name: _described(each.Config) for name, each in all_methods().items()}
    about = {name: each.about for name, each in all_methods().items()}
    if as_json:
        _print_json({name: {"about": about[name], "settings": settings} for name, settings in found.items()})
        return
    for name, settings in found.items():
        OUT.show(about[name])
        for setting, words in settings.items():
            OUT.show(f"    --{setting.replace('_', '-')}  {words}")


def _described(settings: type) -> dict[str, str]:
    return {each.name: each.metadata.get("help", "") for each in dataclasses.fields(settings)}


@command()
def families(*, as_json: AsJson = False) -> None:
    """List the model families and the architectures that each takes."""
    found = list(all_families().values())
    if as_json:
        _print_json({each.name: {"model_types": each.model_types, "about": each.about} for each in found})
        return
    table("", ["family", "model_type", ""], [(each.name, ", ".join(each.model_types), each.about) for each in found])
