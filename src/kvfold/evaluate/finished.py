"""The finished measurements of an evaluation, kept beside its record until that is written.

An evaluation that was stopped measures only what is missing: the tasks of a large model take hours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import ranks
from kvfold.disk import record
from kvfold.disk.output import read_object, write_json
from kvfold.faults import disk_errors
from kvfold.formats import json_text

INPUTS = "kvfold_measures"


@dataclass(frozen=True)
class Finished:
    """Measurements by name, in a file that only an evaluation of the same inputs reads."""

    path: Path
    inputs: str  # a fingerprint of all that the measurements depend on
    found: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # that each of them took

    @classmethod
    def beside(cls, path: Path, inputs: str, *, overwrite: bool = False) -> Finished:
        """What an evaluation with the record `path` has measured before it was stopped; nothing with `overwrite`.

        Raises OutputError if another file has the name.
        """
        own = path.with_suffix(".partial")
        record.check_replaceable(own, INPUTS, "unfinished evaluation")
        read = read_object(own)
        same = read.get(INPUTS) == inputs and not overwrite
        return cls(own, inputs, read["found"], read["seconds"]) if same else cls(own, inputs)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or returned before. All ranks call this, and rank 0 writes."""
        if name in self.found:
            return self.found[name]
        began = time.monotonic()
        found = measure()
        if json.loads(json_text(found)) == found:  # a number that is not finite is measured again
            self.found[name], self.seconds[name] = found, time.monotonic() - began
            if ranks.current().main:
                with disk_errors(self.path):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(self.path, {INPUTS: self.inputs, "found": self.found, "seconds": self.seconds})
        return found

    def sums(self, name: str, score: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same for sums in float64, as of `loss.score`."""
        rows = self.once(name, lambda: {key: sums_B.tolist() for key, sums_B in score().items()})
        return {key: torch.tensor(sums, dtype=torch.float64) for key, sums in rows.items()}

    def remove(self) -> None:
        """Delete the file: the record has it all."""
        self.path.unlink(missing_ok=True)
