"""Numbers in words for people: bytes and counts."""

from __future__ import annotations


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
