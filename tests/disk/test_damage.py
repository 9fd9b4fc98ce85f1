"""Files that lie in a run's folder or in the cache, and are not what was written: one clear line, or made anew."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvfold.disk import record
from kvfold.disk.output import CLAIM, fingerprint, open_output, write_json
from kvfold.disk.source import _place_of, remembered
from kvfold.errors import DataError, OutputError, SettingError
from kvfold.evaluate.checks import read_control
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.predict import roofline
from kvfold.progress import Silent
from kvfold.report import report
from kvfold.report.folder import collect
from kvfold.train.state import Position, State, kept_lines

HTML = "<script>alert(1)</script>"


class Heard(Silent):
    """A listener that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def evaluation(**changes: Any) -> dict[str, Any]:
    """A record of an evaluation, as JSON."""
    settings = {"row": {"role": "student", "method": "gqa"}}
    return {**asdict(record.make("evaluate", "x", settings, {"loss": 1.0}, device="d")), **changes}


def in_folder(folder: Path, *contents: Any) -> Path:
    for number, content in enumerate(contents):
        (folder / f"evaluate-{number}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"novel": 1}, {"kvfold_record": 9}, {"kvfold_record": 9, "novel": {"a": []}}])
def test_a_record_of_a_newer_version_is_read_with_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    found = record.read_all(in_folder(tmp_path, evaluation(), evaluation(**changes)), heard)
    assert [each.metrics for each in found] == [{"loss": 1.0}] * 2
    assert len(heard.lines) == 1
    assert "another version of kvfold" in heard.lines[0]
    assert ("novel" in heard.lines[0]) == ("novel" in changes)
    assert report(tmp_path, progress=heard).is_file()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (evaluation(metrics=3), "metrics"),
        (evaluation(name=None), "name"),
        (evaluation(status="lost"), "status"),
        (evaluation(hashes=[1]), "hashes"),
        (evaluation(seed="0"), "seed"),
        ({"kvfold_record": 1}, "kind"),
        ("{", "is not JSON"),
        ("[" * 5000, "nested too deeply"),
        ("\x00", "is not JSON"),
    ],
)
def test_a_record_that_cannot_be_read_is_left_out_with_one_line(content: Any, says: str, tmp_path: Path) -> None:
    heard = Heard()
    assert len(record.read_all(in_folder(tmp_path, evaluation(), content), heard)) == 1
    assert len(heard.lines) == 1
    assert says in heard.lines[0]
    assert "evaluate-1.json" in heard.lines[0]


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": "low"},
        {"loss": []},
        {"loss": 1.0, "copy_loss": {"near": 1.0}},
        {"loss": 1.0, "gate": {"rows": [{}]}},
        {"loss": 1.0, "samples": [3]},
        {"loss": 1.0, "made_by": [{"stage": "convert"}]},
        {"loss": 1.0, "teacher": {"loss": {}}},
        {"loss": 1.0, "lm_eval": {"task": 1}},
        {"loss": 1e200},
    ],
)
def test_metrics_of_another_type_are_left_out_of_a_report(metrics: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    found = collect(in_folder(tmp_path, evaluation(metrics={"loss": 2.0}), evaluation(metrics=metrics)), heard)
    assert [each.metrics for each in found.records] == [{"loss": 2.0}]
    assert len(heard.lines) == 1
    assert "is not shown: metrics." in heard.lines[0]


@pytest.mark.parametrize("kind", ["bench", "plan"])
def test_a_record_without_its_metrics_is_left_out_of_a_report(kind: str, tmp_path: Path) -> None:
    heard = Heard()
    assert len(collect(in_folder(tmp_path, evaluation(), evaluation(kind=kind, metrics={})), heard).records) == 1
    assert len(heard.lines) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_metric_that_is_no_number_was_not_measured(value: float, tmp_path: Path) -> None:
    content = json.dumps(evaluation(metrics={"loss": 2.0, "kl": "@"})).replace('"@"', json.dumps(value))
    (found,) = record.read_all(in_folder(tmp_path, content))
    assert found.metrics == {"loss": 2.0, "kl": None}
    assert report(tmp_path).is_file()


def test_names_are_text_in_the_page(tmp_path: Path) -> None:
    row = {"role": "student", "method": f"$x{HTML}", "kv_heads": f"\x1b[31m\u202e{HTML}"}
    hostile = evaluation(name=f"../{HTML}", settings={"row": row}, device=HTML, versions={HTML: HTML})
    page = report(in_folder(tmp_path, hostile, evaluation(metrics={"loss": 3.0}))).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not any(letter in page for letter in "\x1b\u202e\x00")


@pytest.mark.slow
def test_a_part_of_a_training_log_names_no_tag(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, evaluation())
    root = {"name": "r", "hash": "h", "parameters": 1}
    (folder / "kvfold.json").write_text(
        json.dumps({"format": 1, "inputs": "i", "hash": "x", "root": root, "steps": []})
    )
    lines = [{"step": n, "tokens": n, "loss": 1 / n, f'"{HTML}': 1.0} for n in range(1, 4)]
    broken = [
        "{",
        "[]",
        "3",
        '{"tokens": "x", "loss": 1}',
        '{"tokens": 9, "loss": NaN}',
        f'{{"tokens": 1, "loss": {10**400}}}',
        "[" * 9000,
        "\udcff",
    ]
    text = "\n".join([*map(json.dumps, lines), *broken])
    (folder / "train.jsonl").write_text(text, errors="surrogateescape")
    (log,) = collect(folder).logs.values()
    assert len(log) == 3  # and of those beside it, none
    assert "<script" not in report(folder).read_text()


@pytest.mark.parametrize("change", [{"root": 3}, {"steps": [3]}, {"steps": [{"stage": "convert"}]}, {"hash": None}])
def test_a_lineage_that_is_none_is_left_out_of_a_report(change: dict[str, Any], tmp_path: Path) -> None:
    heard, root = Heard(), {"name": "r", "hash": "h", "parameters": 1}
    lineage = {"format": 1, "inputs": "i", "hash": "x", "root": root, "steps": [], **change}
    (in_folder(tmp_path, evaluation()) / "kvfold.json").write_text(json.dumps(lineage))
    assert collect(tmp_path, heard).checkpoints == ()
    assert ["kvfold.json" in line and "it is not shown" in line for line in heard.lines] == [True]


def test_what_is_no_file_in_a_runs_folder_is_passed_over(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, evaluation())
    (folder / "other.json").write_text("[1, 2]")
    (folder / "folder.json").mkdir()
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.json")
    (folder / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "recipe.yaml")
    os.mkfifo(folder / "train.jsonl")
    assert report(folder).is_file()


@pytest.mark.parametrize("place", ["absent", "file", "empty", "name\x00"])
def test_a_report_of_nothing_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        report(tmp_path / place)
    assert str(caught.value).isprintable()


def test_a_damaged_record_is_measured_again(tmp_path: Path) -> None:
    for content in ("", "[]", '{"kvfold_record": 1}', json.dumps(evaluation(hashes=3))):
        (tmp_path / "x.json").write_text(content)
        assert record.existing(tmp_path / "x.json", {}, {}) is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"kvfold_record": 1, "kind": "evaluate"}', json.dumps(evaluation(hashes=None))),
        *(json.dumps(evaluation(metrics=each)) for each in ({}, {"loss": "low"}, {"loss": []}, {"loss": {}})),
    ],
)
def test_a_control_that_is_damaged_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "control.json").write_text(content)
    settings = EvaluateSettings("text", gate="loss<=control", control=str(tmp_path / "control.json"))
    with pytest.raises(SettingError) as caught:
        read_control(settings)
    assert str(caught.value).isprintable()


