"""Repair: a closed-form refit of a student's weights, layer by layer, on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.contracts.family import MLP, Family
from kvfold.contracts.site import REPAIRABLE
from kvfold.errors import SettingError, choices


@dataclass(frozen=True)
class RepairSettings:
    """How much of the calibration text a repair reads."""

    length: int = 256  # tokens of a row; each row starts at position 0
    q_tokens: int = 49_152  # on which q is repaired, whose cost grows with the square of the length
    inner_tokens: int | None = None  # on which gate and up are repaired; None: all
    tolerance: float = 0.0  # conjugate gradients stop after a step that gains at most this share of all gains


def check_roles(family: Family, roles: Sequence[str]) -> None:
    """Raise SettingError for roles that cannot be repaired in this family."""
    if unknown := [role for role in roles if role not in REPAIRABLE]:
        raise SettingError(f"{unknown[0]!r} cannot be repaired", where="repair", allowed=choices(REPAIRABLE))
    if absent := [role for role in roles if role in MLP and role not in family.body.mlp]:
        raise SettingError(
            f"the MLP of family {family.name} has no {choices(absent)}",
            where="repair",
            next=f"leave out {choices(absent)}",
        )
