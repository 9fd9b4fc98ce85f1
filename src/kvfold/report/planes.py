"""The rotary planes that the key heads of a student keep, as its conversion found them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.disk.record import Record
from kvfold.report import figures
from kvfold.report.blocks import Block, Section
from kvfold.report.folder import Run

ROWS = 12  # layers that are drawn; of more, every n-th

ABOUT = (
    "Each row is a key head, head 0 of a layer at the bottom; plane 0 turns fastest. A mark is a plane that stays "
    "rotated and is cached as it is; the others are part of the latent."
)


def planes_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[list[int]]]:
    """The planes that each key head keeps, by site; empty for other methods. `steps` are of a lineage or a record."""
    found: dict[str, list[list[int]]] = {}
    for step in steps:
        sites = (step.get("found") or {}).get("sites") or {}
        found |= {name: site["planes"] for name, site in sites.items() if "planes" in site}
    return found


def planes_figure(name: str, title: str, planes: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """Inline SVG with a mark for each plane of each key head that stays rotated."""
    step = -(-len(planes) // ROWS)
    drawn = list(planes.items())[::step]
    rows = [
        figures.Line(
            site,
            [plane for kept in heads for plane in kept],
            [layer + _height(head, heads) for head, kept in enumerate(heads) for _ in kept],
        )
        for layer, (site, heads) in enumerate(drawn)
    ]
    return figures.marks(name, title, rows, x_label="rotary plane", y_ticks=[site for site, _ in drawn])


def _height(head: int, heads: Sequence[Sequence[int]]) -> float:
    """The height of a head's row within its layer."""
    return 0.8 * ((head + 0.5) / len(heads) - 0.5)


def first_planes(records: Sequence[Record]) -> str | None:
    """The figure of the first student among the records that keeps planes; None without one."""
    for record in records:
        if record.kind == "evaluate" and (planes := planes_of(record.metrics.get("made_by") or ())):
            return figures.standalone(planes_figure("planes", f"Rotary planes kept by {record.name}", planes))
    return None


def planes_section(run: Run) -> Section:
    """A figure for each student that was converted on this page."""
    blocks: list[Block] = []
    for number, checkpoint in enumerate(run.checkpoints):
        planes = planes_of(checkpoint.lineage["steps"])
        if planes and checkpoint.lineage["steps"][-1]["stage"] == "convert":
            figure = planes_figure(f"planes-{number}", f"Rotary planes kept by {checkpoint.name}", planes)
            rows = [[site, " / ".join(" ".join(map(str, kept)) for kept in heads)] for site, heads in planes.items()]
            table = (["site", "planes, head by head"], rows)
            blocks.append(Block("figure", checkpoint.name, table=table, content=figure, words=2))
    return Section("planes", "Rotary planes", ABOUT, tuple(blocks))
