"""The words, commands and figures of an inspection, from a record that is written here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.report import figures
from kvfold.report.inspection import advice, commands
from kvfold.report.page import render_inspection

ROW: dict[str, Any] = {
    "heads": 2,
    "readers": 1,
    "keys": [[1.0, 0.25], [0.25, 1.0]],
    "values": [[1.0, 0.5], [0.5, 1.0]],
    **{key: [0.25, 0.75] for key in ("entropy", "distance", "sink", "local", "far", "induction")},
    **{key: [2.0, 3.0] for key in ("key_rank", "value_rank")},
}
UNIFORM = {"kv_heads": 1, "cache": 0.5, "kl": 0.2, "rise": 0.3}
MIX = {"kv_heads": "2/1", "cache": 0.75, "kl": 0.1, "rise": 0.0}


def made(source: str = "models/of mine", **metrics: Any) -> Record:
    layers = [
        {**ROW, "layer": 0, "kl": [0.5, 0.001], "rise": [1.5, -0.2], "fold_kl": {"1": 0.1}, "fold_rise": {"1": 0.2}},
        {**ROW, "layer": 3, "kl": [0.25, 0.0], "rise": [0.0, 0.0], "fold_kl": {"1": 0.1}, "fold_rise": {"1": 0.1}},
    ]
    settings = {"source": source, "data": "text.txt", "effort": "quick", "loss": 0.5}
    found = {"layers": [{**row, "fewest": 1} for row in layers], "duplicates": [], "tokens": 4096, **metrics}
    return record.make("inspect", "mine", settings, found)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            {
                "predicted": {"1": UNIFORM},
                "uniform": UNIFORM,
                "mix": None,
                "copying": [0],
                "recall_heads": [[0, 0, 1.5]],
            },
            [
                "1 head everywhere: 50% of the cache, predicted loss +0.200 nats per token and loss of copying +0.300, "
                "before repair.",
                "Layer 0 copies: fold it last.",
                "Heads that copy (layer.head): 0.0.",
            ],
        ),
        (
            {"predicted": {"1": UNIFORM}, "uniform": None, "mix": MIX, "copying": [0, 3], "recall_heads": []},
            [
                "Within the loss, 2/1: 75% of the cache, predicted loss +0.100 nats per token and "
                "loss of copying +0.000, before repair.",
                "Layers 0 and 3 copy: fold them last.",
                "No head copies: without any one of them the loss of copying hardly rises.",
            ],
        ),
        (
            {"predicted": {"1": UNIFORM}, "uniform": None, "mix": None, "copying": []},
            [
                "No fold is within a loss of 0.5: 1 head everywhere: 50% of the cache, predicted loss +0.200 nats per "
                "token and loss of copying +0.300, before repair."
            ],
        ),
        (
            {"predicted": {}, "uniform": None, "mix": None, "copying": [], "duplicates": [[3, 0, 1]]},
            [
                "Every layer has one head: there is nothing to fold.",
                "Heads that are images of one another, so that one for both loses nothing: 0 and 1 of layer 3.",
            ],
        ),
        ({}, []),
    ],
)
def test_the_suggestion_in_words(metrics: dict[str, Any], words: list[str]) -> None:
    assert advice(made(**metrics)) == words


def test_commands_quote_what_a_shell_would_split() -> None:
    found = commands(made(uniform=UNIFORM, mix=MIX))
    start = "kvfold convert 'models/of mine' student --method gqa --calibration text.txt --effort quick --kv-heads"
    assert found == {"uniform": f"{start} 1", "mix": f"{start} 2/1"}
    assert commands(made()) == {}


def test_a_page_has_the_same_bytes_each_time_and_shows_every_cell() -> None:
    pytest.importorskip("matplotlib")
    one = made(predicted={"1": UNIFORM}, uniform=UNIFORM, mix=MIX, copying=[0])
    page = render_inspection(one)
    assert page == render_inspection(one)
    assert "layer 3, key/value head 0: 0.250" in page
    assert "layer 0, key/value head 0: 1.500" in page
    assert "layer 3, key/value heads that stay 1: 0.100" in page
    assert "kvfold convert &#39;models/of mine&#39; student" in page
    assert "rotary" not in page.partition("<h1>")[2]  # none was measured
    hostile = render_inspection(made(source="<script>alert(1)</script>", uniform=UNIFORM))
    assert "<script>alert" not in hostile


def test_a_heat_map_grows_stronger_and_frames_what_is_marked() -> None:
    pytest.importorskip("matplotlib")
    look = {"x_label": "head", "y_label": "layer"}
    svg = figures.heat_map("heat", "Heat", [[0.0, 0.25, 1.0], [None, -1.0, 0.5]], **look, marked={(1, 2)})
    shades = {
        cell: float(re.search(r"opacity: ([\d.]+)", part)[1]) if "opacity" in part else 1.0  # type: ignore[index]
        for cell, part in re.findall(r'<g id="heat-cell-(\d-\d)">(.*?)</g>', svg, re.S)
    }
    assert shades == {"0-0": 0.04, "0-1": 0.25, "0-2": 1.0, "1-1": 0.04, "1-2": 0.5}
    assert svg.count("stroke: currentColor") >= 1
    rooted = figures.heat_map("heat", "Heat", [[0.25, 1.0]], **look, root=True)
    assert "opacity: 0.5" in rooted
    wide = figures.heat_map("heat", "Heat", [[0.5] * 40], **look)
    assert ">0.50<" not in wide  # no room for numbers but in hover texts
    assert wide.count("0.500</title>") == 40
