"""Efforts: how much text a conversion reads, what it refits, and how long it looks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from kvfold.contracts.site import REPAIRABLE
from kvfold.settings import MOST

EffortName = Literal["quick", "standard", "thorough"]

CORRUPTED = 0.15  # the share of a text that span corruption makes targets of: T5's value

SPOOLED = 384 << 20
"""Bytes of the text's hidden states that are in memory beside a processor; the others are on disk. A disk takes a third
of the time of a small model."""

Q_STEPS, INNER_STEPS = 6, 3
"""Conjugate gradients of a repair at most: of q, and of gate and up. Each step rereads their tokens."""


@dataclass(frozen=True)
class RepairSettings:
    """How much of the calibration text a repair reads, and when its conjugate gradients stop."""

    length: int = 256  # tokens of a row; each row starts at position 0
    q_tokens: int = 49_152  # on which q is repaired, whose cost grows with the square of the length
    inner_tokens: int = MOST  # on which gate and up are repaired
    tolerance: float = 0.0  # they stop after a step that gains at most this share of all gains


@dataclass(frozen=True)
class Effort:
    """What a conversion takes where its settings leave it open.

    It reads `rows` tokens for each direction of the widest input that is regressed on, within `least` and `most`: on N
    tokens, a regression on F directions fits about `F / N` of what it cannot explain. A repair of an encoder-decoder
    regresses on tokens of the decoder.
    """

    roles: tuple[str, ...]  # of those that the method repairs
    repair: RepairSettings
    rows: int
    moment_tokens: int  # on which the moments of a fit are measured
    least: int
    most: int = 65_536
    narrow: int | None = None  # gate and up are refitted in models of at most this width; None: in all

    def repaired(self, roles: Iterable[str], mlp: Iterable[str], width: int) -> tuple[str, ...]:
        """Those of a method's repairs that it takes, in a model of this width whose MLP has these parts."""
        wide = self.narrow is not None and width > self.narrow
        taken = [role for role in self.roles if not (wide and role in ("gate", "up"))]
        return tuple(role for role in roles if role in taken and (role in ("q", "o") or role in mlp))

    def tokens(self, directions: int) -> int:
        """Tokens of calibration text for regressions on inputs of this width."""
        return min(self.most, max(self.least, self.rows * directions))


EFFORTS: Mapping[EffortName, Effort] = {
    "quick": Effort(("o", "down"), RepairSettings(), rows=8, moment_tokens=16_384, least=8192),
    "standard": Effort(
        REPAIRABLE,
        RepairSettings(q_tokens=16_384, inner_tokens=16_384, tolerance=0.05),
        rows=16,
        moment_tokens=16_384,
        least=32_768,
        narrow=256,
    ),
    "thorough": Effort(REPAIRABLE, RepairSettings(), rows=16, moment_tokens=MOST, least=65_536),
}
