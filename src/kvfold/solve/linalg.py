"""Linear algebra of the closed forms: float64, damped, and batched over leading dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 1e-10  # of the largest eigenvalue: directions below it are noise of a float32 teacher
LEAST = 1e-100  # lower bound of a mean diagonal: an input of zeros is regressed to 0, not to NaN


def psd_roots(gram_NN: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive semidefinite matrix and the root's inverse, both `(..., N, N)`.

    Eigenvalues below `damping` of the largest are raised to it, so that the inverse stays bounded.
    """
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    floor = (values_N[..., -1:] * damping).clamp_min(torch.finfo(values_N.dtype).tiny)
    roots_N = values_N.clamp_min(floor).sqrt()
    scaled_NN, unscaled_NN = vectors_NN * roots_N[..., None, :], vectors_NN / roots_N[..., None, :]
    return scaled_NN @ vectors_NN.mH, unscaled_NN @ vectors_NN.mH


def floored(gram_NN: Tensor, damping: float = DAMPING) -> Tensor:
    """A positive semidefinite matrix, raised by `damping` of its largest eigenvalue if it is singular.

    Directions that no input has then count by their weights, and are not dropped.
    """
    values_N = torch.linalg.eigvalsh(gram_NN)
    if values_N[0] > damping * values_N[-1]:
        return gram_NN
    raised_NN: Tensor = gram_NN + damping * values_N[-1] * torch.eye(len(gram_NN)).to(gram_NN)
    return raised_NN


def damped_inverse(gram_NN: Tensor, damping: float) -> Tensor:
    """Inverse of a positive semidefinite matrix `(..., N, N)` to which `damping` of its mean diagonal is added."""
    factor_NN = torch.linalg.cholesky(_damped(gram_NN, damping))  # half the work of an inverse of any matrix
    inverse_NN: Tensor = torch.cholesky_inverse(factor_NN)
    return inverse_NN


def ridge(gram_NN: Tensor, cross_NM: Tensor, damping: float) -> Tensor:
    """The map `W_NM` from z to y that minimises `E|y - z W|^2 + lam |W|^2`.

    `gram_NN` is E[z z^T], `cross_NM` E[z y^T]; lam is `damping` times the mean diagonal of the gram.
    """
    found_NM: Tensor = torch.linalg.solve(_damped(gram_NN, damping), cross_NM)
    return found_NM


def _damped(gram_NN: Tensor, damping: float) -> Tensor:
    mean = gram_NN.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    identity_NN = torch.eye(gram_NN.shape[-1], dtype=gram_NN.dtype, device=gram_NN.device)
    return gram_NN + damping * mean.clamp_min(LEAST)[..., None, None] * identity_NN


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor | None = None,
    *,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
    tolerance: float = 0.0,
) -> Tensor:
    """Solve `apply(x) = target` for a symmetric positive map of matrices `(..., N, M)`, in at most `steps` steps.

    It stops after a step whose gain in `<target, x> - <x, apply(x)> / 2` is at most `tolerance` of all gains. It begins
    at `start`, or at 0. Leading dimensions are separate systems that share each call of `apply` (Hestenes and Stiefel
    1952, preconditioned). A system that is solved already stays as it is.
    """
    x = torch.zeros_like(target) if start is None else start
    residual = target if start is None else target - apply(start)  # `apply` may be a pass over a text
    direction = preconditioned = precondition(residual)
    size, gained = _dot(residual, preconditioned), 0.0
    for _ in range(steps):
        image = apply(direction)
        step = _ratio(size, _dot(direction, image))
        x, residual = x + step * direction, residual - step * image
        gain = float((step * size).sum()) / 2
        gained += gain
        if gain <= tolerance * gained:
            break
        preconditioned = precondition(residual)
        size, before = _dot(residual, preconditioned), size
        direction = preconditioned + _ratio(size, before) * direction
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A quotient, 0 where the divisor is not positive."""
    return torch.where(below > 0, above / below.where(below > 0, 1.0), 0.0)
