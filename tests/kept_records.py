"""Made-up records of a teacher with quantised caches, and of two students, with loss, recall and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.disk import record

SETTINGS = {"sequence_length": 512, "stride": 512, "seed": 0, "dtype": "bfloat16", "lm_eval_limit": 500}
CACHES = {"teacher": 1000.0, "third": 250.0, "half": 500.0, "eighth": 125.0}


def tasks(*accuracies: float) -> dict[str, dict[str, float]]:
    names = ("local_lambada", "local_arc_easy", "local_piqa")
    return {name: {"acc": acc, "acc_stderr": 0.02} for name, acc in zip(names, accuracies, strict=True)}


def evaluated(name: str, row: Mapping[str, Any], loss: float, **metrics: Any) -> record.Record:
    cache = {"student": {"dtype": "bfloat16", "bytes_per_token": CACHES[name]}}
    if row["role"] != "teacher":
        cache["teacher"] = {"dtype": "bfloat16", "bytes_per_token": CACHES["teacher"]}
        metrics["teacher_loss"] = 3.0
    hashes = {"student": name, "teacher": None if row["role"] == "teacher" else "teacher", "tokens": "t"}
    measured = {"loss": loss, "cache": cache, **metrics}
    return record.make("evaluate", name, {**SETTINGS, "row": row}, measured, hashes=hashes, device="made-up")


def records() -> list[record.Record]:
    quantised = {
        "fp8": {"bits": 8.0, "loss": 3.01, "last_word": 0.3, "lm_eval": tasks(0.39, 0.5, 0.6)},
        "q4_0": {"bits": 4.5, "loss": 3.1, "copy_gain": {"64": 3.5}},
    }
    return [
        evaluated(
            "teacher",
            {"role": "teacher", "method": "identity"},
            3.0,
            copy_gain={"64": 4.0, "256": 3.0},
            last_word=0.31,
            last_word_stderr=0.03,
            quantised_cache=quantised,
            lm_eval=tasks(0.4, 0.5, 0.6),
        ),
        evaluated(
            "half",
            {"role": "student", "method": "elitekv", "cache_ratio": 0.5},
            3.2,
            copy_gain={"64": 3.9, "256": 2.5},
            last_word=0.2,
            lm_eval=tasks(0.3, 0.45, 0.55),
        ),
        evaluated("eighth", {"role": "student", "method": "gqa", "kv_heads": 1}, 5.0, lm_eval=tasks(0.0, 0.25, 0.5)),
    ]
