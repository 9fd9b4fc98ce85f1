"""Classes of ours that are stock classes of transformers with something in front, made by name."""

from __future__ import annotations

import sys
from typing import Any


def derive(module: str, about: str, stock: type, name: str, *before: type, **fields: Any) -> type:
    """A subclass of a stock class with `before` in front of it, to be found (and pickled) by its name in a module."""
    said = {"__module__": module, "__doc__": f"{stock.__name__}, {about}."}
    made = type(name, (*before, stock), {**said, **fields})
    setattr(sys.modules[module], name, made)
    return made
