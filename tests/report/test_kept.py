"""The first table of a report: what is kept of loss, recall and tasks per byte, beside a quantised cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kept_records import evaluated, records, tasks
from kvfold.report import kept
from kvfold.report.rows import setting_words
from kvfold.report.studies import studies


def test_the_table_has_what_is_kept_per_byte_and_the_same_bytes_quantised() -> None:
    (study,) = studies(records())
    table = kept.kept(study)
    assert table is not None
    columns, rows = table
    assert columns == [
        "model", "bytes/token", "cache", "loss", "last word", "copy gain over 64", "copy gain over 256",
        "LAMBADA", "LAMBADA kept", "ARC-Easy", "ARC-Easy kept", "PIQA", "PIQA kept", "the same bytes, quantised",
    ]  # fmt: skip
    by_model = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert list(by_model) == [
        "teacher", "teacher, fp8 cache", "teacher, q4_0 cache", "elitekv, cache ratio 0.5", "gqa, kv heads 1",
    ]  # fmt: skip
    assert by_model["teacher"]["last word"] == "31.0% ± 3.0"
    assert (by_model["teacher"]["cache"], by_model["teacher"]["LAMBADA kept"]) == ("100%", "–")
    assert [by_model[f"teacher, {name} cache"]["cache"] for name in ("fp8", "q4_0")] == ["50%", "28.1%"]
    assert by_model["teacher, q4_0 cache"]["copy gain over 64"] == "3.50"
    half, eighth = by_model["elitekv, cache ratio 0.5"], by_model["gqa, kv heads 1"]
    assert half["the same bytes, quantised"] == "fp8: 3.010"
    assert eighth["the same bytes, quantised"] == "–"  # none is as small
    # (0.3 - 0) / (0.4 - 0), (0.45 - 0.25) / (0.5 - 0.25), (0.55 - 0.5) / (0.6 - 0.5)
    assert [half[f"{task} kept"].partition(" ")[0] for task in ("LAMBADA", "ARC-Easy", "PIQA")] == ["75%", "80%", "50%"]
    assert eighth["PIQA kept"].startswith("0%")


def test_a_student_that_was_trained_stands_there_as_it_was_converted_too() -> None:
    trained = evaluated(
        "third", {"role": "student", "method": "elitekv", "cache_ratio": 0.5, "tokens": 1_000_000}, 3.1,
        lm_eval=tasks(0.36, 0.48, 0.58),
    )  # fmt: skip
    trained = replace(trained, metrics={**trained.metrics, "cache": records()[1].metrics["cache"]})
    (study,) = studies([*records(), trained])
    assert [row.trained for row in study.students] == [True, False]
    assert [row.trained for row in study.converted] == [False]
    table = kept.kept(study)
    assert table is not None
    assert [row[0] for row in table[1]][-3:] == [
        "elitekv, cache ratio 0.5", "elitekv, 1M tokens", "gqa, kv heads 1",
    ]  # fmt: skip


def test_the_error_of_a_share_is_that_of_a_ratio() -> None:
    (study,) = studies(records())
    (half,) = (row for row in study.rows if row.method == "elitekv")
    found = kept.share(study, half, "local_lambada")
    assert found is not None
    relative = math.hypot(0.02 / 0.3, 0.02 / 0.4)  # of a quotient of independent numbers
    assert found == pytest.approx((0.75, 0.75 * relative))


def test_a_teacher_at_chance_has_no_share_to_keep() -> None:
    teacher, half, _ = records()
    teacher = replace(teacher, metrics={**teacher.metrics, "lm_eval": tasks(0.4, 0.5, 0.5)})
    (study,) = studies([teacher, half])
    assert kept.share(study, study.rows[0], "local_piqa") is None


def test_tasks_of_one_title_keep_their_names() -> None:
    teacher, *_ = records()
    acc = {"acc": 0.4, "acc_stderr": 0.02}
    asked = {"lambada_openai": acc, "lambada_standard": acc, "made_up": acc}
    (study,) = studies([replace(teacher, metrics={**teacher.metrics, "lm_eval": asked})])
    table = kept.kept(study)
    assert table is not None
    assert "lambada_openai" in table[0]
    assert "lambada_standard" in table[0]
    assert "made_up" not in table[0]  # its chance is unknown


def test_without_recall_and_tasks_there_is_no_such_table() -> None:
    bare = [replace(each, metrics={key: each.metrics[key] for key in ("loss", "cache")}) for each in records()]
    assert [kept.kept(study) for study in studies(bare)] == [None]


def test_a_setting_of_many_layers_is_written_by_its_exceptions() -> None:
    heads = "/".join("3" if layer in (0, 16, 17, 18, 19, 20, 23) else "1" for layer in range(30))
    assert setting_words("kv_heads", heads) == "kv heads 1 (3 in layers 0, 16-20, 23)"
    assert setting_words("kv_heads", "4/1/1/2") == "kv heads 4/1/1/2"
    assert setting_words("init", "fit") == "init fit"
    assert setting_words("calibration", "/home/a/text.txt") == "calibration /home/a/text.txt"
