"""The base class of engines. An engine is one subclass, and one entry in `ENGINES` of `kvfold.export.exporting`."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export.agreement import Logits, Reference
from kvfold.predict.engines import refusal


class Engine(ABC):
    """An engine that checkpoints are exported to."""

    name: str
    package = ""  # of Python, that writes the format
    extra = ""  # of kvfold, that installs the package
    file = ""  # that holds the weights
    attention = "sdpa"  # with which transformers answers the comparison
    knows_windows = False  # else an export is exact for contexts up to the smallest window
    keeps_dtype = False  # the weights are copied as they are

    def available(self) -> None:
        """Raise SettingError when the package is not installed."""
        if self.package:
            try:
                importlib.import_module(self.package)
            except ImportError as error:
                install = f"pip install 'kvfold[{self.extra}]'"
                raise SettingError(f"{self.package} is not installed", next=install) from error

    def loadable(self) -> bool:
        """Whether the engine itself is installed, to load what was written."""
        return True

    @abstractmethod
    def version(self) -> str:
        """The version of the engine or of the package."""

    def check(self, source: Checkpoint) -> None:
        """Raise UnsupportedModel when the engine has no place for the model: the plan uses the same rules."""
        found = refusal(self.name, source.config, source.shape)
        if found is not None:
            raise found.error(self.name, source.path)

    @abstractmethod
    def write(self, source: Checkpoint, model: Any, folder: Path, weights: str) -> dict[str, Any]:
        """Write the engine's files, with weights of one dtype, and return what the lineage keeps.

        `model` is the loaded source, or None where the engine is not loadable; it may be taken apart.
        """

    def inspect(self, source: Checkpoint, folder: Path, weights: str) -> dict[str, Any]:
        """Check the files without a comparison of logits. Raises CheckpointError."""
        return {}

    def answer(self, folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
        """Load the export and answer as transformers did: the logits of each text, and greedy tokens.

        Raises UnsupportedModel when the engine refuses to load or to run it.
        """
        with self.refusals(folder):
            return self._answer(folder, known, weights)

    @abstractmethod
    def _answer(self, folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]: ...

    @contextmanager
    def refusals(self, folder: Path) -> Iterator[None]:
        """Turn the engine's own errors into UnsupportedModel."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).replace(f"{folder}/", "").split())[:200]
            raise UnsupportedModel(
                f"{self.name} cannot run the model: {reason}", next="nothing was exported"
            ) from error

    def precision(self, source: Checkpoint, weights: str) -> str:
        """The dtype in which the engine computes with these weights, which sets the tolerance."""
        return weights

    def advice(self, weights: str) -> str:
        """The end of the error when the engine disagrees with transformers."""
        return "nothing was exported"

    def content(self, source: Checkpoint, folder: Path) -> str:
        """The content hash of the export: SHA-256 of its weights."""
        with (folder / self.file).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def notes(self, found: dict[str, Any]) -> list[str]:
        """Lines for the user, by what the lineage keeps."""
        return []
