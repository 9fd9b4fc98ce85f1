"""Hooks on modules that are removed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """A context at whose end these hooks are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
