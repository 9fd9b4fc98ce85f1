"""Records in results/: kept without plans, and migrated from kvfold 0.1 with the same numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from keep import RESULTS, keep, migrated
from kvfold.disk import record
from kvfold.disk.record import Record
from kvfold.evaluate.bench import BenchSettings
from kvfold.evaluate.evaluation import EvaluateSettings
from kvfold.report import report
from kvfold.report.studies import studies
from kvfold.settings import differing

ASKED = EvaluateSettings("text", sequence_length=64, stride=64, copy_distances=(1,))
LATER = ("fp8", "beams", "answers", "answer_tokens")  # settings that records of kvfold 0.1 may lack
PLAN = {
    "source": "teacher",
    "method": "gqa",
    "settings": {"kv_heads": 2, "init": "mean"},
    "context": 100,
    "batch": 4,
    "dtype": "bfloat16",
    "tensor_parallel": 1,
    "hardware": {"name": "h100"},
    "before": {"kv_heads": "8", "cache_bytes": 8 * 400},
    "after": {"kv_heads": "2", "cache_bytes": 2 * 400},
    "engines": [],
    "warnings": [],
    "speedup": 2.0,
}
TIMED = {"model": "a", "cache": "native", "context": 1, "batch": 1, "cache_bytes": 8}
TIMED |= {"prefill_s": 1.0, "decode_s_per_token": 1.0}
for side in ("before", "after"):
    PLAN[side] |= {"parameters": 9, "cache_bytes_per_token": 8, "largest_batch": 5}  # type: ignore[operator]


def old(kind: str, name: str, settings: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """A record file of kvfold 0.1, which has no identity."""
    made = vars(
        record.make(kind, name, settings, metrics, hashes={"student": name, "teacher": "toy/teacher"}, device="d")
    )
    return {**{key: value for key, value in made.items() if key != "identity"}, "kvfold_record": 1}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of a run of kvfold 0.1: a teacher, a student, a plan and a benchmark."""
    settings = {key: value for key, value in dataclasses.asdict(ASKED).items() if key not in LATER}
    teacher = {**settings, "student": "teacher", "teacher": None, "row": {"role": "teacher", "method": "identity"}}
    row = {"role": "student", "method": "gqa", "kv_heads": 2, "init": "mean"}
    student = {**settings, "student": "out", "teacher": "teacher", "row": row}
    contents = [
        old("evaluate", "toy/teacher", teacher, {"loss": 1.0}),
        old("evaluate", "toy/student", student, {"loss": 1.5, "teacher_loss": 1.0}),
        old("plan", "gqa", {"method": "gqa"}, PLAN),
        old("bench", "toy", {**dataclasses.asdict(BenchSettings()), "models": ["a"]}, {"rows": [TIMED]}),
    ]
    folder = tmp_path / "runs" / "toy"
    (folder / "records").mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / "records" / f"{content['kind']}-{number}.json").write_text(json.dumps(content))
    return folder


def test_a_run_of_before_keeps_its_numbers_and_gets_the_identity_of_today(runs: Path, tmp_path: Path) -> None:
    before = {(each.kind, each.name): each for each in record.read_all(runs) if each.kind != "plan"}
    results = tmp_path / "results"
    results.mkdir()
    assert keep(runs, results) == [results / "toy.jsonl"]
    after = {(each.kind, each.name): each for each in record.read_all(results)}
    assert after.keys() == before.keys()
    for key, each in before.items():
        assert {**after[key].metrics, "cache": None} == {**each.metrics, "cache": None}
        assert (after[key].settings, after[key].date) == (each.settings, each.date)
    named = {key: before["evaluate", "toy/student"].settings[key] for key in ("student", "teacher", "row")}
    asked = record.identity("evaluate", "toy/student", {**differing(ASKED), **named})
    assert after["evaluate", "toy/student"].identity == asked
    assert after["bench", "toy"].identity == record.identity("bench", "toy", {"models": ["a"]})
    written = (results / "toy.jsonl").read_bytes()
    keep(runs, results)
    assert (results / "toy.jsonl").read_bytes() == written


def test_what_models_cache_is_known_without_the_plans(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    keep(runs, tmp_path / "results")
    for folder in (runs, tmp_path / "results"):
        (study,) = studies(record.read_all(folder))
        sizes = [(row.role, row.cache_bytes, row.teacher_cache_bytes) for row in study.everyone]
        assert sizes == [("teacher", 8.0, 8.0), ("student", 2.0, 8.0)]


@pytest.mark.slow
def test_a_report_shows_records_of_before_and_of_one_file(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    keep(runs, tmp_path / "results")
    for folder in (runs, tmp_path / "results"):
        assert "2 bytes per token" in report(folder).read_text(encoding="utf-8")


def test_a_record_of_today_keeps_its_identity() -> None:
    made = Record("evaluate", "a", {"anything": 1}, {})
    assert migrated(made, []) == made


def test_results_are_one_file_for_each_run_without_plans() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    found = record.read_all(RESULTS)
    assert {path.suffix for path in files} == {".jsonl"}
    assert {each.run for each in found} == {path.stem for path in files}
    assert "plan" not in {each.kind for each in found}
    assert len(found) == len({each.identity for each in found})
