"""The command `kvfold compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.cli.commands import AS_JSON, OVERWRITE, SOURCE, _print_json, _progress, api, command
from kvfold.cli.console import OUT, table
from kvfold.cli.flags import Flag


@command(
    SOURCE,
    Flag("students", "[STUDENT...]", "Converted checkpoints of the source."),
    Flag("out", "--out", "Folder of the page and of the models it needs. Default: runs/ and the name.", "DIR"),
    Flag("records", "--records", "Folder for the records. Default: records in --out.", "DIR"),
    Flag("name", "--name", "Name of the records. Default: compare- and the source's name.", "TEXT"),
    *(OVERWRITE, AS_JSON),
    settings="compare.settings:CompareSettings",
)
def compare(src: str, students: Sequence[str], options: Any, as_json: bool, **given: Any) -> None:
    """Compare a checkpoint and its students with quantisation, pruning and others."""
    made = api.compare(src, students, options, **given, progress=_progress())
    if as_json:
        _print_json([dataclasses.asdict(each) for each in made])
        return
    from kvfold.compare.comparison import PAGE
    from kvfold.report.comparison import comparisons
    from kvfold.report.tables import NONE

    for each in comparisons(made):
        columns, rows = each.table()
        table(each.times.name, columns[:-1], [row[:-1] for row in rows])
        for row in rows:
            if row[-1] != NONE:
                OUT.show(f"{row[0]}: {row[-1]}")
    OUT.show(f"report: {Path(given['out'] or Path('runs') / made[0].name) / PAGE}")
