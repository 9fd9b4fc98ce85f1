"""Recipes: the YAML file of a run, and the rows of its grid."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvfold.disk.output import fingerprint
from kvfold.errors import SettingError
from kvfold.inputs import check_depth, parse_yaml
from kvfold.settings import SEEDS, check_range, decode, read_yaml, setting

ROWS = 10_000  # of a run
CHAIN = 8  # recipes that extend one another, and conversions one after the other
LABEL = 180  # characters of a row's name, which is the name of a folder
LONGEST_NAME = 100  # bytes of a recipe's name: rows, seeds and kinds of records are added to it in names of files


@dataclass(frozen=True)
class Recipe:
    """A run: what to fold, on which text, with which stages, over which grid and seeds."""

    name: str = field(metadata={"help": "Name of the run; its folder, unless --out says otherwise."})
    source: str = field(metadata={"help": "The teacher: a directory, a hub id, kvfold:demo or kvfold:smollm2."})
    data: str = field(metadata={"help": "Text to train on."})
    heldout: str = field(metadata={"help": "Text to evaluate on, never trained on."})
    about: str = setting("", "What the run shows; printed in its report.")
    pretrain: Mapping[str, Any] | None = setting(
        None, "Make the source first: `config` and the settings of `kvfold pretrain`."
    )
    plan: Mapping[str, Any] | None = None
    convert: Mapping[str, Any] = field(default_factory=lambda: {"method": "gqa"})
    uptrain: Mapping[str, Any] | None = None
    finetune: Mapping[str, Any] | None = setting(
        None, "Train every student, and the source, on a task before it is evaluated: over the seeds."
    )
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    bench: Mapping[str, Any] | None = None
    compare: Mapping[str, Any] | None = setting(
        None, "Compare the source and the students with quantisation and others, by `kvfold compare`."
    )
    control: bool = setting(False, "Train the unconverted teacher on the same tokens too.")
    matrix: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse a name that is not the name of a folder. Raises SettingError."""
        bad = self.name in ("", ".", "..") or set(self.name) & set("/\\") or self.name != self.name.strip()
        if bad or not self.name.isprintable() or len(self.name.encode("utf-8", "replace")) > LONGEST_NAME:
            raise SettingError(
                "name is the run's folder below runs/",
                where="recipe",
                got=repr(self.name),
                allowed=f"1 to {LONGEST_NAME} characters, without / or \\, control characters or blanks at its ends",
                next="give another folder with --out",
            )


@dataclass(frozen=True)
class Cell:
    """One row of a run: the settings of its stages, at one point of the grid and one seed."""

    label: str
    convert: Mapping[str, Any]
    uptrain: Mapping[str, Any] | None
    seed: int


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `changes` are `key=value` or `stage.key=value` from the command line.

    Its keys replace those of the recipe beside it that `extends` names. Raises SettingError for a file that is missing,
    is not YAML, or has an unknown key.
    """
    content = _extended(Path(path), ())
    for change in changes:
        _change(content, change)
    check_depth(content, where=path, error=SettingError)
    if isinstance(content.get("matrix"), Mapping):
        content["matrix"] = [content["matrix"]]
    return decode(Recipe, content, str(path))


def _extended(path: Path, through: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a recipe, with those of the recipe that it extends."""
    if path.resolve() in through:
        raise SettingError("extends itself", where=path)
    if len(through) > CHAIN:
        raise SettingError("too many recipes extend one another", where=path, allowed=f"{CHAIN} times")
    content = read_yaml(path)
    other = content.pop("extends", None)
    if other is None:
        return content
    if not isinstance(other, str) or other in ("", ".", "..") or Path(other).name != other:
        raise SettingError(f"extends cannot be {other!r}", where=path, allowed="the name of a recipe beside this one")
    return _merged(_extended(path.parent / other, (*through, path.resolve())), content)


def _merged(base: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both; mappings are merged, and any other value of `content` replaces that of `base`."""
    both = {key for key, value in content.items() if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)}
    return {**base, **{key: _merged(base[key], value) if key in both else value for key, value in content.items()}}


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *stages, last = (part.strip() for part in key.split("."))
    if not equals or not all((*stages, last)):
        raise SettingError(f"--set {change!r} is not key=value", next="for example --set uptrain.tokens=1M")
    place = content
    for stage in stages:
        inner = place.get(stage)
        place[stage] = dict(inner) if isinstance(inner, Mapping) else {}
        place = place[stage]
    place[last] = parse_yaml(text, where=f"--set {key.strip()}")


def cells(recipe: Recipe) -> list[Cell]:
    """The rows of a run: every point of each grid in `matrix`, once per seed; equal rows are one.

    A value of null removes the key from its stage. Raises SettingError for more than `ROWS` rows, before they are made.
    """
    _count(recipe)
    found: dict[str, Cell] = {}
    for point in _points(recipe.matrix):
        stages: dict[str, dict[str, Any] | None] = {
            "convert": dict(recipe.convert),
            "uptrain": None if recipe.uptrain is None else dict(recipe.uptrain),
        }
        for key, value in point.items():
            stage, dot, name = key.partition(".")
            if not dot or stage not in stages:
                raise SettingError(
                    f"matrix: {key!r} is not a setting of a stage", allowed="convert.NAME or uptrain.NAME"
                )
            settings = stages[stage]
            if settings is None:
                raise SettingError(f"matrix: {key!r} needs a section {stage}")
            settings[name] = value
            if value is None:
                del settings[name]
        convert, uptrain = stages["convert"] or {}, stages["uptrain"]
        if uptrain is not None and (uptrain.get("alpha") == 0 or uptrain.get("tokens") == 0):
            uptrain = None
        words = (f"{key.partition('.')[2]}-{_word(value)}" for key, value in point.items() if value is not None)
        name = re.sub(r"[^\w.=-]+", "-", "_".join(words) or "student")
        trained = uptrain is not None or recipe.finetune is not None
        for seed in recipe.seeds:
            label = f"{name}_seed-{seed}" if trained else name
            if len(label) > LABEL:
                raise SettingError(
                    "the name of a row is too long", where="matrix", got=label, allowed=f"{LABEL} letters"
                )
            same = fingerprint([convert, uptrain, seed if trained else None])
            found.setdefault(same, Cell(label, convert, uptrain, seed))
    return list(found.values())


def _count(recipe: Recipe) -> None:
    """Refuse a run without rows, or with too many."""
    check_range(recipe, recipe.name, 0, SEEDS - 1, "seeds")
    if not recipe.seeds:
        raise SettingError("seeds is empty", where=recipe.name, next="leave it out for seed 0")
    empty = next((key for grid in recipe.matrix for key, value in grid.items() if value == []), None)
    if empty is not None:
        raise SettingError(f"matrix: {empty!r} has no values", where=recipe.name, next="leave the key out")
    points = sum(math.prod(len(each) for each in grid.values() if isinstance(each, list)) for grid in recipe.matrix)
    rows = max(1, points) * len(recipe.seeds)
    if rows > ROWS:
        raise SettingError(
            "the grid has too many rows", where=recipe.name, got=f"{rows:,}", allowed=f"at most {ROWS:,}"
        )


def _word(value: Any) -> str:
    """A value in the name of a row; a conversion that comes first is named by its settings."""
    return "-".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def _points(matrix: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    if not matrix:
        yield {}
    for grid in matrix:
        axes = [value if isinstance(value, list) else [value] for value in grid.values()]
        for values in itertools.product(*axes):
            yield dict(zip(grid, values, strict=True))
