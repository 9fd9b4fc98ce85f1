"""A command that failed leaves nothing in the way of the mended one; work that can go on stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.output import Output, dropped_on_error, open_output
from kvfold.errors import CheckpointError, Interrupted, OutputError, SettingError
from kvfold.repair import layers as repairing
from kvfold.train.uptrain import UptrainSettings, uptrain

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("error", "worth", "kept"),
    [
        (SettingError("x"), False, False),
        (SettingError("x"), True, True),
        (CheckpointError("x"), True, False),
        (RuntimeError("x"), False, False),
        (RuntimeError("x"), True, True),
        (OutputError("the disk is full"), False, True),
        (OSError("x"), False, True),
        (Interrupted("x"), False, True),
        (KeyboardInterrupt(), False, True),
    ],
    ids=repr,
)
def test_work_is_dropped_by_what_ended_it(error: BaseException, worth: bool, kept: bool, tmp_path: Path) -> None:
    output = open_output(tmp_path / "out", {"a": 1})
    if worth:
        (output.work / "state.json").write_text("{}")
    with pytest.raises(type(error)), dropped_on_error(output, "state.json", futile=(CheckpointError,)):
        raise error
    assert output.work.exists() == kept
    if not kept:
        again = open_output(tmp_path / "out", {"a": 2})  # and nobody holds the place
        assert not again.resumed


def test_a_finished_output_is_never_dropped(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    complete = Output(tmp_path / "out", tmp_path / "out.partial", "", complete=True, resumed=False)
    complete.drop()
    assert (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_calibration_that_fails_is_mended(tiny_checkpoint: Make, text: Path, tmp_path: Path) -> None:
    teacher, out = tiny_checkpoint("llama"), tmp_path / "out"
    options = ConvertSettings(calibration=str(text), calibration_tokens=100)
    with pytest.raises(SettingError, match="2,048 tokens cannot be sampled"):
        convert(teacher, out, "elitekv", {"ratio": 0.5}, options=options)
    assert not out.with_name("out.partial").exists()
    assert convert(teacher, out, "elitekv", {"ratio": 0.5, "samples": 64}, options=options).exists()


@pytest.mark.slow
def test_a_repair_that_fails_is_mended(
    tiny_checkpoint: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = tiny_checkpoint("llama"), tmp_path / "out"

    def options(*roles: str) -> ConvertSettings:
        return ConvertSettings(calibration=str(text), calibration_tokens=600, repair=roles)

    def fail(*given: Any) -> None:
        raise CheckpointError("the repaired tensor is not finite", next="repair less")

    with monkeypatch.context() as patch:
        patch.setattr(repairing._Pass, "layer", fail)
        with pytest.raises(CheckpointError, match="not finite"):
            convert(teacher, out, "gqa", {"kv_heads": 2}, options=options("q"))
    assert not out.with_name("out.partial").exists()
    assert convert(teacher, out, "gqa", {"kv_heads": 2}, options=options("o")).exists()


def test_a_training_that_fails_before_its_first_state_is_mended(
    tiny_checkpoint: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = tiny_checkpoint("llama"), tmp_path / "out"
    given: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "tokens": 64, "data": str(text), "loss": "ce"}

    def fail(*given: Any, **more: Any) -> None:
        raise CheckpointError("cannot be loaded")

    with monkeypatch.context() as patch:
        patch.setattr("kvfold.hf.outline", fail)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            uptrain(student, out, UptrainSettings(**given))
    assert not out.with_name("out.partial").exists()
    assert uptrain(student, out, UptrainSettings(**{**given, "tokens": 128})).exists()
