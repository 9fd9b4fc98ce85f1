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
from kvfold.machine import summed
from kvfold.solve.linalg import conjugate_gradients, damped_inverse

FLOOR = 3e-2  # of the preconditioner's left factor: the rank of W^T W is at most the width of the model


class InnerFit(ExitStack):
    """Inputs of an MLP and the slopes of its inner maps, and the solution for these maps.

    A context manager. Raises OutputError if the disk has no room.
    """

    def __init__(self, inner: Sequence[Any], down: Any, lengths: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.weight_DF = inner, down.weight
        maps, (wide, hidden) = len(inner), inner[0].weight.shape
        widths = (hidden, maps * wide)
        check_room(sum(spool_bytes(sum(lengths), width) for width in widths))
        device = self.weight_DF.device
        self.inputs, self.slopes = (self.enter_context(Spool(lengths, width, device=device)) for width in widths)
        self.gram_DD, self.slopes_MFF, self.missing_MFD = (
            torch.zeros(size, dtype=torch.float64, device=device)
            for size in ((hidden, hidden), (maps, wide, wide), (maps, wide, hidden))
        )
        self.tokens = 0

    def add(self, row: int, x_BTD: Tensor, slopes_BTF: Sequence[Tensor], missing_BTD: Tensor) -> None:
        """Add the inputs of the MLP, the factor of each output of the inner maps, and what the MLP's output lacks."""
        self.inputs.write(row, x_BTD)
        self.slopes.write(row, torch.cat(list(slopes_BTF), dim=-1))
        x_ND, pulled_NF = x_BTD.flatten(0, 1), missing_BTD.flatten(0, 1) @ self.weight_DF
        self.gram_DD += x_ND.T @ x_ND
        for number, slope_NF in enumerate(each.flatten(0, 1) for each in slopes_BTF):
            self.slopes_MFF[number] += slope_NF.T @ slope_NF
            self.missing_MFD[number] += (slope_NF * pulled_NF).T @ x_ND
        self.tokens += len(x_ND)

    def solve(self, *, steps: int, damping: float, batches: Sequence[tuple[int, int]], tolerance: float = 0.0) -> None:
        """Add the change of at most `steps` conjugate gradients to the inner maps.

        `batches` are rows of one length that are read together, as (first row, number of rows).
        """
        self.tokens = sum(ranks.gather_in_order(self.tokens))
        for total in (self.gram_DD, self.slopes_MFF, self.missing_MFD):
            ranks.sum_to_main(total)
        wired_FF = self.weight_DF.T @ self.weight_DF

        def solve(sweep: Callable[[Tensor], Tensor]) -> Tensor:
            gram_DD = self.gram_DD / self.tokens
            left_MFF = self.slopes_MFF / self.tokens * wired_FF
            # float32 is enough for a preconditioner, and these are the widest products of a repair
            left_inverse_MFF = damped_inverse(left_MFF, FLOOR).float()
            inverse_DD = damped_inverse(gram_DD, damping).float()
            stiff_N1 = damping * gram_DD.diagonal().mean() * left_MFF.diagonal(dim1=1, dim2=2).reshape(-1, 1)

            def precondition(residual_ND: Tensor) -> Tensor:
                residual_MFD = residual_ND.float().view(self.missing_MFD.shape)
                found_MFD: Tensor = left_inverse_MFF @ residual_MFD @ inverse_DD
                return found_MFD.double().flatten(0, 1)

            return conjugate_gradients(  # of all maps together: N = M F
                lambda change_ND: sweep(change_ND) + stiff_N1 * change_ND,
                self.missing_MFD.flatten(0, 1) / self.tokens,
                precondition=precondition,
                steps=steps,
                tolerance=tolerance,
            )

        change_ND = ranks.solved(
            solve, lambda change_ND: self._sweep(batches, wired_FF, change_ND), self.missing_MFD.flatten(0, 1)
        )
        for linear, change_FD in zip(self.inner, change_ND.view(self.missing_MFD.shape), strict=True):
            linear.weight += change_FD.to(linear.weight)

    def _sweep(self, batches: Sequence[tuple[int, int]], wired_FF: Tensor, change_ND: Tensor) -> Tensor:
        """One pass over the text: the left side of the normal equations at a change, per token.

        Rank 0 has that of all rows.
        """
        change_DN, maps = change_ND.T.to(wired_FF), len(self.inner)

        def moved(batch: tuple[int, int]) -> Sequence[Tensor]:
            x_TD, slope_TN = (spool.read(*batch).to(wired_FF).flatten(0, 1) for spool in (self.inputs, self.slopes))
            moved_TF = (slope_TN * (x_TD @ change_DN)).view(len(x_TD), maps, -1).sum(1)
            pulled_TN = slope_TN * (moved_TF @ wired_FF).repeat(1, maps)
            return [(pulled_TN.T @ x_TD).double()]

        found = summed(moved, batches)
        return ranks.sum_to_main(found[0] if found else torch.zeros_like(change_ND)) / self.tokens


def slope(activation: Any, gate_BTF: Tensor, up_BTF: Tensor, role: str) -> Tensor:
    """The factor of a change of `up`, or of `gate`, on its way to `down`."""
    if role == "up":
        opened_BTF: Tensor = activation(gate_BTF)
        return opened_BTF
    with torch.inference_mode(False), torch.enable_grad():
        at_BTF = gate_BTF.clone().requires_grad_()
        derivative_BTF: Tensor = torch.autograd.grad(activation(at_BTF).sum(), at_BTF)[0]
    return derivative_BTF * up_BTF
