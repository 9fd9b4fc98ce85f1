"""The rows of text that a repair reads, and the sample of them that each step of its conjugate gradients reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvfold.repair.rows import DETERMINED, Rows
from kvfold.text.tokens import TokenFile

LENGTH, ROWS = 4, 32
TEXT = TokenFile(Path("text"), np.zeros(LENGTH * ROWS, np.uint16), 1, "text", "text")
ALL = Rows([LENGTH] * ROWS, [0] * ROWS, TEXT)


def test_a_sample_is_spread_evenly_over_the_text() -> None:
    batches = ALL.batches(2 * LENGTH)
    assert ALL.sampled(batches, LENGTH * ROWS // 4, 1) == [(0, 2), (8, 2), (16, 2), (24, 2)]
    assert ALL.sampled(batches, LENGTH * ROWS, 1) == ALL.sampled(batches, 10**9, 1) == batches


def test_a_sample_determines_inputs_of_its_width() -> None:
    batches = ALL.batches(LENGTH)
    enough = LENGTH * ROWS // 2 // DETERMINED
    assert len(ALL.sampled(batches, 1, enough)) == ROWS // 2
    assert ALL.sampled(batches, 1, enough + 1) == batches
