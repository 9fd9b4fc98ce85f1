"""Settings that differ by layer and by kind of site, parsed once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pydantic_core.core_schema as schemas

from kvfold.contracts.site import KINDS, Kind, Site
from kvfold.errors import SettingError, choices

_PART = re.compile(rf"(?:({'|'.join(KINDS)})\s*=)?\s*([0-9]+(?:/[0-9]+)*)")


@dataclass(frozen=True)
class PerSite:
    """A whole number, or one for each layer (4/2/2/1), or for each kind of site (self=8,cross=4).

    `numbers` has one number, or one for each layer, by kind; the kind None stands for every kind. A settings field of
    this type takes each spelling: 8, "8", "4/2/2/1", "self=4/2/2/1,cross=8".
    """

    numbers: Mapping[Kind | None, tuple[int, ...]]
    text: str | None = field(default=None, compare=False)  # as a person wrote it: hashes and files keep the spelling

    @classmethod
    def parse(cls, value: object) -> PerSite:
        """Read a number or a spelling. Raises ValueError for anything else, and for numbers below 1."""
        if isinstance(value, PerSite):
            return value
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise ValueError("neither a number nor text")
        parts = [_PART.fullmatch(part.strip()) for part in str(value).split(",")]
        numbers: dict[Any, tuple[Any, ...]] = {
            part[1]: tuple(map(int, part[2].split("/"))) for part in parts if part is not None
        }
        if len(numbers) < len(parts) or (None in numbers and len(numbers) > 1) or min(map(min, numbers.values())) < 1:
            raise ValueError("no numbers by layer or kind")
        return cls(numbers, value if isinstance(value, str) else None)

    @classmethod
    def of(cls, numbers: Mapping[Site, int]) -> PerSite:
        """The shortest setting that gives each site its number. Kinds are named if there is more than one."""
        by_kind = {kind: tuple(numbers[site] for site in sorted(numbers) if site.kind == kind) for kind in KINDS}
        found: dict[Kind | None, tuple[int, ...]] = {
            kind: row[:1] if len(set(row)) == 1 else row for kind, row in by_kind.items() if row
        }
        return cls({None: next(iter(found.values()))} if len(found) == 1 else found)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> schemas.CoreSchema:
        return schemas.no_info_plain_validator_function(cls.parse)

    def __str__(self) -> str:
        return str(self.spelled())

    def spelled(self) -> int | str:
        """The setting as it was given; of numbers by site, an int if there is one number for all."""
        if self.text is not None:
            return self.text
        if list(self.numbers) == [None] and len(self.numbers[None]) == 1:
            return self.numbers[None][0]
        rows = {kind: "/".join(map(str, row)) for kind, row in self.numbers.items()}
        return ",".join(f"{kind}={row}" if kind else row for kind, row in rows.items())

    def at(self, site: Site) -> int:
        """The number of one site."""
        row = self.numbers[site.kind if site.kind in self.numbers else None]
        return row[site.layer % len(row)]

    def by_site(self, sites: Iterable[Site], name: str, where: str) -> dict[Site, int]:
        """The number of each site. Raises SettingError for a kind that is missing or unknown, and too few numbers."""
        sites = list(sites)
        kinds = [kind for kind in KINDS if any(site.kind == kind for site in sites)]
        if None not in self.numbers and set(self.numbers) != set(kinds):
            allowed = f"a whole number, or {','.join(f'{kind}=N' for kind in kinds)}"
            raise SettingError(f"{name} needs a number for {choices(kinds)}", where=where, got=self, allowed=allowed)
        layers = 1 + max(site.layer for site in sites)
        for row in self.numbers.values():
            if len(row) not in (1, layers):
                raise SettingError(
                    f"{name} has {len(row)} numbers for {layers} layers",
                    where=where,
                    got=self,
                    next="give one for each layer, or one for all",
                )
        return {site: self.at(site) for site in sites}


def spelled(config: Any) -> dict[str, Any]:
    """The settings of a method as flags and recipes spell them: what is hashed, and saved in kvfold.json."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return {name: value.spelled() if isinstance(value, PerSite) else value for name, value in values.items()}


def divisors(number: int) -> list[int]:
    """All positive divisors, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]
