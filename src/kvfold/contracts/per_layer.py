"""Settings that differ by kind of site: `8`, or `self=8,cross=4`."""

from __future__ import annotations

from collections.abc import Sequence

from kvfold.contracts.site import Kind
from kvfold.errors import SettingError, choices, did_you_mean


def per_kind(setting: str | int, kinds: Sequence[Kind], name: str) -> dict[Kind, int]:
    """Read `8` or `self=8,cross=4` as one positive whole number per kind of site.

    Raises SettingError when a kind is unknown or missing, or a number is not a positive whole one.
    """
    text = str(setting).strip()
    pairs = [part.split("=", 1) for part in text.split(",")]
    if all(len(pair) == 1 for pair in pairs) and len(pairs) == 1:
        pairs = [[kind, text] for kind in kinds]
    found: dict[Kind, int] = {}
    for pair in pairs:
        kind = next((known for known in kinds if known == pair[0].strip()), None)
        if len(pair) != 2 or kind is None:
            hint = did_you_mean(pair[0].strip(), kinds)
            raise SettingError(
                f"{name}: cannot read {text!r}",
                allowed=f"a whole number, or {','.join(f'{kind}=N' for kind in kinds)}",
                next=hint,
            )
        if kind in found:
            raise SettingError(f"{name}: {kind} is said twice", got=repr(text))
        if not pair[1].strip().isdecimal() or int(pair[1]) < 1:
            raise SettingError(f"{name}: {pair[1].strip()!r} is not a positive whole number", allowed="1 or more")
        found[kind] = int(pair[1])
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        raise SettingError(f"{name}: nothing said for {choices(missing)}", got=repr(text))
    return found


def divisors(number: int) -> list[int]:
    """All positive divisors, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]
