"""The table of engines: a cell says what its record says."""

from __future__ import annotations

from typing import Any

from kvfold.disk.record import Record
from pages.serving import NOT_RUN, serving_tables

EQUAL: dict[str, Any] = {
    **{"version": "vLLM 1", "problem": None, "near_ties": 0, "same_tokens": 70, "tokens": 72, "max_difference": 1.5e-5},
    **{"cache_bytes_per_token": 8704.0, "predicted_cache_bytes_per_token": 8704.0},
}


def _record(engine: str, kind: str, metrics: dict[str, Any]) -> Record:
    return Record("engine", f"serving/{engine} {kind}", {"engine": engine, "kind": kind}, metrics, device="a machine")


def test_cells_are_equal_different_refused_or_not_run() -> None:
    records = [
        _record("vllm", "heads", EQUAL),
        _record("ct2", "heads", EQUAL | {"version": "CT2 4", "near_ties": 1, "cache_bytes_per_token": None}),
        _record("vllm", "latents", {"refused": "it failed: Value error, no such class"}),
        _record("ct2", "latents", {"refused": "cannot be exported to CT2 4: no: latents"}),
        _record("vllm", "shared", EQUAL | {"problem": "logits differ"}),
    ]
    table, versions = serving_tables(records)
    head, _, heads, shared, latents = table.splitlines()  # by the engines that load them
    assert head == "| student | vllm | ct2 |"
    vllm, ct2 = heads.split(" | ")[1:]
    assert vllm == ("70 of 72 tokens the same, logits within 1.5e-05, cache 8,704 bytes per token (predicted 8,704)")
    assert ct2 == "70 of 72 tokens the same (1 near ties), logits within 1.5e-05 |"
    assert latents == "| latents | no: no such class | no: no: latents |"
    assert shared == f"| shared | differs: logits differ | {NOT_RUN} |"
    assert versions == "Run with vLLM 1; CT2 4, in float32 on a machine."
    assert not list(serving_tables([]))
