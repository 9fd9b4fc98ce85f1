"""A checkpoint read as the same function under other names, or in another architecture, which a student needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from kvfold.contracts.family import Expressed
from kvfold.contracts.family import Rehoused as Made
from kvfold.disk.checkpoint import Checkpoint, TensorSpec
from kvfold.disk.shards import Stored
from kvfold.families import source_family
from kvfold.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor


class View(Checkpoint):
    """A view of a checkpoint with another config.json; tensors are made of the checkpoint's when they are read.

    Its identity and its lineage are the source's, which `origin` is.
    """

    def __init__(self, origin: Checkpoint, made: Made) -> None:
        self._origin, self.path, self.name, self.lineage = origin, origin.path, origin.name, origin.lineage
        self.config: dict[str, Any] = dict(made.config)
        self.family = source_family(self.config, where=origin.path)
        self.shape = replace(self.family.shape(self.config), root_elements=origin.shape.root_elements)
        self.digests, self._flaws, self.buffers, self.spelled = {}, {}, origin.buffers, {}
        self._stored = {name: self._view(each) for name, each in made.tensors.items()}

    @property
    def origin(self) -> Checkpoint:
        """The checkpoint that is stored."""
        return self._origin

    def _view(self, each: Expressed) -> Stored:
        sources = [self.origin.stored_name(name) for name in each.sources]
        first = self.origin._entry(sources[0])

        def read() -> Tensor:
            tensors = [self.origin.read(name) for name in sources]
            made: Tensor = tensors[0] if each.make is None else each.make(*tensors)
            return made.to(tensors[0].dtype)  # rounded once: what calibration reads is what is written

        return Stored(TensorSpec(each.shape, first.spec.dtype), first.file, read)

    def hash(self, progress: Progress = SILENT) -> str:
        """The content hash of the source."""
        return self.origin.hash(progress)

    def require_finite(self, progress: Progress = SILENT) -> None:
        """Refuse weights of the source that are NaN or infinite, with CheckpointError."""
        self.origin.require_finite(progress)


class Rehoused(View):
    """A view in another stock architecture, which has the fields that a student needs.

    Raises UnsupportedModel where the source's function has no form in that architecture.
    """

    def __init__(self, origin: Checkpoint) -> None:
        assert origin.family.rehouse is not None
        super().__init__(origin, origin.family.rehouse(origin.config))

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return Rehoused, (self._origin,)
