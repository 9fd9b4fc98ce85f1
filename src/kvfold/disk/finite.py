"""Weights are finite numbers: refuses NaN, infinity, and numbers that a dtype cannot hold, while tensors stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from torch import Tensor


def check_finite(part: Tensor, dtype: str, name: str, where: object = None) -> None:
    """Refuse NaN and infinity, and numbers that overflow when they are cast to `dtype`; `name` is the tensor's.

    Raises CheckpointError or SettingError.
    """
    import torch

    if not part.numel() or not part.is_floating_point() or part.element_size() == 1:  # eight-bit floats have scales
        return
    target = getattr(torch, dtype)
    for bound in torch.aminmax(part):  # one pass without a copy; NaN propagates
        if not bound.isfinite():
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity",
                where=where,
                got=float(bound),
                allowed="finite numbers",
                next="the weights are damaged, or overflowed in training; use another copy",
            )
        if not bound.to(target).isfinite():
            raise SettingError(
                f"tensor {name} holds a number that {dtype} cannot represent",
                where=where,
                got=f"{float(bound):.6g}",
                allowed=f"-{torch.finfo(target).max:.6g} to {torch.finfo(target).max:.6g}",
                next="choose the dtype bfloat16 or float32" if dtype == "float16" else "choose the dtype float32",
            )
