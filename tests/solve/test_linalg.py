"""Closed forms' algebra against numpy's own solvers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.solve.linalg import conjugate_gradients, damped_inverse, psd_roots, ridge


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gram(*size: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Second moments of `rows` random rows: of full rank when there are enough of them."""
    rows_KN = drawn(*size[:-1], rows, size[-1], seed=seed, dtype=dtype)
    return rows_KN.mH @ rows_KN / rows


# --- roots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("size", [(5,), (2, 3, 4)])
def test_a_root_times_itself_is_the_matrix(size: tuple[int, ...], dtype: torch.dtype) -> None:
    gram_NN = gram(*size, rows=9, dtype=dtype)
    root_NN, inverse_NN = psd_roots(gram_NN)
    torch.testing.assert_close(root_NN @ root_NN, gram_NN, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root_NN, root_NN.mH, rtol=0, atol=1e-13)
    torch.testing.assert_close(inverse_NN, torch.linalg.inv(root_NN), rtol=1e-9, atol=1e-9)
    assert bool((torch.linalg.eigvalsh(root_NN) > 0).all())


def test_directions_that_are_not_there_have_a_bounded_inverse() -> None:
    gram_NN = gram(6, rows=2)  # rank 2
    root_NN, inverse_NN = psd_roots(gram_NN, damping=1e-8)
    largest = float(torch.linalg.eigvalsh(gram_NN)[-1])
    assert float(torch.linalg.eigvalsh(inverse_NN)[-1]) == pytest.approx((1e-8 * largest) ** -0.5, rel=1e-6)
    torch.testing.assert_close(root_NN @ root_NN, gram_NN, rtol=0, atol=2e-8 * largest)
    torch.testing.assert_close(root_NN @ inverse_NN, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nothing_at_all_has_roots_that_are_numbers() -> None:
    assert all(bool(each.isfinite().all()) for each in psd_roots(torch.zeros(2, 3, 3, dtype=torch.float64)))


# --- regression -----------------------------------------------------------------------------------------------------


def stacked(z_TN: Tensor, y_TM: Tensor, damping: float) -> np.ndarray:
    """The same regression by numpy, whose rows say the pull to 0 as well: sqrt(lam) W = 0."""
    lam = damping * float((z_TN**2).mean(0).mean())
    left = np.concatenate([z_TN.numpy(), np.sqrt(len(z_TN) * lam) * np.eye(z_TN.shape[1])])
    right = np.concatenate([y_TM.numpy(), np.zeros((z_TN.shape[1], y_TM.shape[1]))])
    return np.linalg.lstsq(left, right, rcond=None)[0]


@pytest.mark.parametrize("tokens", [40, 3])  # more than unknowns, and fewer
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_ridge_is_least_squares_with_the_pull_as_data(tokens: int, damping: float) -> None:
    z_TN, y_TM = drawn(tokens, 6), drawn(tokens, 4, seed=1)
    found_NM = ridge(z_TN.T @ z_TN / tokens, z_TN.T @ y_TM / tokens, damping)
    np.testing.assert_allclose(found_NM.numpy(), stacked(z_TN, y_TM, damping), rtol=1e-9, atol=1e-10)


def test_ridge_finds_nothing_where_nothing_was_seen() -> None:
    z_TN = drawn(40, 6)
    z_TN[:, 3:] = 0
    found_NM = ridge(z_TN.T @ z_TN / 40, z_TN.T @ drawn(40, 4, seed=1) / 40, 1e-3)
    assert not found_NM[3:].any()
    assert found_NM[:3].abs().max() > 0.1
    assert not ridge(torch.zeros(6, 6).double(), torch.zeros(6, 4).double(), 1e-3).any()


def test_the_damped_inverse_is_the_inverse_of_the_damped() -> None:
    for gram_NN in (gram(5, rows=9), gram(2, 3, 4, rows=2, dtype=torch.complex128)):
        size = gram_NN.shape[-1]
        mean = gram_NN.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
        damped_NN = gram_NN + 0.01 * mean * torch.eye(size, dtype=gram_NN.dtype)
        torch.testing.assert_close(
            damped_inverse(gram_NN, 0.01) @ damped_NN, torch.eye(size, dtype=gram_NN.dtype).expand_as(gram_NN)
        )


# --- conjugate gradients --------------------------------------------------------------------------------------------


def test_as_many_steps_as_unknowns_solve_every_system() -> None:
    """Three systems of a matrix from the left and one from the right, which is a symmetric positive map of 4 x 3."""
    left_KNN, right_KMM = gram(3, 4, rows=9), gram(3, 3, rows=9, seed=1)
    target_KNM = drawn(3, 4, 3, seed=2)
    found_KNM = conjugate_gradients(
        lambda x_KNM: left_KNN @ x_KNM @ right_KMM,
        target_KNM,
        drawn(3, 4, 3, seed=3),
        precondition=lambda r_KNM: r_KNM,
        steps=30,
    )
    for left_NN, right_MM, target_NM, found_NM in zip(left_KNN, right_KMM, target_KNM, found_KNM, strict=True):
        whole = np.kron(left_NN.numpy(), right_MM.numpy().T)
        expected = np.linalg.solve(whole, target_NM.numpy().reshape(-1)).reshape(4, 3)
        np.testing.assert_allclose(found_NM.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_an_exact_preconditioner_needs_one_step() -> None:
    gram_NN, target_NM = gram(6, rows=9), drawn(6, 1)
    found_NM = conjugate_gradients(
        lambda x: gram_NN @ x,
        target_NM,
        torch.zeros(6, 1).double(),
        precondition=lambda r: torch.linalg.inv(gram_NN) @ r,
        steps=1,
    )
    np.testing.assert_allclose(found_NM.numpy(), np.linalg.solve(gram_NN.numpy(), target_NM.numpy()), rtol=1e-10)


def test_each_step_gets_nearer_in_the_metric_of_the_system() -> None:
    gram_NN, target_NM = gram(12, rows=30), drawn(12, 1)
    exact_NM = torch.linalg.solve(gram_NN, target_NM)

    def error(steps: int) -> float:
        found_NM = conjugate_gradients(
            lambda x: gram_NN @ x, target_NM, torch.zeros(12, 1).double(), precondition=lambda r: r, steps=steps
        )
        return float((found_NM - exact_NM).T @ gram_NN @ (found_NM - exact_NM))

    errors = [error(steps) for steps in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[5] < 0.1 * errors[0]


def test_a_solved_system_stays_and_its_neighbour_is_solved() -> None:
    gram_KNN = gram(2, 5, rows=9)
    start_KNM = drawn(2, 5, 2)
    target_KNM = gram_KNN @ start_KNM
    target_KNM[1] = drawn(5, 2, seed=1)
    target_KNM[0] = gram_KNN[0] @ start_KNM[0]  # to the bit what `apply` gives
    found_KNM = conjugate_gradients(
        lambda x: torch.stack([gram_KNN[0] @ x[0], gram_KNN[1] @ x[1]]),
        target_KNM,
        start_KNM,
        precondition=lambda r: r,
        steps=20,
    )
    assert torch.equal(found_KNM[0], start_KNM[0])
    torch.testing.assert_close(found_KNM[1], torch.linalg.solve(gram_KNN[1], target_KNM[1]), rtol=1e-8, atol=1e-8)


def test_a_singular_system_moves_only_where_it_can() -> None:
    """Of rank 2, and so solved in two steps."""
    gram_NN = gram(6, rows=2)
    wanted_NM, start_NM = drawn(6, 1), drawn(6, 1, seed=1)
    found_NM = conjugate_gradients(
        lambda x: gram_NN @ x, gram_NN @ wanted_NM, start_NM, precondition=lambda r: r, steps=2
    )
    torch.testing.assert_close(gram_NN @ found_NM, gram_NN @ wanted_NM, rtol=1e-8, atol=1e-9)
    blind_NK = torch.linalg.eigh(gram_NN).eigenvectors[:, :4]  # what the system does not see
    torch.testing.assert_close(blind_NK.T @ found_NM, blind_NK.T @ start_NM, rtol=0, atol=1e-8)
    nothing_NM = conjugate_gradients(
        lambda x: 0 * x, torch.zeros(6, 1).double(), start_NM, precondition=lambda r: r, steps=5
    )
    assert torch.equal(nothing_NM, start_NM)


def test_conjugate_gradients_stop_when_a_step_gains_little() -> None:
    """Gains of steps in `b x - x A x / 2`, from the whole Krylov space of each step (by lstsq)."""
    generator = torch.Generator().manual_seed(0)
    values_N = torch.tensor([1.0, 1.1, 0.9, 30.0, 1e-3, 2e-3]).double()
    target_N1 = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    krylov = torch.cat([values_N[:, None] ** power * target_N1 for power in range(6)], dim=1)
    reached = [0.0]
    for steps in range(1, 7):
        basis = torch.linalg.qr(krylov[:, :steps]).Q
        inner = torch.linalg.solve(basis.T * values_N @ basis, basis.T @ target_N1)
        reached.append(float((target_N1.T @ basis @ inner).sum() / 2))
    gains = [after - before for before, after in pairwise(reached)]
    for tolerance in (0.0, 0.01, 0.3, 0.9):
        seen: list[Tensor] = []

        def apply(x_N1: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x_N1)
            return values_N[:, None] * x_N1

        conjugate_gradients(apply, target_N1, precondition=lambda r: r, steps=6, tolerance=tolerance)
        small = (step for step in range(6) if gains[step] <= tolerance * reached[step + 1])
        assert len(seen) == next(small, 5) + 1
