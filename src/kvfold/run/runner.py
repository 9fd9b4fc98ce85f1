"""A whole run from one recipe: plan, convert, uptrain, fine-tune, evaluate, bench, report, over a grid and seeds.

Every stage keeps its own state on disk, so a run that was stopped goes on where it was, and a run that is complete
says so. A missed gate does not stop the rows after it: the report is written first, then the run ends with exit 3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kvfold import methods
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk import record
from kvfold.disk.output import check_apart, disk_errors, fingerprint, replacing
from kvfold.disk.record import Record
from kvfold.errors import GateMissed, OutputError, SettingError
from kvfold.evaluate.bench import BenchSettings, bench
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.families import family_of
from kvfold.inputs import read_text
from kvfold.predict.plan import Plan, PlanSettings, plan
from kvfold.progress import SILENT, Progress
from kvfold.report import report
from kvfold.report.folder import RECIPE
from kvfold.run.recipe import CHAIN, LABEL, Cell, Recipe, cells, read_recipe
from kvfold.settings import decode, read_yaml
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.uptrain import UptrainSettings, uptrain

STAGES = ("converted", "uptrained", "finetuned")  # folders of a run that hold its outputs
AFTER = "after"
"""In a recipe's `convert` section: the conversion that comes first, with keys of its own."""


@dataclass
class _Run:
    """What the stages of one run share."""

    recipe: Recipe
    folder: Path
    overwrite: bool
    progress: Progress
    missed: list[str] = field(default_factory=list)

    @property
    def records(self) -> Path:
        return self.folder / "records"


