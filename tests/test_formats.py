"""Values as JSON: what other programs can read, whatever was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvfold.cli import commands
from kvfold.formats import json_text

ODD = {"loss": math.nan, "rows": [{"kl": math.inf}, (-math.inf, 1.5)], "names": {"a": None, "b": True, "c": 2**63}}
EVEN = {"loss": None, "rows": [{"kl": None}, [None, 1.5]], "names": {"a": None, "b": True, "c": None}}


def strict(text: str) -> object:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("indent", [None, 2])
def test_numbers_that_are_not_finite_are_null(indent: int | None) -> None:
    assert strict(json_text(ODD, indent=indent)) == EVEN


def test_other_values_are_text() -> None:
    assert strict(json_text({"path": Path("a/b"), "ä": "ö"})) == {"path": "a/b", "ä": "ö"}
    assert json_text("ö", ascii_only=True).isascii()


def test_a_command_prints_what_other_programs_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    commands._print_json(ODD)
    assert strict(capsys.readouterr().out) == EVEN
