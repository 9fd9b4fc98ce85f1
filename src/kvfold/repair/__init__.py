"""Repair: a closed-form refit of a student's weights, layer by layer, on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence

from kvfold.contracts.effort import RepairSettings
from kvfold.contracts.family import MLP, Family
from kvfold.contracts.site import REPAIRABLE
from kvfold.errors import SettingError, choices

__all__ = ["RepairSettings", "check_roles"]


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
