"""The settings of an inspection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvfold.calibrate import CalibrationSettings
from kvfold.contracts.effort import EffortName
from kvfold.errors import SettingError, choices
from kvfold.settings import MOST, check_range, setting

ABLATIONS = ("heads", "recall", "folds")


@dataclass(frozen=True)
class InspectSettings:
    """Which text is read, what is ablated on it, and what a fold may cost."""

    data: str = field(
        metadata={
            "help": "Text: a file, a folder, a hub data set, stdlib, or self; best one that the model was not trained "
            "on, because losses rise less there."
        }
    )
    ablations: tuple[str, ...] = setting(
        ABLATIONS,
        "What is measured by changing one part after the other: the KL without each head (heads), the loss of copying "
        "without each head (recall), both with fewer heads in each layer (folds); or none.",
    )
    loss: float = setting(0.5, "Predicted loss that the suggested fold may cost, in nats per token before repair.")
    effort: EffortName = setting("standard", "How much text is read: as much as a conversion of this effort reads.")
    sensitivity_tokens: int = setting(
        CalibrationSettings.sensitivity_tokens, "Tokens on which the cost of folding each layer is measured."
    )

    def __post_init__(self) -> None:
        """Raise SettingError for an unknown ablation and for numbers out of range."""
        if self.ablations == ("none",):
            object.__setattr__(self, "ablations", ())
        for name in self.ablations:
            if name not in ABLATIONS:
                raise SettingError(
                    f"{name!r} cannot be ablated", where="inspect", allowed=f"{choices(ABLATIONS)}, or none"
                )
        check_range(self, "inspect", 0, math.inf, "loss")
        check_range(self, "inspect", 1, MOST, "sensitivity_tokens")
