"""What more than one benchmark holds kvfold's kernels against."""

from __future__ import annotations

from torch import Tensor


def matmul(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
    """Multi-head attention as two matrix products with the softmax between them."""
    return ((q_BHTE * q_BHTE.shape[-1] ** -0.5) @ k_BHSE.mT).softmax(-1) @ v_BHSE
