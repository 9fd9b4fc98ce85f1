"""Settings from people: what is read, and the one line that a mistake costs."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.convert.conversion import ConvertSettings
from kvfold.disk.record import Record
from kvfold.errors import SettingError
from kvfold.evaluate.bench import BenchSettings
from kvfold.evaluate.evaluation import EvaluateSettings
from kvfold.families import all_families
from kvfold.progress import SILENT
from kvfold.run.recipe import Recipe, cells, read_recipe
from kvfold.run.runner import _made, _spent, run
from kvfold.settings import decode
from kvfold.train.pretrain import PretrainSettings
from kvfold.train.settings import TrainSettings
from kvfold.train.uptrain import UptrainSettings


@dataclass(frozen=True)
class Settings:
    tokens: int | None = None
    rate: float = 1.0
    contexts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    init: Literal["mean", "first"] = "mean"
    heads: str | int = 1
    fast: bool = False


def test_what_people_write_is_read() -> None:
    given = {"tokens": "20M", "rate": "1e-3", "contexts": "1024,4k", "names": ["a"], "init": "first", "fast": True}
    assert decode(Settings, given, "x") == Settings(20_000_000, 1e-3, (1024, 4000), ("a",), "first", fast=True)
    assert decode(Settings, {"tokens": None, "contexts": 7, "heads": "self=8"}, "x").contexts == (7,)


@pytest.mark.slow
@given(st.integers(0, 10**15))
def test_a_count_reads_the_same_from_a_flag_and_from_yaml(count: int) -> None:
    assert decode(Settings, {"tokens": str(count)}, "x") == decode(Settings, {"tokens": count}, "x")


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ({"token": 1}, "unknown setting 'token'; did you mean 'tokens'?"),
        ({"qqqq": 1}, "unknown setting 'qqqq'; allowed: tokens, rate"),
        ({"tokens": "many"}, "tokens cannot be 'many'; allowed: a whole number or none"),
        ({"tokens": True}, "tokens cannot be True"),
        ({"tokens": 1.5}, "tokens cannot be 1.5"),
        ({"rate": "fast"}, "rate cannot be 'fast'; allowed: a number"),
        ({"init": "last"}, "init cannot be 'last'; allowed: mean, first"),
        ({"contexts": "a"}, "contexts cannot be 'a'"),
        ({"fast": "maybe"}, "fast cannot be 'maybe'; allowed: true or false"),
    ],
)
def test_a_mistake_costs_one_line(mistake: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError) as caught:
        decode(Settings, mistake, "here")
    assert str(caught.value).startswith("here: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


RECIPE = """
name: small
source: somewhere
data: text
heldout: other
convert: {method: gqa, kv_heads: 2}
uptrain: {tokens: 1M}
matrix:
  - {convert.init: [mean, first], uptrain.alpha: [0, 0.01]}
  - {convert.init: mean, uptrain.alpha: [0.01, 0.05]}
