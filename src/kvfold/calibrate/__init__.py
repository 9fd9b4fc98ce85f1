"""Calibration: one bounded pass of the teacher over a little text, which answers the requests of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvfold.settings import MOST


@dataclass(frozen=True)
class CalibrationSettings:
    """How the teacher reads the calibration text. Sums are float64, whatever the dtype of the teacher."""

    length: int = 512  # tokens of a row; each row starts at position 0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    max_bytes: int | None = None  # memory for a layer and the answers; None: 80% of the device's
    moment_tokens: int = MOST  # of the text on which moments are measured
    sensitivity_tokens: int = 8192  # read again for each site that is converted alone
