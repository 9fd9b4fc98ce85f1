"""What kvfold says that it takes is what a plan takes, and what its students are called exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from examples import example
from kvfold import hf, methods
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.predict.plan import plan
from kvfold.predict.supported import COLUMNS, Supported, supported

FOUND = {each.model_types[0]: each for each in supported()}


def test_every_family_has_its_row() -> None:
    assert {name for each in FOUND.values() for name in each.model_types} == {
        name
        for family in all_families().values()
        for name in family.model_types
        if not name.startswith("kvfold_") and family.adopt is None
    }
    assert all(len(each.row) == len(COLUMNS) for each in FOUND.values())


@pytest.mark.parametrize("each", FOUND.values(), ids=FOUND)
def test_the_class_of_a_student_exists(each: Supported) -> None:
    assert any(hasattr(module, each.student) for module in (transformers, hf.per_layer, hf.encoder_decoder))


@pytest.mark.parametrize("name", ["llama", "gemma", "smollm3", "cohere", "gpt_neox", "bart"])
def test_what_takes_a_family_is_what_plans_it(name: str, tmp_path: Path) -> None:
    family = next(family for family in all_families().values() if name in family.model_types)
    (tmp_path / "config.json").write_text(json.dumps(family.tiny()))
    taken = set()
    for method, made in methods.all_methods().items():
        try:
            shape = family.shape(family.tiny())
            methods.check(method, made.lossless(shape), shape)
            plan(tmp_path, method, example(made, shape))
        except (SettingError, UnsupportedModel):
            continue
        taken.add(method)
    assert taken - {"identity"} == set(FOUND[name].methods)


def test_heads_by_layer_are_what_a_plan_takes(tmp_path: Path) -> None:
    for name, takes in (("llama", True), ("cohere2", True), ("phi", True), ("internlm3", False)):
        (tmp_path / "config.json").write_text(json.dumps(all_families()[name].tiny()))
        assert FOUND[name].by_layer == takes
        if takes:
            assert plan(tmp_path, "gqa", {"kv_heads": "4/2/1/2"}).after.cache_bytes > 0
        else:
            with pytest.raises(UnsupportedModel, match="has no classes for"):
                plan(tmp_path, "gqa", {"kv_heads": "4/2/1/2"})
    assert FOUND["bart"].by_layer


def test_an_engine_that_was_not_run_is_said_so() -> None:
    assert {"transformers", "vLLM", "llama.cpp", "CTranslate2"} < set(FOUND["llama"].engines)
    assert FOUND["gemma"].engines == ("transformers", "vLLM (not run)", "CTranslate2")
    assert FOUND["helium"].engines == ("transformers", "CTranslate2")
    assert FOUND["arcee"].engines == ("transformers",)
