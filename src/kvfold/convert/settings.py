"""The settings of a conversion, whatever its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from kvfold.calibrate import CalibrationSettings
from kvfold.contracts.site import REPAIRABLE
from kvfold.errors import SettingError, choices
from kvfold.repair import RepairSettings
from kvfold.settings import MOST, SEEDS, check_range, differing, setting

ADVANCED = "Advanced"  # the panel of their flags


@dataclass(frozen=True)
class ConvertSettings:
    """Which text calibrates a conversion, what is repaired, and how the student is written."""

    calibration: str | None = setting(
        None, "Calibration text: a file, a folder, a hub data set, stdlib, or self. Default: none."
    )
    calibration_tokens: int = setting(65_536, "Tokens of calibration text.")
    calibration_seed: int = setting(0, "Seed that draws the calibration tokens from the text.")
    repair: tuple[str, ...] | None = setting(
        None, "Roles to refit in closed form: q,o,gate,up,down, or none. Default: the method's choice."
    )
    shard_size: int = setting(5 * 10**9, "Largest weight file, in bytes; 5G is 5 billion.")
    dtype: Literal["source", "bfloat16", "float16", "float32"] = setting("source", "Format of the student's weights.")
    calibration_length: int = setting(
        CalibrationSettings.length, "Tokens of one row of calibration text.", group=ADVANCED
    )
    calibration_dtype: Literal["float32", "bfloat16", "float64"] = setting(
        CalibrationSettings.dtype,
        "Format in which the teacher computes in calibration; sums are float64.",
        group=ADVANCED,
    )
    calibration_memory: int | None = setting(
        CalibrationSettings.max_bytes,
        "Bytes (8G) of memory for one layer of the teacher and the statistics. Default: 80% of the device's.",
        group=ADVANCED,
    )
    sensitivity_tokens: int = setting(
        CalibrationSettings.sensitivity_tokens,
        "Tokens on which the cost of converting each layer alone is measured.",
        group=ADVANCED,
    )
    repair_length: int = setting(RepairSettings.length, "Tokens of one row of text in a repair.", group=ADVANCED)
    repair_q_tokens: int = setting(
        RepairSettings.q_tokens,
        "Tokens on which q is repaired. Other weights are repaired on all of the text.",
        group=ADVANCED,
    )

    def __post_init__(self) -> None:
        """Raise SettingError for sizes out of range and for roles that cannot be repaired."""
        sizes = ("calibration_tokens", "calibration_length", "sensitivity_tokens", "repair_length", "repair_q_tokens")
        check_range(self, "convert", 1, MOST, *sizes)
        check_range(self, "convert", 1, float("inf"), "shard_size", "calibration_memory")
        check_range(self, "convert", 0, SEEDS - 1, "calibration_seed")
        if self.repair == ("none",):
            object.__setattr__(self, "repair", ())
        unknown = [role for role in self.repair or () if role not in REPAIRABLE]
        if unknown:
            raise SettingError(
                f"{unknown[0]!r} cannot be repaired", where="convert", allowed=f"{choices(REPAIRABLE)}, or none"
            )

    @property
    def reading(self) -> CalibrationSettings:
        """How the teacher reads the calibration text."""
        return CalibrationSettings(
            self.calibration_length, self.calibration_dtype, self.calibration_memory, self.sensitivity_tokens
        )

    @property
    def repairing(self) -> RepairSettings:
        """How much text a repair reads."""
        return RepairSettings(self.repair_length, self.repair_q_tokens)

    def identity(self) -> Mapping[str, Any]:
        """The settings that decide a student's weights and files, beside the calibration that its hash identifies.

        Settings that are younger than the first students are left out at their defaults, so that old students keep
        their identity.
        """
        known = {"dtype": self.dtype, "shard_size": self.shard_size, "repair": list(self.repair or ())}
        younger = ("sensitivity_tokens", "repair_length", "repair_q_tokens")
        return known | {name: value for name, value in differing(self).items() if name in younger}


ADVANCED_NAMES = tuple(each.name for each in fields(ConvertSettings) if each.metadata.get("group") == ADVANCED)
