"""The least squares of an inner map of a gated MLP, `down(act(gate x) * up x)`, against what its output lacks.

One of the two inner maps is refitted while the other stays. A change V of it moves the output by `W (s * (V x))`, where
W is down and s is the factor of each row on its way to down,

    of up     s = act(gate x)             exactly
    of gate   s = act'(gate x) * up x     to first order: one Gauss-Newton step

and `min_V E |W (s * (V x)) - missing|^2` has the normal equations `E[(s * W^T W (s * (V x))) x^T] = E[(s * W^T missing)
x^T]`. Conjugate gradients apply them in sweeps over the text. If s were independent of x, their left side would be
`(E[s s^T] * W^T W) V E[x x^T]`: that is the preconditioner, with which a few steps are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvfold import ranks
from kvfold.disk.spool import Spool, check_room, spool_bytes
from kvfold.solve.linalg import conjugate_gradients, damped_inverse

FLOOR = 3e-2  # of the preconditioner's left factor: the rank of W^T W is at most the width of the model


class InnerFit(ExitStack):
    """Inputs of an MLP and what its output lacks, on disk, and the solution for one of its inner maps.

    A context manager. Raises OutputError if the disk has no room.
    """

    def __init__(self, inner: Any, down: Any, lengths: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.weight_DF = inner, down.weight
        wide, hidden = inner.weight.shape
        widths = (hidden, wide, len(self.weight_DF))
        check_room(sum(spool_bytes(sum(lengths), width) for width in widths))
        self.inputs, self.slopes, self.missing = (
            self.enter_context(Spool(lengths, width, device=inner.weight.device)) for width in widths
        )
        self.gram_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.slopes_FF = torch.zeros(wide, wide, dtype=torch.float64)
        self.tokens = 0

    def add(self, row: int, x_BTD: Tensor, slope_BTF: Tensor, missing_BTD: Tensor) -> None:
        """Add the inputs of the MLP, the factor of each output of the inner map, and what the MLP's output lacks."""
        for spool, rows in ((self.inputs, x_BTD), (self.slopes, slope_BTF), (self.missing, missing_BTD)):
            spool.write(row, rows)
        x_ND, slope_NF = x_BTD.flatten(0, 1), slope_BTF.flatten(0, 1)
        self.gram_DD += (x_ND.T @ x_ND).cpu()
        self.slopes_FF += (slope_NF.T @ slope_NF).cpu()
        self.tokens += len(x_ND)

    def solve(self, *, steps: int, damping: float, batches: Sequence[tuple[int, int]], tolerance: float = 0.0) -> None:
        """Add the change of at most `steps` conjugate gradients to the inner map.

        `batches` are rows of one length that are read together, as (first row, number of rows).
        """
        self.tokens = sum(ranks.gather_in_order(self.tokens))
        for total in (self.gram_DD, self.slopes_FF):
            ranks.sum_to_main(total)
        missing_FD = self._sweep(batches, None)

        def solve(sweep: Callable[[Tensor], Tensor]) -> Tensor:
            gram_DD = self.gram_DD / self.tokens
            left_FF = self.slopes_FF / self.tokens * (self.weight_DF.T @ self.weight_DF).cpu()
            # float32 is enough for a preconditioner, and these are the widest products of a repair
            left_inverse_FF = damped_inverse(left_FF, FLOOR).float()
            inverse_DD = damped_inverse(gram_DD, damping).float()
            stiff_F1 = damping * gram_DD.diagonal().mean() * left_FF.diagonal()[:, None]
            return conjugate_gradients(
                lambda change_FD: sweep(change_FD) + stiff_F1 * change_FD,
                missing_FD,
                precondition=lambda r_FD: (left_inverse_FF @ r_FD.float() @ inverse_DD).double(),
                steps=steps,
                tolerance=tolerance,
            )

        change_FD = ranks.solved(solve, lambda change_FD: self._sweep(batches, change_FD))
        self.inner.weight += change_FD.to(self.inner.weight)

    def _sweep(self, batches: Sequence[tuple[int, int]], change_FD: Tensor | None) -> Tensor:
        """One pass over the text: the left side of the normal equations at a change, or their right side, per token.

        Rank 0 has that of all rows.
        """
        weight_DF = self.weight_DF
        total_FD = torch.zeros(self.inner.weight.shape, dtype=torch.float64)
        change = None if change_FD is None else change_FD.to(weight_DF)
        for row, count in batches:
            x_ND, slope_NF = (
                spool.read(row, count).to(weight_DF).flatten(0, 1) for spool in (self.inputs, self.slopes)
            )
            if change is None:
                output_ND = self.missing.read(row, count).to(weight_DF).flatten(0, 1)
            else:
                output_ND = (slope_NF * (x_ND @ change.T)) @ weight_DF.T
            total_FD += (slope_NF.mul_(output_ND @ weight_DF).T @ x_ND).cpu()
        return ranks.sum_to_main(total_FD) / self.tokens


def slope(activation: Any, gate_BTF: Tensor, up_BTF: Tensor, role: str) -> Tensor:
    """The factor of a change of `up`, or of `gate`, on its way to `down`."""
    if role == "up":
        opened_BTF: Tensor = activation(gate_BTF)
        return opened_BTF
    with torch.inference_mode(False), torch.enable_grad():
        at_BTF = gate_BTF.clone().requires_grad_()
        derivative_BTF: Tensor = torch.autograd.grad(activation(at_BTF).sum(), at_BTF)[0]
    return derivative_BTF * up_BTF
