"""The measurement of this machine: bounded in time, and another one for other instruction sets."""

from __future__ import annotations

from itertools import count

import pytest

from kvfold.predict import roofline


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "runs"), [(0.25, 4), (2.0, 1)])
def test_slow_products_are_measured_in_few_runs(monkeypatch: pytest.MonkeyPatch, seconds: float, runs: int) -> None:
    asked = count()
    monkeypatch.setattr(roofline, "clock", lambda: next(asked) * seconds)
    monkeypatch.setattr(roofline, "best_device", lambda: "cpu")
    found = roofline.measure()
    assert next(asked) == 2 * runs * 4  # before and after each run of two readings and two products
    assert found.flops == dict.fromkeys(("bfloat16", "float32"), 2 * 1536**3 / seconds)


def test_another_instruction_set_is_another_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = roofline._identity()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert roofline._identity() != before
