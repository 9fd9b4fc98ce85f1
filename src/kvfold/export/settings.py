"""The settings of an export, and of a check in an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvfold.settings import check_range, setting


@dataclass(frozen=True)
class ExportSettings:
    """How an export is stored and how long the comparison with transformers is."""

    dtype: Literal["source", "float32", "float16", "bfloat16", "int8"] = setting(
        "source", "Format of the stored weights; int8 is Q8_0 in a GGUF."
    )
    prompt_tokens: int = setting(40, "Tokens of each prompt of the check.")
    new_tokens: int = setting(16, "Greedy tokens after each prompt of the check.")

    def __post_init__(self) -> None:
        """Refuse lengths below 1, with SettingError."""
        check_range(self, "export", 1, float("inf"), "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class ServeSettings:
    """What a checkpoint in an engine is asked."""

    data: str | None = setting(
        None, "Text of the prompts: a file, a folder or a hub data set. Default: a text of kvfold."
    )
    prompts: int = setting(3, "Number of prompts, spread over the text.")
    prompt_tokens: int = setting(40, "Tokens of each prompt.")
    new_tokens: int = setting(24, "Greedy tokens after each prompt.")
    dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "float32", "Format of the engine's weights. transformers computes in float32."
    )

    def __post_init__(self) -> None:
        """Refuse counts below 1, with SettingError."""
        check_range(self, "serve-check", 1, float("inf"), "prompts", "prompt_tokens", "new_tokens")
