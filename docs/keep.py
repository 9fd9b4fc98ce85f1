"""Keep the records of a run in results/: one file of JSON lines per run, without its plans.

    python docs/keep.py runs/NAME ...    adds the records of these folders; a record of the same identity is replaced
    python docs/keep.py                  moves single record files below results/ into the files of their runs

What models cache is taken from the plans, which are not kept. Records of kvfold 0.1 (format 1) get the identity of this
version: the settings that differ from their default.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.evaluate.bench import BenchSettings
from kvfold.evaluate.evaluation import EvaluateSettings
from kvfold.report.studies import changed_by_training, plan_of, row_of
from kvfold.settings import decode, differing

RESULTS = Path(__file__).parent.parent / "results"
SETTINGS: Mapping[str, Any] = {"evaluate": EvaluateSettings, "bench": BenchSettings}  # by kind of record


def keep(folder: Path, results: Path) -> list[Path]:
    """Add the records at or below a folder to the files of their runs, and return the paths of these files."""
    found = record.read_all(folder)
    plans = [each for each in found if each.kind == "plan"]
    runs: dict[str, list[Record]] = {}
    for each in found:
        if each.kind != "plan":
            runs.setdefault(each.run, []).append(migrated(each, plans))
    written = []
    for run, records in sorted(runs.items()):
        written.append(results / f"{run}.jsonl")
        record.write_run(written[-1], records)
    return written


def migrated(made: Record, plans: Sequence[Record]) -> Record:
    """A record as this version writes it, with what its models cache by its plan: at the context of the recipe."""
    identity, metrics = made.identity, made.metrics
    if made.kvfold_record < record.FORMAT and (cls := SETTINGS.get(made.kind)):
        names = {each.name for each in dataclasses.fields(cls)}
        own = {key: value for key, value in made.settings.items() if key in names}
        others = {key: value for key, value in made.settings.items() if key not in names}
        identity = record.identity(made.kind, made.name, {**differing(decode(cls, own, made.name)), **others})
    if made.kind == "evaluate" and (cache := _cache(made, plans)):
        metrics = {**metrics, "cache": cache}
    return dataclasses.replace(made, identity=identity, metrics=metrics, kvfold_record=record.FORMAT)


def _cache(made: Record, plans: Sequence[Record]) -> dict[str, Any]:
    """What student and teacher cache, by the plan of a record's conversion; of a teacher or a control, by any."""
    row = row_of(made, {})
    plan = plan_of(plans, row) or (plans[0] if plans and row.get("role") != "student" else None)
    if plan is None or changed_by_training(plan, row):
        return {}
    before, after = (_side(plan.metrics, side) for side in ("before", "after"))
    return {"student": after if row.get("role") == "student" else before, "teacher": before}


def _side(plan: Mapping[str, Any], side: str) -> dict[str, Any]:
    heads = str(plan[side]["kv_heads"])
    return {
        "dtype": plan["dtype"],
        "bytes_per_token": plan[side]["cache_bytes"] / (plan["batch"] * plan["context"]),
        "kv_heads": int(heads) if heads.isdigit() else None,
    }


def main() -> None:
    """Keep the records of the folders on the command line, or the single files below results/."""
    for folder in map(Path, sys.argv[1:]):
        print(*keep(folder, RESULTS), sep="\n")
    if sys.argv[1:]:
        return
    loose = sorted(RESULTS.rglob("*.json"))
    for folder in sorted({path.parent for path in loose}, reverse=True):  # results/ itself comes last
        print(*keep(folder, RESULTS), sep="\n")
        for path in (path for path in loose if path.parent == folder):
            path.unlink()


if __name__ == "__main__":
    main()
