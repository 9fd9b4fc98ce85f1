"""Records: whose commit they name, what they never replace, their identity, and a run in one file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.disk import record, record_commit
from kvfold.errors import OutputError
from kvfold.progress import Silent
from kvfold.settings import differing

Tree = Callable[..., Path]


class Heard(Silent):
    """A listener that keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """`tree(place, project)`: a git repository with one commit, and kvfold's source at `place` in it."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def make(place: str, project: str = "kvfold", *, tracked: bool = True, folder: str = "repository") -> Path:
        root = tmp_path / folder
        source = root / place / "disk" / "record_commit.py"
        source.parent.mkdir(parents=True)
        source.write_text("# a copy\n")
        (root / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        run(root, "init", "-q")
        run(root, "add", "pyproject.toml", *([place] if tracked else []))
        run(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "one")
        monkeypatch.setattr(record_commit, "__file__", str(source))
        return root

    return make


def run(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout_is_named_with_a_plus_when_files_differ(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("src/kvfold")
    head = run(root, "rev-parse", "--short=12", "HEAD")
    assert record_commit.commit() == head
    (root / "src/kvfold/disk/record_commit.py").write_text("# changed\n")
    assert record_commit.commit() == f"{head}+"
    mine = Path(record_commit.__file__)
    other = tree("src/kvfold", folder="other")
    monkeypatch.setattr(record_commit, "__file__", str(mine))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert record_commit.commit() == f"{head}+"


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
    assert record_commit.commit() is None
    assert capfd.readouterr() == ("", "")


def test_outside_a_checkout_and_without_git_nothing_is_said(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tree("src/kvfold")
    shutil.rmtree(root / ".git")
    assert record_commit.commit() is None
    (root / ".git").write_text("gitdir: /nowhere\n")
    assert record_commit.commit() is None
    shutil.rmtree(root)
    tree("src/kvfold")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record_commit.commit() is None
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


# --- identity --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Before:
    """Settings of a stage."""

    data: str
    tokens: int = 100
    places: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Since(Before):
    """The same stage of a later version, with more settings."""

    beams: tuple[int, ...] = (4,)
    rates: dict[str, float] = dataclasses.field(default_factory=dict)


def test_a_new_setting_changes_no_identity_until_it_is_used() -> None:
    assert differing(Since("text")) == differing(Before("text", 100, (1, 2))) == {"data": "text"}
    assert differing(Since("text", beams=(1,))) == {"data": "text", "beams": (1,)}
    assert differing(Since("text", rates={"q": 1.0}))["rates"] == {"q": 1.0}
    names = [
        record.identity("evaluate", "a", differing(each))
        for each in (Before("text"), Since("text"), Since("text", beams=(1,)), Since("text", tokens=1), Since("other"))
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 4
    assert (
        record.identity("bench", "a", {}) != record.identity("evaluate", "a", {}) != record.identity("bench", "b", {})
    )


def test_a_record_of_another_default_is_not_reused(tmp_path: Path) -> None:
    hashes = {"student": "h"}
    made = record.Record("evaluate", "a", {"data": "text", "tokens": 100}, {"loss": 1.0}, hashes)
    path = record.write(made, tmp_path)
    assert record.existing(path, hashes, {"data": "text", "tokens": 100, "beams": (4,)}) == made
    for settings, others in (({"tokens": 200}, hashes), ({"tokens": 100}, {"student": "other"})):
        with pytest.raises(OutputError, match="choose another name, or add --overwrite"):
            record.existing(path, others, settings)
    assert record.existing(record.write(dataclasses.replace(made, status="failed"), tmp_path), hashes, {}) is None
    path.write_text(path.read_text().replace('"kvfold_record": 2', '"kvfold_record": 1').replace("failed", "done"))
    assert record.existing(path, hashes, {}) is None  # of a version whose defaults are not known


# --- a run in one file -----------------------------------------------------------------------------------------------


def made(name: str, **more: Any) -> record.Record:
    volatile = {"device": "a", "versions": {"torch": "2"}, "commit": "c", "date": f"2026-01-0{len(name)}"}
    return record.Record("evaluate", name, {"data": "text"}, {"z": 1.5, "a": [1, None]}, **{**volatile, **more})


def test_a_run_is_one_sorted_file_with_what_differs_each_time_in_its_first_line(tmp_path: Path) -> None:
    records = [
        made("r/b", seed=1, wall_seconds=2.5),
        made("r/a"),
        made("r", device="other", status="failed", error="x"),
    ]
    record.write_run(tmp_path / "r.jsonl", records)
    first, *lines = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert [line["name"] for line in lines] == ["r", "r/a", "r/b"]
    assert all(not {"device", "versions", "commit", "date", "wall_seconds"} & line.keys() for line in lines)
    assert [(group["device"], len(group["records"])) for group in first["made"]] == [("other", 1), ("a", 2)]
    (tmp_path / "train.jsonl").write_text('{"step": 1}\n')
    assert record.read_all(tmp_path) == sorted(records, key=lambda each: each.name)


def test_the_same_results_of_another_day_and_machine_change_the_first_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    record.write_run(path, [made("r/a"), made("r/b")])
    before = path.read_text().splitlines()
    record.write_run(path, [made("r/a", device="other", date="2027-01-01", wall_seconds=9.0)])
    after = path.read_text().splitlines()
    assert after[1:] == before[1:]
    assert after[0] != before[0]
    record.write_run(path, [dataclasses.replace(made("r/a"), metrics={"z": 2.0})])
    assert [each.metrics["z"] for each in record.read_all(tmp_path)] == [2.0, 1.5]


def test_a_damaged_line_is_left_out_and_never_written_over(tmp_path: Path) -> None:
    path, said = tmp_path / "r.jsonl", Heard()
    record.write_run(path, [made("r/a"), made("r/b")])
    good = path.read_text()
    for damaged in (good[:-20], good.replace('"name": "r/b"', '"name": 3')):
        path.write_text(damaged)
        assert [each.name for each in record.read_all(tmp_path, said)] == ["r/a"]
        assert "line 3 is not shown" in said.lines[-1]
        with pytest.raises(OutputError, match="line 3 is not shown.*: it is not replaced"):
            record.write_run(path, [made("r/c")])
        assert path.read_text() == damaged
    for first in ('{"kvfold_records": 2}', '{"kvfold_records": 2, "made": [3]}', '{"kvfold_records'):
        path.write_text(good.replace(good.splitlines()[0], first))
        assert record.read_all(tmp_path, said) == []
    assert "its first line cannot be read" in said.lines[-1]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    odd = dataclasses.replace(made("r"), metrics={"loss": math.nan, "rows": [{"kl": math.inf}, (-math.inf, 1.0)]})
    record.write_run(tmp_path / "r.jsonl", [odd])
    paths = [record.write(odd, tmp_path), tmp_path / "r.jsonl"]
    for path in paths:
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for found in record.read_all(tmp_path):
        assert found.metrics == {"loss": None, "rows": [{"kl": None}, [None, 1.0]]}
