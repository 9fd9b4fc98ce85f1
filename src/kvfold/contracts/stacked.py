"""Parameters that checkpoints store in other tensors than the model has, such as one for each expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stacked:
    """A parameter `(experts, rows, columns)` of a model, whose rows a checkpoint keeps in `parts` of each expert.

    A part is a name with `{expert}`. Without it, the part is the whole parameter under another name.
    """

    parts: tuple[str, ...]

    def below(self, prefix: str) -> Stacked:
        """The same with a prefix before each name."""
        return Stacked(tuple(prefix + part for part in self.parts))

    def names(self, experts: int) -> list[list[str]]:
        """The names of the tensors of each expert."""
        split = "{expert}" in self.parts[0]
        return [[part.format(expert=each) for part in self.parts] for each in range(experts if split else 1)]

    def forms(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that hold a parameter of this shape."""
        split = "{expert}" in self.parts[0]
        form = (shape[1] // len(self.parts), *shape[2:]) if split else shape
        return {name: form for names in self.names(shape[0]) for name in names}

    def whole(self, read: Callable[[str], Tensor], experts: int) -> Tensor:
        """The parameter, from the tensors that hold it."""
        import torch

        found = [torch.cat([read(name) for name in names]) for names in self.names(experts)]
        return torch.stack(found) if "{expert}" in self.parts[0] else found[0]

    def apart(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors that hold a parameter: the inverse of `whole`."""
        split = "{expert}" in self.parts[0]
        blocks = parameter if split else parameter[None]
        return {
            name: part.contiguous()
            for names, block in zip(self.names(len(blocks)), blocks, strict=True)
            for name, part in zip(names, block.chunk(len(names)), strict=True)
        }
