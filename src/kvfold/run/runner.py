"""One recipe from end to end: plan, convert, uptrain, fine-tune, evaluate, bench, report, over a grid and seeds.

Each stage keeps its state on disk: the same command continues a run that stopped, and reuses what is complete. A missed
gate does not stop the rows after it: the run ends with exit 3 once the report is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from kvfold import methods
from kvfold.compare.comparison import compare
from kvfold.compare.settings import CompareSettings
from kvfold.convert.conversion import convert
from kvfold.convert.settings import ADVANCED_NAMES, ConvertSettings
from kvfold.disk import record
from kvfold.disk.output import check_apart, disk_errors, fingerprint, replacing
from kvfold.disk.record import Record
from kvfold.errors import GateMissed, OutputError, SettingError
from kvfold.evaluate import gate
from kvfold.evaluate.bench import bench
from kvfold.evaluate.evaluation import evaluate
from kvfold.evaluate.settings import BenchSettings, EvaluateSettings
from kvfold.families import family_of
from kvfold.inputs import read_text
from kvfold.predict.plan import Plan, PlanSettings, plan, read_source
from kvfold.predict.student_config import draft
from kvfold.progress import SILENT, Progress
from kvfold.report import report
from kvfold.report.folder import RECIPE
from kvfold.run.recipe import CHAIN, LABEL, Cell, Recipe, cells, read_recipe
from kvfold.settings import decode, read_yaml
from kvfold.text.pairs import check_text
from kvfold.train.pretrain import pretrain
from kvfold.train.settings import PretrainSettings, UptrainSettings
from kvfold.train.uptrain import uptrain

STAGES = ("converted", "uptrained", "finetuned")  # folders of a run with its outputs
COMPARED = "compared"
"""The folder of a run with what a comparison makes."""
AFTER = "after"
"""Key of a `convert` section for the conversion that comes first."""
FIRST = ("effort", "thorough")
"""The effort of conversions before there was a choice: names and records of rows do not say it."""
RECORDED = ("effort", "repair", "calibration_seed", *ADVANCED_NAMES)  # of ConvertSettings, in the records of a row


@dataclass
class _Run:
    """State that the stages of one run share."""

    recipe: Recipe
    folder: Path
    overwrite: bool
    progress: Progress
    missed: list[str] = field(default_factory=list)

    @property
    def records(self) -> Path:
        return self.folder / "records"

    @property
    def how(self) -> dict[str, Any]:
        return {"overwrite": self.overwrite, "progress": self.progress}


def run(
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    changes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Run a recipe and return the path of its report.

    `changes` are `stage.key=value` strings that replace keys of the recipe file. Raises SettingError before any work if
    a setting of any row is wrong, and GateMissed after the report if a gate does not hold.
    """
    file = None if isinstance(recipe, Recipe) else Path(recipe)
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, changes)
    elif changes:
        raise SettingError("changes are for recipe files", next="change the Recipe itself")
    work = _Run(recipe, Path(out or Path("runs") / recipe.name), overwrite, progress)
    rows = cells(recipe)
    _check_places(work, file)
    _check(work, rows, planned=recipe.pretrain is None)
    if recipe.pretrain is not None:
        settings = _pretraining(work, recipe.pretrain)
        pretrain(recipe.pretrain["config"], recipe.source, settings, **work.how)
        _check(work, rows)
    with disk_errors(work.folder):
        work.folder.mkdir(parents=True, exist_ok=True)
        if not _is(work.folder / RECIPE, file):
            written = yaml.safe_dump(asdict(recipe, dict_factory=_given), sort_keys=False, allow_unicode=True)
            with replacing(work.folder / RECIPE) as sibling:
                sibling.write_text(written, encoding="utf-8")
    _plans(work, rows)
    reference = recipe.source if recipe.finetune is None else str(_finetune(work, recipe.source, "teacher", 0))
    itself = None if recipe.finetune is None else reference  # a fine-tuned teacher is compared with itself
    teacher = _evaluate(work, reference, "teacher", {"role": "teacher", "method": "identity"}, teacher=itself)
    students: dict[str, Path] = {}
    for number, cell in enumerate(rows, 1):
        progress.say(f"row {number} of {len(rows)}: {cell.label}")
        students.setdefault(fingerprint(dict(cell.convert)), _cell(work, cell, reference))
    if recipe.bench is not None:
        timing = decode(BenchSettings, recipe.bench, "bench")
        models: list[str | Path] = [reference, *students.values()]
        bench(models, timing, records=work.records, name=recipe.name, **work.how)
    if recipe.compare is not None:
        made, folder = list(students.values()), work.folder / COMPARED
        compare(reference, made, _comparing(recipe), out=folder, records=work.records, name=recipe.name, **work.how)
    page = report(work.folder, progress=progress)
    if work.missed:
        raise GateMissed("; ".join(work.missed), where="gate", next=f"see {page}")
    progress.say(f"teacher loss {teacher.metrics['loss']:.4f}; report: {page}")
    return page