seeds: [0, 1]
"""


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_grids_are_products_that_add_up_and_a_row_stands_once(tmp_path: Path) -> None:
    rows = cells(read_recipe(_recipe(tmp_path, RECIPE)))
    seen = [(row.convert["init"], (row.uptrain or {}).get("alpha", 0), row.seed) for row in rows]
    assert len(set(seen)) == len(seen)
    trained = [each for each in seen if each[1]]
    assert sorted(trained) == [
        (init, alpha, seed) for init, alpha in [("first", 0.01), ("mean", 0.01), ("mean", 0.05)] for seed in (0, 1)
    ]
    assert sorted(each[0] for each in seen if not each[1]) == ["first", "mean"]  # no seed: nothing is trained


def test_null_takes_a_key_out_of_its_stage(tmp_path: Path) -> None:
    matrix = "matrix=[{convert.init: [null, mean]}, {convert.kv_heads: null, convert.share: 2, uptrain.loss: null}]"
    plain, mean, other = cells(read_recipe(_recipe(tmp_path, RECIPE), [matrix, "seeds=[0]", "uptrain.loss=ce"]))
    assert plain.convert == {key: value for key, value in mean.convert.items() if key != "init"}
    assert mean.convert["init"] == "mean"
    assert "kv_heads" not in other.convert
    assert other.uptrain is not None
    assert "loss" not in other.uptrain
    assert "None" not in plain.label + other.label


def test_a_row_says_what_the_matrix_sets_in_its_training(tmp_path: Path) -> None:
    matrix = "matrix=[{uptrain.learning_rate: [0.001, 0.002]}, {uptrain.loss: ce, uptrain.alpha: 0.01}]"
    recipe = read_recipe(_recipe(tmp_path, RECIPE), [matrix, "uptrain.learning_rate=0.003", "seeds=[0]"])
    spent = [_spent(cell.uptrain or {}, recipe) for cell in cells(recipe)]
    assert spent == [
        {"tokens": "1M", "loss_name": None, "varied": f"learning rate {rate:g}"} for rate in (1e-3, 2e-3)
    ] + [{"alpha": 0.01, "tokens": "1M", "loss_name": "ce", "varied": "learning rate 0.003"}]


def test_a_row_says_what_the_matrix_sets_in_its_conversion(tmp_path: Path) -> None:
    text = "name: a\nsource: b\ndata: c\nheldout: d\nconvert: {method: gqa, kv_heads: 1, calibration: x/one.txt}\n"
    base = {"method": "gqa", "kv_heads": 1}
    recipe = read_recipe(_recipe(tmp_path, text))
    assert [_made(cell.convert, recipe) for cell in cells(recipe)] == [base]
    recipe = read_recipe(_recipe(tmp_path, text + "matrix:\n- {}\n- {convert.calibration: [y/two.txt, self]}\n"))
    made = [_made(cell.convert, recipe) for cell in cells(recipe)]
    assert made == [{**base, "calibration": text} for text in ("one.txt", "two.txt", "self")]
    recipe = read_recipe(
        _recipe(tmp_path, text + "matrix:\n- {convert.dtype: [float32, bfloat16], convert.kv_heads: 2}\n")
    )
    made = [_made(cell.convert, recipe) for cell in cells(recipe)]
    assert made == [{"method": "gqa", "kv_heads": 2, "dtype": dtype} for dtype in ("float32", "bfloat16")]


def test_a_recipe_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "{name: base, source: a, data: t, heldout: h, uptrain: {tokens: 1k, loss: kl}, seeds: [0, 1]}"
    )
    (tmp_path / "middle.yaml").write_text("{extends: base.yaml, name: middle, uptrain: {loss: ce}}")
    (tmp_path / "last.yaml").write_text("{extends: middle.yaml, name: last, seeds: [3], control: true}")
    found = read_recipe(tmp_path / "last.yaml", ["uptrain.tokens=2k"])
    assert (found.name, found.source, found.seeds, found.control) == ("last", "a", (3,), True)
    assert found.uptrain == {"tokens": "2k", "loss": "ce"}
    (tmp_path / "none.yaml").write_text("{extends: base.yaml, name: none, uptrain: null}")
    assert read_recipe(tmp_path / "none.yaml").uptrain is None
    assert read_recipe(tmp_path / "base.yaml").uptrain == {"tokens": "1k", "loss": "kl"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{extends: me.yaml}", "me.yaml: extends itself"),
        ("{extends: other.yaml}", "other.yaml: cannot be read"),
        ("{extends: [a, b]}", "extends cannot be"),
        ("{extends: bad.yaml}", "unknown setting 'sedes'"),
    ],
)
def test_a_recipe_that_extends_what_it_cannot_costs_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "me.yaml").write_text(text)
    (tmp_path / "bad.yaml").write_text("{name: bad, source: a, data: t, heldout: h, sedes: [1]}")
    with pytest.raises(SettingError, match=says) as caught:
        read_recipe(tmp_path / "me.yaml")
    assert "\n" not in str(caught.value)


def test_set_changes_a_key_and_makes_missing_sections(tmp_path: Path) -> None:
    changed = read_recipe(_recipe(tmp_path, RECIPE), ["uptrain.tokens=2M", "bench.context=[64]", "seeds=[7]"])
    assert changed.uptrain == {"tokens": "2M"}
    assert changed.bench == {"context": [64]}
    assert changed.seeds == (7,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RECIPE + "sedes: [1]", "unknown setting 'sedes'; did you mean 'seeds'?"),
        ("name: [", "is not YAML, line 1"),
        ("just words", "no keys at its top level"),
        ("name: x", "source is needed"),
    ],
)
def test_a_bad_recipe_costs_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingError, match="recipe.yaml") as caught:
        read_recipe(_recipe(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_change_or_grid_costs_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="not key=value"):
        read_recipe(_recipe(tmp_path, RECIPE), ["seeds"])
    with pytest.raises(SettingError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")
    with pytest.raises(SettingError, match=r"'init' is not a setting of a stage"):
        cells(read_recipe(_recipe(tmp_path, RECIPE), ["matrix={init: [mean]}"]))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "is too large when its aliases are expanded; allowed: at most 100,000 values"),
        ("a: &a [*a]", "a value contains itself, line 1"),
        ("a: &a {<<: *a}", "a value contains itself"),
        ("a: " + "[" * 100 + "]" * 100, "is nested too deeply; allowed: at most 64 levels"),
        ("a: " + "[" * 3_000, "is nested too deeply"),
        ("name: x\nname: y", "key 'name' appears twice"),
        ("uptrain: {tokens: 1, tokens: 2}", "key 'tokens' appears twice"),
        ("a: .nan", "nan is not a finite number"),
        ("a: -.inf", "-inf is not a finite number"),
        ("a: 1e400", "inf is not a finite number"),
        ("a: 9223372036854775808", "a number of 19 digits is too large"),
        (f"a: {'9' * 5000}", "holds a value that its tag does not allow"),
        ("a: !!python/name:os.system", "is not YAML, line 1"),
        ("a: !!python/object/apply:os.system [id]", "is not YAML, line 1"),
        ("a: !!set {b, c}", "holds a set"),
        ("a: !!binary aGk=", "holds a bytes"),
        ("a: !!timestamp 2026-01-01", "holds a date"),
        ("a: !!int x", "holds a value that its tag does not allow"),
        ("a: !!bool x", "holds a value that its tag does not allow"),
        ("a: 1\n---\nb: 2", "is not YAML, line 2"),
        ("1: 2", "key 1 is not text"),
        ("{[a]: 2}", "is not YAML, line 1"),
        ('a: "\\0"', "holds text with a character that no file name and no UTF-8 has"),
        ('a: "\\ud800"', "holds text with a character"),
        ("a: \0", "is not YAML"),
        ("x" * ((1 << 20) + 1), "is too large to be read"),
        ("", "no keys at its top level"),
    ],
)
def test_yaml_that_json_could_not_hold_costs_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        read_recipe(_recipe(tmp_path, text))
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_date_is_text_as_in_json(tmp_path: Path) -> None:
    assert read_recipe(_recipe(tmp_path, RECIPE + "about: 2026-01-01")).about == "2026-01-01"


def test_only_a_regular_file_is_a_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("pipe.yaml", "/dev/zero", ".", "binary.yaml"):
        with pytest.raises(SettingError, match=r"not a regular file|is not UTF-8"):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize("other", ["../me.yaml", "/etc/passwd", "", ".", "a/b.yaml"])
def test_a_recipe_extends_one_beside_it(other: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="extends cannot be"):
        read_recipe(_recipe(tmp_path, f"extends: {other!r}"))


def test_a_long_chain_of_recipes_ends(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml")
    with pytest.raises(SettingError, match="too many recipes extend one another"):
        read_recipe(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    "change",
    [
        *("a..b=1", ".a=1", "a.=1", "=x", ".=1", "source=[", "source={", "source='", "source=!!python/name:os.system"),
        *("source=1e400", "source=*nowhere", "source=\x00", "source={a: 1, a: 2}", "source.x=1", "matrix=3", "seeds=x"),
        *(f"{'.'.join('a' * 200)}=1", "source=[a]", "convert=3", "uptrain=[1]", "bench=text", "plan=1", "evaluate=x"),
    ],
)
def test_an_odd_change_costs_one_line(change: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        read_recipe(_recipe(tmp_path, RECIPE), [change])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: [-1]", "seeds must be at least 0"),
        ("seeds: [4294967296]", "seeds must be at most 4,294,967,295"),
        ("seeds: [1.5]", "seeds cannot be"),
        ("seeds: [a]", "seeds cannot be"),
        ("seeds: []", "seeds is empty"),
        (f"matrix: {{convert.a: {[*range(100)]}, convert.b: {[*range(100)]}, uptrain.c: {[*range(100)]}}}", "too many"),
        ("matrix: {convert.a: []}", "'convert.a' has no values"),
        (f"matrix: {{convert.a: {'x' * 300}}}", "the name of a row is too long"),
    ],
)
def test_rows_are_counted_before_they_are_made(text: str, says: str, tmp_path: Path) -> None:
    path = _recipe(tmp_path, "{name: n, source: s, data: d, heldout: h}".replace("}", f", {text}}}"))
    with pytest.raises(SettingError, match=says):
        cells(read_recipe(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "1e400", 10**30, "9" * 30, "9" * 400 + "T"])
def test_a_number_that_is_none_is_refused(value: object) -> None:
    for name in ("tokens", "rate"):
        if name == "rate" and value in (10**30, "9" * 30):
            continue  # a float holds it
        with pytest.raises(SettingError, match=f"{name} cannot be"):
            decode(Settings, {name: value}, "here")


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(SettingError, match="data cannot be"):
        decode(TrainSettings, {"data": "a\0b"}, "here")


@pytest.mark.parametrize(
    ("cls", "given", "says"),
    [
        (PretrainSettings, {"seed": -1}, "seed must be at least 0"),
        (PretrainSettings, {"seed": 2**32}, "seed must be at most"),
        (PretrainSettings, {"beta1": 1.0}, "beta1 and beta2 must be less than 1"),
        (PretrainSettings, {"weight_decay": -0.1}, "weight_decay must be at least 0"),
        (PretrainSettings, {"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        (PretrainSettings, {"learning_rate": float("inf")}, "learning_rate must be positive"),
        (PretrainSettings, {"batch_size": 10**18}, "batch_size must be at most"),
        (PretrainSettings, {"checkpoint_minutes": -1.0}, "checkpoint_minutes must be at least 0"),
        (UptrainSettings, {"data": "d", "tokens": 9, "temperature": float("inf")}, "temperature must be positive"),
        (UptrainSettings, {"data": "d", "alpha": 0.1, "pretraining_tokens": -5}, "pretraining_tokens must be"),
        (UptrainSettings, {"data": "d", "tokens": 9, "lora": 10**9}, "lora must be at most 65,536"),
        (UptrainSettings, {"data": "d", "tokens": 9, "loss": f"{'9' * 400}ce"}, "positive and finite"),
        (EvaluateSettings, {"data": "d", "copy_trials": 10**12}, "copy_trials must be at most"),
        (EvaluateSettings, {"data": "d", "seed": -1}, "seed must be at least 0"),
        (EvaluateSettings, {"data": "d", "beams": (0,)}, "beams must be at least 1"),
        (EvaluateSettings, {"data": "d", "gate": "loss<=1e400"}, "a number is too large"),
        (EvaluateSettings, {"data": "d", "gate": "loss<=1e400*teacher"}, "a number is too large"),
        (BenchSettings, {"context": (10**18,)}, "context must be at most"),
        (BenchSettings, {"threads": 10**6}, "threads must be at most"),
        (ConvertSettings, {"calibration_seed": -1}, "calibration_seed must be at least 0"),
    ],
)
def test_settings_refuse_what_cannot_be(cls: type, given: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        cls(**given)


def test_a_run_says_which_rows_of_the_default_gate_a_student_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = importlib.import_module("kvfold.run.runner")
    teacher = {"loss": 3.0, "copy_gain": {"64": 4.0}, "last_word": 0.4}
    metrics = {"loss": 3.05, "copy_gain": {"64": 3.9}, "last_word": 0.01, "teacher": teacher}
    asked, lines = [], []

    def measured(model: object, settings: EvaluateSettings, **how: object) -> Record:
        asked.append(settings.gate)
        return Record("evaluate", "r/x", {}, metrics)

    monkeypatch.setattr(runner, "evaluate", measured)
    monkeypatch.setattr(SILENT, "say", lines.append)

    def evaluated(judged: bool, **evaluate: str) -> None:
        recipe = Recipe("r", "s", "d", "h", evaluate=evaluate)
        work = runner._Run(recipe, tmp_path, overwrite=False, progress=SILENT)
        runner._evaluate(work, "model", "x", {}, teacher=None, judged=judged)
        assert not work.missed  # so that the run ends with exit status 0

    evaluated(judged=False, gate="loss<=2")
    evaluated(judged=True, gate="none")
    evaluated(judged=True, gate="loss<=4")
    assert (asked, lines) == (["default", None, "loss<=4"], [])
    evaluated(judged=True)
    assert lines == ["r/x misses the default gate: last_word>=0.8*teacher (0.01 against 0.32)"]


@pytest.mark.parametrize(
    "change",
    [
        *("bench.contxt=[8]", "evaluate.gaet=x", "plan.contxt=8", "uptrain.tokns=1", "convert.kv_haeds=2"),
        *("convert.method=gqaa", "uptrain.loss=klx", "evaluate.gate=loss", "pretrain.tokns=1", "pretrain.config=3"),
        *("finetune.tokns=3", "convert.after.kv_haeds=2", "bench.context=[]", "convert.kv_heads=7"),
        "matrix={convert.kv_haeds: [1, 2]}",
    ],
)
def test_every_section_is_checked_before_anything_runs(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(*given: object, **named: object) -> None:
        raise AssertionError("a stage ran")

    for name in ("pretrain", "convert", "uptrain", "evaluate", "bench", "_plans"):
        monkeypatch.setattr(importlib.import_module("kvfold.run.runner"), name, runs)
    recipe = Path(__file__).parents[2] / "recipes" / "headline.yaml"
    changes = [] if "matrix" in change else ["matrix={}"]
    if "pretrain" not in change and "after" not in change:  # what comes after pre-training is checked before it, too
        config = all_families()["llama"].tiny()
        changes += [f"pretrain={json.dumps({'config': config, 'tokens': 99})}", "source=made"]
    changes += ["control=false", "finetune={tokens: 3}"] if "finetune" in change else []
    with pytest.raises(SettingError) as caught:
        run(recipe, out=tmp_path / "out", changes=[*changes, change])
    assert not (tmp_path / "out").exists()
    assert str(caught.value).isprintable()
