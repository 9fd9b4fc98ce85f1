"""Records: whose commit they name, and what they never replace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.disk import record
from kvfold.errors import OutputError

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """`tree(place, project)`: a git repository with one commit, and kvfold's source at `place` in it."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def make(place: str, project: str = "kvfold", *, tracked: bool = True, folder: str = "repository") -> Path:
        root = tmp_path / folder
        source = root / place / "disk" / "record.py"
        source.parent.mkdir(parents=True)
        source.write_text("# a copy\n")
        (root / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        run(root, "init", "-q")
        run(root, "add", "pyproject.toml", *([place] if tracked else []))
        run(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "one")
        monkeypatch.setattr(record, "__file__", str(source))
        return root

    return make


def run(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout_is_named_with_a_plus_when_files_differ(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("src/kvfold")
    head = run(root, "rev-parse", "--short=12", "HEAD")
    assert record.commit() == head
    (root / "src/kvfold/disk/record.py").write_text("# changed\n")
    assert record.commit() == f"{head}+"
    mine = Path(record.__file__)
    other = tree("src/kvfold", folder="other")
    monkeypatch.setattr(record, "__file__", str(mine))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert record.commit() == f"{head}+"


@pytest.mark.parametrize(
    ("place", "project", "tracked"),
    [
        ("src/kvfold", "kvfold", False),
        ("src/kvfold", "theirs", True),
        (".venv/lib/python3.12/site-packages/kvfold", "theirs", False),
        (".venv/lib/python3.12/site-packages/kvfold", "kvfold", True),
        ("vendor/src/kvfold", "kvfold", True),
    ],
)
def test_the_commit_of_somebody_elses_repository_is_not_kvfolds(
    tree: Tree, capfd: pytest.CaptureFixture[str], place: str, project: str, tracked: bool
) -> None:
    tree(place, project, tracked=tracked)
    assert record.commit() is None
    assert capfd.readouterr() == ("", "")


def test_outside_a_checkout_and_without_git_nothing_is_said(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tree("src/kvfold")
    shutil.rmtree(root / ".git")
    assert record.commit() is None
    (root / ".git").write_text("gitdir: /nowhere\n")
    assert record.commit() is None
    shutil.rmtree(root)
    tree("src/kvfold")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit() is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["x" * 300, "ß" * 150, "a/" * 200, "x" * 220, "../..", ".", ""])
def test_any_name_is_a_file_of_the_folder(name: str, tmp_path: Path) -> None:
    paths = {record.write(record.Record("evaluate", each, {}, {}), tmp_path) for each in (name, f"{name}b")}
    assert len(paths) == 2
    assert {path.parent for path in paths} == {tmp_path}


def test_a_record_replaces_records_alone(tmp_path: Path) -> None:
    made = record.Record("plan", "a", {}, {"x": 1})
    path = record.write(made, tmp_path)
    assert record.write(made, tmp_path) == path
    path.write_text("")
    assert json.loads(record.write(made, tmp_path).read_text())["metrics"] == {"x": 1}
    for theirs in ("dear", "[]", "{}"):
        path.write_text(theirs)
        with pytest.raises(OutputError, match="is there and is no record: it is not replaced; move it away"):
            record.write(made, tmp_path)
        assert path.read_text() == theirs
    path.unlink()
    (tmp_path / "letter").write_text('{"kvfold_record": 1}')
    path.symlink_to(tmp_path / "letter")
    with pytest.raises(OutputError, match="is no record"):
        record.write(made, tmp_path)
    assert [each.name for each in tmp_path.glob("*.tmp")] == []