def _check_places(work: _Run, file: Path | None) -> None:
    """Refuse to replace what the run reads, or a recipe that kvfold did not write. Raises OutputError."""
    recipe = work.recipe
    reads = {"data": recipe.data, "heldout text": recipe.heldout, "recipe": file}
    reads |= {"calibration text": recipe.convert.get("calibration")}
    for stage in (*STAGES, COMPARED):
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
    """Whether a path is the recipe file that runs, which is left as it is."""
    return file is not None and os.path.realpath(path) == os.path.realpath(file)


def _written_by_run(path: Path) -> bool:
    """Whether a recipe is as `run` writes it: with every default, without a comment or another blank."""
    if path.is_symlink():
        return False
    try:
        content, text = read_yaml(path), read_text(path, error=SettingError)
    except SettingError:
        return False
    always = {each.name for each in fields(Recipe) if each.default is not None and each.default != ()}
    return always <= set(content) and text == yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _given(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a recipe that have a value, as YAML writes them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs if value not in (None, ())}


def _check(work: _Run, rows: Sequence[Cell], *, planned: bool = True) -> None:
    """Decode every setting of every row, so that a typing error costs a second and not an hour.

    Conversions are also `planned`, once their source exists.
    """
    _plan_settings(work.recipe)
    _check_texts(work.recipe, rows)
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
            _options(settings)
            name, own = _method(settings)
            decode(methods.get(name).Config, own, name)
        if len(_label(cell.convert)) > LABEL:
            raise SettingError("the name of a row is too long", where="convert", got=_label(cell.convert))
        if planned:
            _plan(work, cell)
        elif isinstance(made := (work.recipe.pretrain or {})["config"], Mapping):
            name, own = _method(_chain(cell.convert)[0])
            family = family_of(dict(made))
            draft(dict(made), family, family.shape(dict(made)), name, own)
        if cell.uptrain is not None:
            _uptraining(work, {**cell.uptrain, "seed": cell.seed})
    evaluation = {**work.recipe.evaluate, "data": work.recipe.heldout}
    if work.recipe.control:
        evaluation.setdefault("control", "the run's own")  # known when the control has been evaluated
    decode(EvaluateSettings, evaluation, "evaluate")
    decode(BenchSettings, work.recipe.bench or {}, "bench")
    _comparing(work.recipe)


def _check_texts(recipe: Recipe, rows: Sequence[Cell]) -> None:
    """Raise DataError for a text of any stage that is missing, before the first stage runs."""
    config = read_source(recipe.source)[0] if recipe.pretrain is None else recipe.pretrain.get("config")
    if isinstance(config, Mapping):
        steps = (each for cell in rows for each in _chain(cell.convert))
        texts = [
            recipe.data,
            recipe.heldout,
            (recipe.finetune or {}).get("data"),
            *(each.get("calibration") for each in steps),
        ]
        for text in dict.fromkeys(str(each) for each in texts if each is not None):
            check_text(text, paired=family_of(dict(config)).encoder_decoder)


