"""Settings from people: what is read, and the one line that a mistake costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.errors import SettingError
from kvfold.recipe import cells, decode, read_recipe
from kvfold.run import _spent


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
