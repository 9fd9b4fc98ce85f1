"""The picture of the planes that each key head keeps, out of kvfold.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import steps_since_root
from kvfold.report import report
from kvfold.report.folder import findings
from kvfold.report.planes import first_planes, planes_figure, planes_of

TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7


def test_every_plane_that_is_kept_has_a_mark() -> None:
    pytest.importorskip("matplotlib")
    planes = {"layer 0": [[0, 1], [2, 3]], "layer 1": [[0], [5]]}
    svg = planes_figure("planes", "Planes", planes)
    assert svg == planes_figure("planes", "Planes", planes)
    assert "layer 0" in svg
    assert "layer 1" in svg
    marks = [len(re.findall("<use", group)) for group in svg.split("var(--series-")]
    assert svg.count("<use") >= 6
    assert marks
    many = planes_figure("planes", "Planes", {f"layer {n}": [[0]] for n in range(40)})
    assert "layer 36" in many
    assert "layer 37" not in many


@pytest.mark.slow
def test_a_page_shows_the_planes_of_its_students(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ConvertSettings(calibration=str(tmp_path / "text.txt"), repair=("none",))
    settings = {"rope_chunks": 2, "latent_dim": 8, "samples": 100}
    student = convert(tiny_checkpoint(), tmp_path / "run" / "student", "elitekv", settings, options=options)
    lineage = json.loads((student / "kvfold.json").read_text())
    assert [len(heads) for heads in planes_of(lineage["steps"]).values()] == [4] * 4
    assert "layer 0 2 planes and" in " ".join(findings(lineage))
    page = report(tmp_path / "run").read_text()
    assert "Rotary planes" in page
    assert "Rotary planes kept by student" in page
    steps = steps_since_root(Checkpoint.open(student))
    assert planes_of(steps) == planes_of(lineage["steps"])
    made = record.make("evaluate", "run/student/converted", {}, {"made_by": steps})
    drawn = first_planes([record.make("evaluate", "run/teacher", {}, {}), made])
    assert drawn is not None
    assert "Rotary planes kept by run/student/converted" in drawn
    assert first_planes([]) is None
    other = convert(tiny_checkpoint(name="other"), tmp_path / "plain" / "student", "gqa", {"kv_heads": 2})
    assert planes_of(json.loads((other / "kvfold.json").read_text())["steps"]) == {}
    assert "Rotary planes" not in report(tmp_path / "plain").read_text()