def _method(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method of a `convert` section, and its settings without those of the stage."""
    own = {*ConvertSettings.__dataclass_fields__, "method", AFTER}
    return str(settings.get("method", "gqa")), {key: value for key, value in settings.items() if key not in own}


def _options(settings: Mapping[str, Any]) -> ConvertSettings:
    """The settings of a `convert` section that belong to the stage."""
    own = {key: value for key, value in settings.items() if key in ConvertSettings.__dataclass_fields__}
    return decode(ConvertSettings, own, "convert")


def _chain(settings: Mapping[str, Any], deep: int = 0) -> list[Mapping[str, Any]]:
    """The conversions of a `convert` section in order: `after` is the one that comes first.

    It uses the same calibration and effort, unless it names its own.
    """
    first = settings.get(AFTER)
    if first is None:
        return [settings]
    if not isinstance(first, Mapping) or any(not isinstance(key, str) for key in first):
        raise SettingError(
            "after must be a previous conversion", where="convert", got=repr(first), allowed="keys as in convert"
        )
    read = {key: value for key, value in settings.items() if key.startswith(("calibration", "effort"))}
    if deep >= CHAIN:
        raise SettingError("too many conversions come before this one", where="convert", allowed=f"at most {CHAIN}")
    return [*_chain({**read, **first}, deep + 1), settings]


def _plan(work: _Run, cell: Cell) -> Plan:
    *before, last = (_method(settings) for settings in _chain(cell.convert))
    return plan(work.recipe.source, *last, options=_plan_settings(work.recipe), after=before)


def _before(settings: Mapping[str, Any]) -> dict[str, str]:
    """The conversions that came first, as records keep them."""
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
        made, before = _plan(work, cell).as_dict(), _before(cell.convert)
        asked = {"method": name, **settings, **before, "plan": dict(work.recipe.plan or {})}
        made["settings"] = {**made["settings"], **before}
        identity = fingerprint(asked)  # as in kvfold 0.1, whose plan is replaced
        record.write(record.make("plan", f"{work.recipe.name}/{name}", asked, made, identity=identity), work.records)


def _pretraining(work: _Run, given: Mapping[str, Any]) -> PretrainSettings:
    """The settings that train the source, by default on the text of the recipe."""
    if "config" not in given:
        raise SettingError("pretrain has no config", where=work.recipe.name, next="add the keys of config.json there")
    if not isinstance(given["config"], str | Mapping):
        raise SettingError(
            f"config cannot be {given['config']!r}",
            where="pretrain",
            allowed="the keys of config.json, or the name of a file that holds them",
        )
    rest = {key: value for key, value in given.items() if key != "config"}
    return decode(PretrainSettings, {"data": work.recipe.data, **rest}, "pretrain")


def _uptraining(work: _Run, given: Mapping[str, Any]) -> UptrainSettings:
    return decode(UptrainSettings, {**given, "data": work.recipe.data}, "uptrain")


def _comparing(recipe: Recipe) -> CompareSettings:
    """The settings of the comparison, whose pruned model trains on the text of the recipe."""
    given = {"data": recipe.heldout, **(recipe.compare or {})}
    if given.get("tokens") is not None:
        given.setdefault("train_data", recipe.data)
    return decode(CompareSettings, given, "compare")


def _task(work: _Run, seed: int) -> UptrainSettings:
    """The settings that fine-tune a model, by default with cross-entropy."""
    given = {"data": work.recipe.data, "loss": "ce", **(work.recipe.finetune or {}), "seed": seed}
    return decode(UptrainSettings, given, "finetune")


def _finetune(work: _Run, model: str | Path, label: str, seed: int) -> Path:
    return uptrain(model, work.folder / "finetuned" / label, _task(work, seed), **work.how)


def _cell(work: _Run, cell: Cell, reference: str) -> Path:
    """Convert, evaluate, uptrain and evaluate one row; what another row has made is reused.

    With a task to fine-tune on, models are evaluated only after it, beside the `reference`; conversion and uptraining
    are then done once for all seeds.
    """
    recipe = work.recipe
    converted: str | Path = recipe.source
    for each in _chain(cell.convert):
        out = work.folder / "converted" / _label(each)
        converted = convert(converted, out, *_method(each), options=_options(each), **work.how)
    row = {"role": "student", **_made(cell.convert, recipe), "alpha": 0}
    if recipe.finetune is not None:
        return _tuned_cell(work, cell, Path(converted), row, reference)
    last, label = cell.uptrain is None, f"{_label(cell.convert)}/converted"
    _evaluate(work, converted, label, row, teacher=recipe.source, judged=last)
    if cell.uptrain is None:
        return Path(converted)
    control = _control(work, cell, cell.uptrain) if recipe.control else None
    wanted = _uptraining(work, {**cell.uptrain, "seed": cell.seed})
    trained = uptrain(converted, work.folder / "uptrained" / cell.label, wanted, teacher=recipe.source, **work.how)
    row |= {"seed": cell.seed, **_spent(cell.uptrain, recipe)}
    _evaluate(work, trained, f"{cell.label}/uptrained", row, teacher=recipe.source, judged=True, control=control)
    return trained


def _tuned_cell(work: _Run, cell: Cell, converted: Path, row: Mapping[str, Any], reference: str) -> Path:
    """Uptrain a student once, fine-tune it with the seed of the row, and evaluate it."""
    made, spent = converted, {"loss_name": "the task"}
    if cell.uptrain is not None:
        once = work.folder / "uptrained" / cell.label.rpartition("_seed-")[0]
        made = uptrain(converted, once, _uptraining(work, cell.uptrain), teacher=work.recipe.source, **work.how)
        spent = _spent(cell.uptrain, work.recipe)
        spent["loss_name"] = f"{spent['loss_name'] or 'the default loss'}, then the task"
    tuned = _finetune(work, made, cell.label, cell.seed)
    row = {**row, "seed": cell.seed, **spent, "tokens": _task(work, cell.seed).tokens}
    _evaluate(work, tuned, f"{cell.label}/finetuned", row, teacher=reference, judged=True)
    return tuned


def _control(work: _Run, cell: Cell, settings: Mapping[str, Any]) -> Path:
    """Train the unconverted teacher on the same tokens, and return the path of the record of its evaluation.

    The loss is cross-entropy, whatever the students' is: the KL of the teacher to itself teaches nothing.
    """
    given = {key: value for key, value in settings.items() if key != "converted_only"}
    spent = {**given, "data": work.recipe.data, "seed": cell.seed, "loss": "ce", "stages": None}
    label = f"control_{fingerprint(spent)[:8]}_seed-{cell.seed}"
    trained = uptrain(work.recipe.source, work.folder / "uptrained" / label, _uptraining(work, spent), **work.how)
    row = {"role": "control", "method": "identity", "seed": cell.seed, **_spent(spent, work.recipe)}
    made = _evaluate(work, trained, label, row, teacher=work.recipe.source)
    return record.path_of(work.records, made.kind, made.name, made.identity)


def _made(settings: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The conversion of a row, for tables: its method, and the settings that are recorded or that the matrix varies."""
    name, own = _method(settings)
    varied = sorted(_varied(recipe, "convert") - {"method", AFTER, *own, *RECORDED})
    given = {**settings, "calibration": _text(settings)}
    named = {key: given[key] for key in (*RECORDED, *varied) if key in settings and (key, given[key]) != FIRST}
    return {"method": name, **own, **named, **_before(settings)}


def _spent(settings: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The uptraining of a row, for tables: its tokens, its loss, and the settings that the matrix varies."""
    others = sorted(_varied(recipe, "uptrain") - {"alpha", "tokens", "loss", "stages"} & settings.keys())
    named = {key: settings[key] for key in ("alpha", "tokens") if settings.get(key) is not None}
    if "alpha" in named:
        named["alpha"] = float(named["alpha"])  # YAML may quote it
    if others:
        named["varied"] = ", ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in others)
    return named | {"loss_name": settings.get("stages") or settings.get("loss")}


def _varied(recipe: Recipe, section: str) -> set[str]:
    """The settings of a section that the matrix varies."""
    return {key.removeprefix(f"{section}.") for grid in recipe.matrix for key in grid if key.startswith(f"{section}.")}


def _text(settings: Mapping[str, Any]) -> str:
    """The calibration text of a conversion, without its folder; nothing without one."""
    return Path(str(settings.get("calibration", ""))).name


def _label(settings: Mapping[str, Any]) -> str:
    """The folder of a conversion; of several, in their order."""
    labels = []
    for each in _chain(settings):
        given = {key: value for key, value in each.items() if key not in ("method", AFTER) and (key, value) != FIRST}
        if "calibration" in given:
            given["calibration"] = _text(given)
        labels.append("_".join([_method(each)[0], *(f"{key}-{value}" for key, value in sorted(given.items()))]))
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
    """Evaluate one model; the gate is for finished students, and a missed one waits for the report."""
    wanted = {**work.recipe.evaluate, "data": work.recipe.heldout}
    wanted |= {"control": control and str(control)} | ({} if judged else {"gate": gate.DEFAULT})
    settings, name = decode(EvaluateSettings, wanted, "evaluate"), f"{work.recipe.name}/{name}"
    try:
        made = evaluate(model, settings, teacher=teacher, records=work.records, name=name, row=row, **work.how)
    except GateMissed as missed:
        work.missed.append(str(missed))
        return max((each for each in record.read_all(work.records) if each.name == name), key=lambda each: each.date)
    if judged and settings.gate == gate.DEFAULT and (lost := gate.missed_line(gate.judge_default(made.metrics))):
        work.progress.say(f"{name} misses the default gate: {lost}")
    return made


def demo_recipe() -> Path:
    """The recipe of `kvfold demo`, which ships with the package."""
    return Path(__file__).parents[1] / "assets" / "demo.yaml"
