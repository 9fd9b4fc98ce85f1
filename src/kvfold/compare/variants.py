"""The rows of a comparison: how each is made from the teacher or from a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kvfold import hf
from kvfold.compare import weights
from kvfold.compare.settings import SINKS, CompareSettings
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import steps_since_root
from kvfold.errors import SettingError
from kvfold.formats import count
from kvfold.progress import Progress
from kvfold.train.depth import half_depth
from kvfold.train.settings import UptrainSettings
from kvfold.train.uptrain import uptrain

Stored = Literal["native", "fp8", "int4", "int2"]

CACHES: Mapping[Stored, str] = {
    "fp8": "one scale for a layer's keys, one for its values",
    "int4": "hqq, a scale for each 64 numbers",
    "int2": "hqq, a scale for each 64 numbers",
}
STACKED: tuple[Stored, ...] = ("fp8", "int4")  # caches of each student
MADE = ("depth", "depth-distilled", "window")  # folders of the checkpoints that rows need
TEACHER = "teacher"
TRAINING: Mapping[str, Any] = {"loss": "kl+0.3ce", "batch_size": 4}  # of the model of half the depth
LENGTH = 256  # tokens of its sequences, at most


@dataclass(frozen=True)
class Variant:
    """One row: a checkpoint, a change of its weights in memory, and the format of its cache."""

    name: str
    group: str
    about: str
    source: Callable[[], Checkpoint]
    change: Callable[[nn.Module], nn.Module] | None = None
    stored: Stored = "native"
    timed: bool = True  # False: the same kernels on the same shapes as the teacher

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its checkpoint, made if it does not exist yet. Raises KvfoldError where the model cannot be changed so."""
        return self.source()

    @property
    def training_tokens(self) -> int:
        """Tokens on which it was trained since its root teacher."""
        return sum(step["tokens"] or 0 for step in steps_since_root(self.checkpoint))

    def build(self, plain: Callable[[Checkpoint], nn.Module]) -> nn.Module:
        """The model with an attention that rounds as its cache does; `plain` is the checkpoint's model in memory.

        Raises SettingError without the library that makes it, or if transformers has no such cache for the model.
        """
        found: Any = plain(self.checkpoint)
        if self.stored != "native":
            if not self.checkpoint.family.interface:
                raise SettingError("its classes compute attention themselves", got=self.checkpoint.family.name)
            hf.new_cache(found, self.stored, 1)
        attention = hf.ATTENTION if self.stored == "native" else hf.DECODED[self.stored][0]
        if self.change is None:
            made: nn.Module = hf.twin(found, attention)
            return made
        return self.change(hf.twin(found, attention, weights=True))


def variants(
    teacher: Checkpoint, students: Mapping[str, Checkpoint], settings: CompareSettings, folder: Path, progress: Progress
) -> Iterator[Variant]:
    """The rows that the settings ask for; checkpoints that they need are made in `folder`."""

    def depth() -> Checkpoint:
        made = half_depth(teacher, folder / "depth", progress=progress)
        if settings.tokens is not None:
            length = min(LENGTH, teacher.shape.max_positions)
            own = {"data": settings.train_data, "tokens": settings.tokens, "seed": settings.seed}
            asked = UptrainSettings(**{**TRAINING, **own, "sequence_length": length})
            made = uptrain(made, folder / "depth-distilled", asked, teacher=teacher.path, progress=progress)
        return Checkpoint.open(made)

    def window() -> Checkpoint:
        asked = {"preset": "hybrid", "features": "none", "window": settings.kept, "sinks": SINKS}
        return Checkpoint.open(convert(teacher.path, folder / "window", "supra", asked, progress=progress))

    itself = partial(_same, teacher)
    trained = "not trained" if settings.tokens is None else f"distilled on {count(settings.tokens)} tokens"
    last = f"the last {settings.kept} tokens and the first {SINKS}"
    yield Variant(TEACHER, TEACHER, "", itself)
    for stored, about in CACHES.items():
        yield Variant(f"{stored} cache", "cache", about, itself, stored=stored)
    yield Variant("int8 weights", "weights", weights.about_int8(), itself, weights.int8)
    yield Variant("int4 weights", "weights", "torchao: each takes a byte in its CPU format", itself, weights.int4)
    yield Variant(
        "half of the weights",
        "pruning",
        "the smallest are zero: no speed, kernels multiply zeros too",
        itself,
        weights.pruned,
        timed=False,
    )
    yield Variant("half of the layers", "depth", f"means of neighbours, {trained}", depth)
    yield Variant("window", "window", last, window)
    for label, student in students.items():
        yield Variant(label, "student", _methods(student), partial(_same, student))
    for label, student in students.items():
        for stored in STACKED:
            about = f"{_methods(student)}, and {CACHES[stored]}"
            yield Variant(f"{label}, {stored} cache", "stack", about, partial(_same, student), stored=stored)


def _same(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def _methods(student: Checkpoint) -> str:
    """The methods that converted a student, in their order."""
    steps = (step["settings"] for step in steps_since_root(student) if step["stage"] == "convert")
    return ", then ".join(str(each["method"]) for each in steps)


def asked(settings: CompareSettings, every: Iterator[Variant]) -> list[Variant]:
    """The rows of the groups that are asked for, with the teacher and the students."""
    return [each for each in every if each.group in (*settings.rows, TEACHER, "student")]
