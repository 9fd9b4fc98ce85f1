"""Tensors that hold the heads of several roles: how they are cut into roles, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvfold.contracts.site import Attention

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["rows", "groups"]
"""Rows `[q | k | v]`, or for each key/value head `[its queries, k, v]`: `[H][q, k, v]` where no heads are shared."""


@dataclass(frozen=True)
class Packed:
    """One tensor with the roles `q`, `k` and `v`, or with their biases."""

    name: str
    layout: Layout
    in_out: bool = False  # stored (in, out), as a Conv1D stores its weight

    def part(self, stored: Tensor, role: str, attention: Attention) -> Tensor:
        """The rows of a role: of `q`, `(H E, ...)`, or of another, `(G E, ...)`."""
        rows = stored.T if self.in_out and stored.dim() == 2 else stored
        kind, groups, width = "qkv".index(role[0]), attention.num_key_value_heads, attention.head_dim
        heads = (attention.num_attention_heads, groups, groups)
        if self.layout == "rows":
            first = sum(heads[:kind]) * width
            return rows[first : first + heads[kind] * width]
        blocks = rows.reshape(groups, attention.query_group + 2, width, *rows.shape[1:])
        first = (0, attention.query_group, attention.query_group + 1)[kind]
        return blocks[:, first : first + heads[kind] // groups].flatten(0, 2)

    def whole(self, roles: Mapping[str, Tensor], attention: Attention) -> Tensor:
        """The tensor of these roles, in the order q, k, v: the inverse of `part`."""
        import torch  # plans read families without it

        parts, groups = list(roles.values()), attention.num_key_value_heads
        if self.layout == "rows":
            rows = torch.cat(parts)
        else:
            rows = torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)
        return rows.T.contiguous() if self.in_out and rows.dim() == 2 else rows

    def form(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor of roles of these shapes."""
        rows = (sum(shape[0] for shape in shapes.values()), *next(iter(shapes.values()))[1:])
        return rows[::-1] if self.in_out else rows
