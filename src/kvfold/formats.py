"""Numbers in words for people: bytes and counts; and values as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from kvfold.inputs import LARGEST


def size(number: float) -> str:
    """Bytes for people: `512 KiB`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def count(number: float) -> str:
    """A count for people: `0.95`, `9,500`, `6.74B`."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def json_text(value: object, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """A value as JSON, without numbers that `measurable` replaces: JSON has no NaN and no Infinity."""
    return json.dumps(measurable(value), indent=indent, ensure_ascii=ascii_only, default=str, allow_nan=False)


def measurable(value: Any) -> Any:
    """A JSON value in which numbers that are not finite or do not fit into 64 bits are None."""
    if isinstance(value, Mapping):
        return {key: measurable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [measurable(inner) for inner in value]
    odd = not math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) > LARGEST
    return None if odd else value