def run(
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Do everything that a recipe says and return the path of the report.

    `changes` are `stage.key=value` strings laid over the recipe. Raises SettingError before any work when a setting
    of any row is wrong, and GateMissed after the report when a gate does not hold.
    """
    file = None if isinstance(recipe, Recipe) else Path(recipe)
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, changes)
    elif changes:
        raise SettingError("changes are laid over a recipe file; change the Recipe itself")
    work = _Run(recipe, Path(out or Path("runs") / recipe.name), overwrite, progress)
    rows = cells(recipe)
    _check_places(work, file)
    _check(work, rows, planned=recipe.pretrain is None)
    if recipe.pretrain is not None:
        _pretrain(work, recipe.pretrain)
        _check(work, rows)
    with disk_errors(work.folder):
        work.folder.mkdir(parents=True, exist_ok=True)
        if not _is(work.folder / RECIPE, file):
            written = yaml.safe_dump(asdict(recipe, dict_factory=_given), sort_keys=False, allow_unicode=True)
            with replacing(work.folder / RECIPE) as sibling:
                sibling.write_text(written, encoding="utf-8")
    _plans(work, rows)
    reference = recipe.source if recipe.finetune is None else str(_finetune(work, recipe.source, "teacher", 0))
    # one that was fine-tuned is nobody's student here
    itself = None if recipe.finetune is None else reference
    teacher = _evaluate(work, reference, "teacher", {"role": "teacher", "method": "identity"}, teacher=itself)
    students: dict[str, Path] = {}
    for number, cell in enumerate(rows, 1):
        progress.say(f"row {number} of {len(rows)}: {cell.label}")
        students.setdefault(fingerprint(dict(cell.convert)), _cell(work, cell, reference))
    if recipe.bench is not None:
        settings = decode(BenchSettings, recipe.bench, "bench")
        models: list[str | Path] = [reference, *students.values()]
        bench(models, settings, records=work.records, name=recipe.name, overwrite=overwrite, progress=progress)
    page = report(work.folder, progress=progress)
    if work.missed:
        raise GateMissed("; ".join(work.missed), where="gate", next=f"see {page}")
    progress.say(f"teacher loss {teacher.metrics['loss']:.4f}; report: {page}")
    return page


def _check_places(work: _Run, file: Path | None) -> None:
    """Refuse to write over what the run reads, or over what others wrote in its folder. Raises OutputError."""
    recipe = work.recipe
    reads = {"data": recipe.data, "heldout text": recipe.heldout, "recipe": file}
    reads |= {"calibration text": recipe.convert.get("calibration")}
    for stage in STAGES:
        check_apart(work.folder / stage, reads)
    if recipe.pretrain is None:
        check_apart(work.folder / "new", {"source": recipe.source})
    kept = work.folder / RECIPE
    if os.path.lexists(kept) and not _is(kept, file) and not _written_by_run(kept):
        raise OutputError(
            "exists and was not written by kvfold",
            where=kept,
            next="move it away, or give another folder with --out",
        )


def _is(path: Path, file: Path | None) -> bool:
    """Is a path the very recipe that runs? It then stays as it is."""
    return file is not None and os.path.realpath(path) == os.path.realpath(file)


def _written_by_run(path: Path) -> bool:
    """Is a recipe as `run` writes one: every default is there, and not a blank or a comment of a person's?"""
    if path.is_symlink():
        return False
    try:
        content, text = read_yaml(path), read_text(path, error=SettingError)
    except SettingError:
        return False
    always = {each.name for each in fields(Recipe) if each.default is not None and each.default != ()}
    return always <= set(content) and text == yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _given(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a recipe that say something, as YAML writes them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs if value not in (None, ())}


def _check(work: _Run, rows: Sequence[Cell], *, planned: bool = True) -> None:
    """Decode every setting of every row, so that a typing error costs a second and not an hour.

    Conversions are `planned` too, once their source is there.
    """
    _plan_settings(work.recipe)
    if work.recipe.pretrain is not None:
        _pretraining(work, work.recipe.pretrain)
    if work.recipe.finetune is not None:
        _task(work, seed=0)
        if work.recipe.control:
            raise SettingError(
                "the control cannot be fine-tuned", where=work.recipe.name, next="add a row of method identity"
            )
    for cell in rows:
        for settings in _chain(cell.convert):
            decode(ConvertSettings, _of_stage(settings), "convert")
            name, own = _method(settings)
            decode(methods.get(name).Config, own, name)
        if len(_label(cell.convert)) > LABEL:
            raise SettingError("the name of a row is too long", where="convert", got=_label(cell.convert))
        if planned:
            _plan(work, cell)
        elif isinstance(made := (work.recipe.pretrain or {})["config"], Mapping):
            name, own = _method(_chain(cell.convert)[0])
            methods.check(name, decode(methods.get(name).Config, own, name), family_of(dict(made)).shape(dict(made)))
        if cell.uptrain is not None:
            decode(UptrainSettings, {**cell.uptrain, "data": work.recipe.data, "seed": cell.seed}, "uptrain")
    evaluation = {**work.recipe.evaluate, "data": work.recipe.heldout}
    if work.recipe.control:
        evaluation.setdefault("control", "the run's own")  # known when the control has been evaluated
    decode(EvaluateSettings, evaluation, "evaluate")
    decode(BenchSettings, work.recipe.bench or {}, "bench")


def _method(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A recipe's `convert` section without the fields of the stage itself -> method name and its settings."""
    own = {*ConvertSettings.__dataclass_fields__, "method", AFTER}
    return str(settings.get("method", "gqa")), {key: value for key, value in settings.items() if key not in own}


def _of_stage(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the stage itself."""
    return {key: value for key, value in settings.items() if key in ConvertSettings.__dataclass_fields__}


def _chain(settings: Mapping[str, Any], deep: int = 0) -> list[Mapping[str, Any]]:
    """A `convert` section as conversions one after the other: `after` holds the one that comes first, if any.

    What comes first reads the same calibration unless it names its own.
    """
    first = settings.get(AFTER)
    if first is None:
        return [settings]
    if not isinstance(first, Mapping) or any(not isinstance(key, str) for key in first):
        raise SettingError(
            "after must be a previous conversion", where="convert", got=repr(first), allowed="keys as in convert"
        )
    read = {key: value for key, value in settings.items() if key.startswith("calibration")}
    if deep >= CHAIN:
        raise SettingError("too many conversions come before this one", where="convert", allowed=f"at most {CHAIN}")
    return [*_chain({**read, **first}, deep + 1), settings]


def _plan(work: _Run, cell: Cell) -> Plan:
    *before, last = (_method(settings) for settings in _chain(cell.convert))
    return plan(work.recipe.source, *last, options=_plan_settings(work.recipe), after=before)


def _told(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a record says of conversions that came first."""
    words = [
        " ".join([name, *(f"{key} {value}" for key, value in own.items())])
        for name, own in map(_method, _chain(settings)[:-1])
    ]
    return {AFTER: ", ".join(words)} if words else {}


def _plan_settings(recipe: Recipe) -> PlanSettings:
    return decode(PlanSettings, recipe.plan or {}, "plan")


def _plans(work: _Run, rows: Sequence[Cell]) -> None:
    for cell in rows:
        name, settings = _method(cell.convert)
        made, told = _plan(work, cell).as_dict(), _told(cell.convert)
        identity = {"method": name, **settings, **told, "plan": dict(work.recipe.plan or {})}
        made["settings"] = {**made["settings"], **told}
        record.write(record.make("plan", f"{work.recipe.name}/{name}", identity, made), work.records)


def _pretraining(work: _Run, said: Mapping[str, Any]) -> PretrainSettings:
    """How the source is trained, on the recipe's text unless another is named."""
    if "config" not in said:
        raise SettingError("pretrain has no config", where=work.recipe.name, next="add the keys of config.json there")
    if not isinstance(said["config"], str | Mapping):
        raise SettingError(
            f"config cannot be {said['config']!r}",
            where="pretrain",
            allowed="the keys of config.json, or the name of a file that holds them",
        )
    rest = {key: value for key, value in said.items() if key != "config"}
    return decode(PretrainSettings, {"data": work.recipe.data, **rest}, "pretrain")


def _pretrain(work: _Run, said: Mapping[str, Any]) -> None:
    """Make the source: `source` is then the place where it will lie."""
    settings = _pretraining(work, said)
    pretrain(said["config"], work.recipe.source, settings, overwrite=work.overwrite, progress=work.progress)


def _task(work: _Run, seed: int) -> UptrainSettings:
    """How a model is fine-tuned: by cross-entropy, unless the recipe says otherwise."""
    said = {"data": work.recipe.data, "loss": "ce", **(work.recipe.finetune or {}), "seed": seed}
    return decode(UptrainSettings, said, "finetune")


def _finetune(work: _Run, model: str | Path, label: str, seed: int) -> Path:
    """Train a model on the task of the recipe."""
    out = work.folder / "finetuned" / label
    return uptrain(model, out, _task(work, seed), overwrite=work.overwrite, progress=work.progress)


def _cell(work: _Run, cell: Cell, reference: str) -> Path:
    """Convert, evaluate, uptrain and evaluate one row; what another row has made already is used as it is.

    With a task to fine-tune on, models are evaluated behind that alone, beside the `reference`; conversion and
    uptraining are then done once for all seeds.
    """
    recipe = work.recipe
    name, settings = _method(cell.convert)
    first, *others = _chain(cell.convert)
    converted = _converted(work, first, recipe.source)
    for each in others:
        converted = _converted(work, each, converted)
    label = _label(cell.convert)
    told: dict[str, Any] = {key: cell.convert[key] for key in ("repair", "calibration_seed") if key in cell.convert}
    row = {"role": "student", "method": name, **settings, **told, **_told(cell.convert), "alpha": 0}
    if recipe.finetune is not None:
        return _tuned_cell(work, cell, converted, row, reference)
    last = cell.uptrain is None
    _evaluate(work, converted, f"{label}/converted", row, teacher=recipe.source, judged=last)
    if cell.uptrain is None:
        return converted
    control = _control(work, cell, cell.uptrain) if recipe.control else None
    trained = work.folder / "uptrained" / cell.label
    wanted = decode(UptrainSettings, {**cell.uptrain, "data": recipe.data, "seed": cell.seed}, "uptrain")
    uptrain(converted, trained, wanted, teacher=recipe.source, overwrite=work.overwrite, progress=work.progress)
    row |= {"seed": cell.seed, **_spent(cell.uptrain, recipe)}
    _evaluate(work, trained, f"{cell.label}/uptrained", row, teacher=recipe.source, judged=True, control=control)
    return trained


def _converted(work: _Run, settings: Mapping[str, Any], source: str | Path) -> Path:
    """Convert a source, or find it converted."""
    return convert(
        source,
        work.folder / "converted" / _label(settings),
        *_method(settings),
        options=decode(ConvertSettings, _of_stage(settings), "convert"),
        overwrite=work.overwrite,
        progress=work.progress,
    )


def _tuned_cell(work: _Run, cell: Cell, converted: Path, row: Mapping[str, Any], reference: str) -> Path:
    """Uptrain a student once, fine-tune it with the seed of the row, and evaluate it."""
    made, task = converted, _task(work, cell.seed)
    spent: dict[str, Any] = {"loss_name": "the task"}
    if cell.uptrain is not None:
        said = {"seed": 0, **cell.uptrain, "data": work.recipe.data}
        once = work.folder / "uptrained" / cell.label.rpartition("_seed-")[0]
        wanted = decode(UptrainSettings, said, "uptrain")
        made = uptrain(
            converted, once, wanted, teacher=work.recipe.source, overwrite=work.overwrite, progress=work.progress
        )
        spent = _spent(cell.uptrain, work.recipe)
        spent["loss_name"] = f"{spent['loss_name'] or 'the default loss'}, then the task"
    tuned = _finetune(work, made, cell.label, cell.seed)
    row = {**row, "seed": cell.seed, **spent, "tokens": task.tokens}
    _evaluate(work, tuned, f"{cell.label}/finetuned", row, teacher=reference, judged=True)
    return tuned


def _control(work: _Run, cell: Cell, settings: Mapping[str, Any]) -> Path:
    """Train the unconverted teacher on the same tokens and return the record of its evaluation.

    By cross-entropy, whatever the students' loss is: the teacher's distance to itself is nothing to learn from.
    """
    given = {key: value for key, value in settings.items() if key != "converted_only"}
    spent = {**given, "data": work.recipe.data, "seed": cell.seed, "loss": "ce", "stages": None}
    wanted = decode(UptrainSettings, spent, "uptrain")
    label = f"control_{fingerprint(spent)[:8]}_seed-{cell.seed}"
    trained = work.folder / "uptrained" / label
    uptrain(work.recipe.source, trained, wanted, overwrite=work.overwrite, progress=work.progress)
    row = {"role": "control", "method": "identity", "seed": cell.seed, **_spent(spent, work.recipe)}
    made = _evaluate(work, trained, label, row, teacher=work.recipe.source)
    return record.path_of(work.records, made.kind, made.name, made.identity)


def _spent(settings: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What a row of a table says of its uptraining: its tokens, its loss, and what the matrix sets in it besides."""
    varied = {key.partition(".")[2] for grid in recipe.matrix for key in grid if key.startswith("uptrain.")}
    others = sorted(varied - {"alpha", "tokens", "loss", "stages"} & settings.keys())
    named = {key: settings[key] for key in ("alpha", "tokens") if settings.get(key) is not None}
    if "alpha" in named:
        named["alpha"] = float(named["alpha"])  # YAML may quote it
    if others:
        named["varied"] = ", ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in others)
    return named | {"loss_name": settings.get("stages") or settings.get("loss")}


def _label(settings: Mapping[str, Any]) -> str:
    """The folder of a conversion; of a chain, its steps in order."""
    labels = []
    for each in _chain(settings):
        method, said = _method(each)[0], {key: value for key, value in each.items() if key not in ("method", AFTER)}
        places = {key: Path(str(value)).name for key, value in said.items() if key == "calibration"}
        labels.append("_".join([method, *(f"{key}-{value}" for key, value in sorted({**said, **places}.items()))]))
    return "".join(letter if letter.isalnum() or letter in "-_.=" else "-" for letter in "_then_".join(labels))


def _evaluate(
    work: _Run,
    model: str | Path,
    name: str,
    row: Mapping[str, Any],
    *,
    teacher: str | None,
    judged: bool = False,
    control: Path | None = None,
) -> Record:
    """Evaluate one model; the gate is for students that are finished, and a missed one waits for the report."""
    wanted = {**work.recipe.evaluate, "data": work.recipe.heldout}
    wanted |= {"gate": wanted.get("gate") if judged else None, "control": control and str(control)}
    settings = decode(EvaluateSettings, wanted, "evaluate")
    identity = f"{work.recipe.name}/{name}"
    try:
        return evaluate(
            model,
            settings,
            teacher=teacher,
            records=work.records,
            name=identity,
            row=row,
            overwrite=work.overwrite,
            progress=work.progress,
        )
    except GateMissed as missed:
        work.missed.append(str(missed))
        return next(each for each in record.read_all(work.records) if each.name == identity)


def demo_recipe() -> Path:
    """The recipe of `kvfold demo`, which ships with the package."""
    return Path(__file__).parents[1] / "assets" / "demo.yaml"
