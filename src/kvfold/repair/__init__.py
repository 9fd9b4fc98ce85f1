"""Repair: a closed-form refit of a student's weights, layer by layer, on its own inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RepairSettings:
    """How much of the calibration text a repair reads."""

    length: int = 256  # tokens of a row; each row starts at position 0
    q_tokens: int = 49_152  # on which q is repaired, whose cost grows with the square of the length
    inner_tokens: int | None = None  # on which gate and up are repaired; None: all
    tolerance: float = 0.0  # conjugate gradients stop after a step that gains at most this share of all gains