# --- unfinished work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{",
            "[]",
            "3",
            "{}",
            '{"slot": "/etc/passwd", "position": {}}',
            '{"slot": "state-a.pt", "position": []}',
        ),
        *('{"slot": "state-a.pt", "position": {"step": -1}}', '{"slot": "state-a.pt", "position": {"step": "many"}}'),
    ],
)
def test_a_damaged_marker_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(OutputError, match=r"state.json: is damaged.*delete the folder of the unfinished work"):
        State(tmp_path).position()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x80\x02c", b"x" * 1000, "half", "other"])
def test_a_damaged_state_is_one_line(content: bytes | str | None, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = State(tmp_path)
    state.save(Position(step=3), model, optimizer)
    (file,) = (tmp_path / "state-a").iterdir()
    if content is None:
        file.unlink()
    elif content == "other":
        save_file({"x": torch.zeros(3)}, file)
    else:
        file.write_bytes(file.read_bytes()[:-100] if isinstance(content, str) else content)
    with pytest.raises(OutputError, match=r"state-a: is damaged.*delete the folder"):
        state.load(model, optimizer)


def test_a_state_that_is_gone_is_one_line(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    State(tmp_path).save(Position(step=3), model, optimizer)
    shutil.rmtree(tmp_path / "state-a")
    with pytest.raises(OutputError, match=r"state-a: is damaged.*delete the folder"):
        State(tmp_path).load(model, optimizer)


def test_a_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state-b.pt")
    write_json(tmp_path / "state.json", {"slot": "state-b.pt", "position": asdict(Position(step=1))})
    other = torch.nn.Linear(2, 2)
    continued = torch.optim.AdamW(other.parameters())
    state = State(tmp_path)
    assert state.position() == Position(step=1)
    state.load(other, continued)
    assert torch.equal(other.weight, model.weight)
    moments, theirs = (each.state[of.weight]["exp_avg"] for each, of in ((continued, other), (optimizer, model)))
    assert torch.equal(moments, theirs)
    state.remove()
    assert not list(tmp_path.glob("state*"))


def test_lines_of_a_log_that_are_damaged_are_dropped(tmp_path: Path) -> None:
    lines = [b'{"step": 1}', b'{"step": 2}', b"\xff", b"[]", b'{"step": "x"}', b"{", b'{"step": 9}']
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 2, "lo')
    assert kept_lines(tmp_path / "train.jsonl", 5) == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("content", ["", "[]", "3", '"x"', "{"])
def test_a_damaged_claim_is_not_taken_over(content: str, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / CLAIM).write_text(content)
    (work / "weights").write_text("x")
    with pytest.raises(OutputError, match="is not unfinished work of kvfold"):
        open_output(tmp_path / "out", {})
    assert (work / "weights").read_text() == "x"


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": 3}', '{"flops": {}}', '{"novel": 1}'])
def test_a_damaged_measurement_is_made_again(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    made = roofline.Hardware("local", "made up", 1, 1.0, {"bfloat16": 1.0, "float32": 1.0}, "today")
    monkeypatch.setattr(roofline, "measure", lambda: made)
    path = tmp_path / "hardware" / f"{fingerprint(roofline._identity())[:16]}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**asdict(made), **json.loads(content)}) if content == '{"flops": {}}' else content)
    assert roofline.local() == made
    monkeypatch.setattr(roofline, "measure", lambda: pytest.fail("it was kept"))
    assert roofline.local() == made


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"path": 3}', '{"path": null}'])
def test_a_damaged_place_is_no_place(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    path = _place_of("hash")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert remembered("hash") is None


def test_json_holds_any_path(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"path": "a\udcffb"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"path": "a\udcffb"}
