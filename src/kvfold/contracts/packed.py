"""Tensors that hold several roles, or are stored (in, out): how they are cut into roles, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.contracts.site import Attention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """One tensor with the rows of several roles: in each block of rows, those of its `roles` in order.

    Rows `[q | k | v]` are one block; `[H][q, k, v]` is a block for each head, and `[G][its queries.., k, v]` one for
    each key/value head. Other roles than `q`, `k` and `v` have as many rows as each other.
    """

    name: str
    roles: tuple[str, ...] = ("q", "k", "v")
    blocks: int | None = 1  # None: one for each key/value head
    in_out: bool = False  # stored (in, out), as a Conv1D stores its weight

    def part(self, stored: Tensor, role: str, attention: Attention) -> Tensor:
        """The rows of a role, or of its bias: of `q`, `(H E, ...)`, and of `k` and `v`, `(G E, ...)`."""
        rows = stored.T if self.in_out and stored.dim() == 2 else stored
        blocks, shares = self._cut(rows, attention), self._shares(attention)
        unit, place = blocks.shape[1] // sum(shares), self.roles.index(role.removesuffix("_bias"))
        first = sum(shares[:place])
        return blocks[:, unit * first : unit * (first + shares[place])].flatten(0, 1)

    def joined(self, roles: Mapping[str, Tensor], attention: Attention) -> Tensor:
        """The rows of these roles, or of their biases, together."""
        import torch  # plans read families without it

        parts = {role.removesuffix("_bias"): rows for role, rows in roles.items()}
        blocks = [self._cut(parts[role], attention) for role in self.roles]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def whole(self, roles: Mapping[str, Tensor], attention: Attention) -> Tensor:
        """The tensor of these roles, as it is stored: the inverse of `part`."""
        rows = self.joined(roles, attention)
        return rows.T.contiguous() if self.in_out and rows.dim() == 2 else rows

    def form(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor of roles of these shapes."""
        rows = (sum(shape[0] for shape in shapes.values()), *next(iter(shapes.values()))[1:])
        return rows[::-1] if self.in_out else rows

    def _cut(self, rows: Tensor, attention: Attention) -> Tensor:
        blocks = self.blocks or attention.num_key_value_heads
        return rows.reshape(blocks, len(rows) // blocks, *rows.shape[1:])

    def _shares(self, attention: Attention) -> list[int]:
        """The rows of each role in a block, relative to the others'."""
        heads = {"q": attention.query_group, "k": 1, "v": 1}
        return [heads.get(role, 1) for role in self.roles]
