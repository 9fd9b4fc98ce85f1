"""Cheap inputs are checked before work that takes long: a missing text is refused before any tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.cli.main import run_command
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint

COMMANDS = {
    "inspect": ["inspect", "teacher", "--out", "out", "--data", "{text}"],
    "convert": ["convert", "teacher", "out", "--kv-heads", "2", "--calibration", "{text}"],
    "uptrain": ["uptrain", "student", "out", "--tokens", "1k", "--data", "{text}"],
    "evaluate": ["evaluate", "student", "--data", "{text}"],
}


def _hashed(*_: object) -> None:
    raise AssertionError("the weights were hashed before the inputs were checked")


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher, its student, and a folder without text; hashing a checkpoint is an error."""
    convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 2})
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "hash", _hashed)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "what"),
    [("missing.txt", "no such text"), ("empty", "no text in this folder"), ("picture.png", "unknown kind of text")],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_text_is_checked_before_the_weights_are_read(
    name: str, text: str, what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([word.format(text=text) for word in COMMANDS[name]]) == 2
    assert what in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()


def test_a_folder_for_records_is_checked_before_a_benchmark_reads_weights(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("")
    assert run_command(["bench", "teacher", "student", "--records", "file"]) == 2
    assert "a part of the path is a file" in capsys.readouterr().err


def test_roles_that_a_family_cannot_repair_are_refused_before_its_weights_are_read(
    tiny_checkpoint: Callable[..., Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint("gpt_neox", name="neox")
    (folder / "text.txt").write_text("a text. " * 500)
    words = ["convert", "neox", "out", "--kv-heads", "2", "--calibration", "text.txt", "--repair", "gate"]
    assert run_command(words) == 2
    assert "the MLP of family phi has no gate; leave out gate" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data", "heldout", "calibration"])
def test_texts_of_a_recipe_are_checked_before_its_first_row(
    key: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = dict.fromkeys(("data", "heldout", "calibration"), "stdlib") | {key: "missing.txt"}
    (folder / "recipe.yaml").write_text(
        f"name: run\nsource: teacher\ndata: {texts['data']}\nheldout: {texts['heldout']}\n"
        f"convert: {{kv_heads: 2, calibration: {texts['calibration']}}}\n"
    )
    assert run_command(["run", "recipe.yaml"]) == 2
    assert "missing.txt: no such text" in capsys.readouterr().err
    assert not (folder / "runs").exists()
