"""The table and the fronts of a comparison, from records made by hand."""

from __future__ import annotations

from typing import Any

from kvfold.disk.record import Record
from kvfold.report.comparison import Comparison, comparison_section, comparisons
from kvfold.report.tables import NONE

ROWS: dict[str, tuple[str, float, int, float, float | None]] = {
    # group, KL, bytes of weights, bytes of cache per token, seconds of a step (None: not timed)
    "teacher": ("teacher", 0.0, 1000, 10.0, 0.02),
    "fp8 cache": ("cache", 0.01, 1000, 5.0, 0.04),
    "int8 weights": ("weights", 0.02, 500, 10.0, 0.01),
    "worse": ("weights", 0.5, 600, 10.0, 0.03),
    "half of the weights": ("pruning", 0.3, 1000, 10.0, None),
}


def made(name: str, *, task: bool = False) -> Record:
    group, kl, weights, cache, _ = ROWS[name]
    metrics: dict[str, Any] = {"loss": 2 + kl, "kl": kl, "copy_gain": {"16": 3.0}, "training_tokens": 0}
    metrics |= {"weight_bytes": weights, "cache_bytes_per_token": cache}
    if task:
        metrics["lm_eval"] = {"lambada": {"acc": 0.5, "acc_stderr": 0.01}}
    return Record("compare-row", f"run/{name}", {"row": {"name": name, "group": group, "about": ""}}, metrics)


def compared(*, task: bool = False) -> list[Record]:
    rows = [made(name, task=task) for name in ROWS]
    why = "the int4 cache needs hqq; pip install 'kvfold[compare]'"
    shown = {"row": {"name": "int4 cache", "group": "cache", "about": "hqq"}}
    rows.append(Record("compare-row", "run/int4 cache", shown, {}, status="failed", error=why))
    place = {"context": 64, "batch": 2}
    timed = {name: step for name, (*_, step) in ROWS.items() if step is not None}
    times = [{"model": name, **place, "prefill_s": 1.0, "decode_s_per_token": step} for name, step in timed.items()]
    metrics = {"rows": times, "peaks": dict.fromkeys(timed, 2048)}
    settings = {"rows": [each.identity for each in rows], "dtype": "float32"}
    return [Record("compare", "run", settings, metrics), *rows]


def only(records: list[Record]) -> Comparison:
    (found,) = comparisons(records)
    return found


def test_the_fronts_hold_what_no_row_beats() -> None:
    found = only(compared())
    assert found.front("bytes") == {"teacher", "fp8 cache"}  # 2280 and 1640 bytes at 64 tokens x 2; int8 1780
    assert found.front("speed") == {"teacher", "int8 weights"}


def test_the_table_has_ratios_to_the_teacher_and_says_why_a_row_is_missing() -> None:
    columns, rows = only(compared(task=True)).table()
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert cells["fp8 cache"]["decode at 64 × 2"] == "0.50×"
    assert cells["teacher"]["decode at 64 × 2"] == "100 tokens/s"
    assert cells["teacher"]["prefill at 64 × 2"] == "128 tokens/s"
    assert cells["half of the weights"]["decode at 64 × 2"] == NONE
    assert cells["int8 weights"]["front"] == "speed"
    assert cells["teacher"]["front"] == "bytes, speed"
    assert cells["teacher"]["lambada"] == "50.0%"
    assert "pip install" in cells["int4 cache"]["note"]
    assert cells["int4 cache"]["loss"] == NONE


def test_a_comparison_is_shown_when_all_its_rows_are_there() -> None:
    whole = compared()
    assert not list(comparisons(whole[:-1]))
    first, second = (comparison_section(whole).blocks[0].content for _ in range(2))
    assert first == second
    assert "both bytes and KL to the teacher" in first
    assert "both decode time and KL to the teacher" in first
    assert first.count('class="halo"') == 9  # five labels, and the four that were timed
