"""`benchmarks/device.py --tiny` runs every part on the device at hand and writes its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"


@pytest.mark.slow
def test_the_tiny_run_measures_every_part(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--results", tmp_path],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "KVFOLD_CACHE": str(tmp_path / "cache")},
    )
    (path,) = tmp_path.glob("benchmark-device-*")
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    assert {row["variant"] for row in metrics["decode"]} == {"mha", "gqa-8", "mqa", "latent", "state"}
    # keys and values of 2 sequences, 8 heads of 16, 64 tokens, in bf16
    assert next(row for row in metrics["decode"] if row["variant"] == "mha")["bytes"] == 2 * 2 * 8 * 16 * 64 * 2
    assert [row["tokens"] for row in metrics["prefill"]] == [32, 32, 32]
    assert metrics["uptrain"]["kl"]["tokens_per_second"] > 0
    assert metrics["convert"]["repair_seconds"] > 0
