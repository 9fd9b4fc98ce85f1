"""The settings of a conversion, whatever its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from kvfold.calibrate import CalibrationSettings
from kvfold.contracts.effort import EFFORTS, EffortName, RepairSettings
from kvfold.contracts.site import REPAIRABLE
from kvfold.errors import SettingError, choices
from kvfold.settings import MOST, SEEDS, check_range, setting

ADVANCED = "Advanced"  # the panel of their flags


@dataclass(frozen=True)
class ConvertSettings:
    """Which text calibrates a conversion, what is repaired, and how the student is written."""

    calibration: str | None = setting(
        None, "Calibration text: a file, a folder, a hub data set, stdlib, or self. Default: none."
    )
    effort: EffortName = setting(
        "standard",
        "What is refitted, and on how much text: o and down on 8 tokens for each direction of the widest input (quick, "
        "about 4 forward passes of the source over them); q too on 16 (standard, 4), and gate and up of models at most "
        "256 wide (7); or all on 65,536 (thorough, 11 to 14).",
    )
    calibration_tokens: int | None = setting(
        None, "Tokens of calibration text. Default: as many as the effort needs for the width, at most 65,536."
    )
    calibration_seed: int = setting(0, "Seed that draws the calibration tokens from the text.")
    repair: tuple[str, ...] | None = setting(
        None, "Roles to refit in closed form: q,o,gate,up,down, or none. Default: the method's choice, by effort."
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
    moment_tokens: int | None = setting(
        None, "Tokens of the text on which the moments of a fit are measured. Default: by effort.", group=ADVANCED
    )
    sensitivity_tokens: int = setting(
        CalibrationSettings.sensitivity_tokens,
        "Tokens on which the cost of converting each layer alone is measured.",
        group=ADVANCED,
    )
    repair_length: int = setting(RepairSettings.length, "Tokens of one row of text in a repair.", group=ADVANCED)
    repair_q_tokens: int | None = setting(None, "Tokens on which q is repaired. Default: by effort.", group=ADVANCED)
    repair_inner_tokens: int | None = setting(
        None, "Tokens on which gate and up are repaired. Default: by effort.", group=ADVANCED
    )
    repair_tolerance: float | None = setting(
        None,
        "Share of all gains below which one more step of q, gate and up is the last. Default: by effort.",
        group=ADVANCED,
    )

    def __post_init__(self) -> None:
        """Raise SettingError for sizes out of range and for roles that cannot be repaired."""
        sizes = ("calibration_tokens", "calibration_length", "moment_tokens", "sensitivity_tokens", "repair_length")
        check_range(self, "convert", 1, MOST, *sizes, "repair_q_tokens", "repair_inner_tokens")
        check_range(self, "convert", 0, 1, "repair_tolerance")
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
            self.calibration_length,
            self.calibration_dtype,
            self.calibration_memory,
            self.moment_tokens or EFFORTS[self.effort].moment_tokens,
            self.sensitivity_tokens,
        )

    @property
    def repairing(self) -> RepairSettings:
        """How much text a repair reads: as set, and the rest by effort."""
        given = {each.name: getattr(self, f"repair_{each.name}") for each in fields(RepairSettings)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(EFFORTS[self.effort].repair, **chosen)

    def identity(self) -> Mapping[str, Any]:
        """The settings that decide a student's weights and files, beside the calibration that its hash identifies.

        Settings that are younger than the first students are left out where they are as those were made, so that old
        students keep their identity. The effort is what it stands for.
        """
        known = {"dtype": self.dtype, "shard_size": self.shard_size, "repair": list(self.repair or ())}
        first, made = RepairSettings(), self.repairing if self.repair else replace(self, effort="thorough").repairing
        younger = {
            f"repair_{each.name}": (getattr(made, each.name), getattr(first, each.name)) for each in fields(first)
        }
        younger["sensitivity_tokens"] = (self.sensitivity_tokens, CalibrationSettings.sensitivity_tokens)
        read = self.reading.moment_tokens if self.calibration else CalibrationSettings.moment_tokens
        younger["moment_tokens"] = (read, CalibrationSettings.moment_tokens)
        return known | {name: value for name, (value, usual) in younger.items() if value != usual}


ADVANCED_NAMES = tuple(each.name for each in fields(ConvertSettings) if each.metadata.get("group") == ADVANCED)
