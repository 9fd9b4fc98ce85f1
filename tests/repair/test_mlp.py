"""The least squares inside a gated MLP against the dense one, from the Jacobian that autograd finds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kvfold.disk import spool
from kvfold.errors import OutputError
from kvfold.repair.mlp import InnerFit, slope

ROWS, LENGTH, HIDDEN, WIDE = 6, 7, 5, 8
DAMPING = 1e-2
ACTIVATIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(approximate="tanh")}


class Case:
    """A gated MLP with random inputs, and what its output should have been."""

    def __init__(self, act: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        self.act = ACTIVATIONS[act]
        self.gate, self.up, self.down = nn.Linear(HIDDEN, WIDE), nn.Linear(HIDDEN, WIDE), nn.Linear(WIDE, HIDDEN)
        for linear in (self.gate, self.up, self.down):
            linear.requires_grad_(False)
            linear.weight.copy_(0.7 * drawn(*linear.weight.shape))
            linear.bias.copy_(0.3 * drawn(*linear.bias.shape))
        self.x_BTD = drawn(ROWS, LENGTH, HIDDEN) * torch.linspace(0.3, 2, HIDDEN)
        self.wanted_BTD = drawn(ROWS, LENGTH, HIDDEN)

    def output(self, weight_FD: Tensor, role: str) -> Tensor:
        """The MLP with another weight in one of its inner maps, float64."""
        weights = {part: getattr(self, part).weight.double() for part in ("gate", "up")} | {role: weight_FD}
        gate, up = (
            nn.functional.linear(self.x_BTD.double(), weights[part], getattr(self, part).bias.double())
            for part in ("gate", "up")
        )
        return nn.functional.linear(self.act(gate) * up, self.down.weight.double(), self.down.bias.double())

    def solve(self, role: str, *, steps: int, batch: int = ROWS, damping: float = DAMPING) -> Tensor:
        """The weight afterwards; the case keeps its own."""
        inner = copy.deepcopy(getattr(self, role))
        with torch.inference_mode(), InnerFit(inner, self.down, [LENGTH] * ROWS) as fit:
            for row in range(0, ROWS, batch):
                x_BTD = self.x_BTD[row : row + batch]
                gate, up = self.gate(x_BTD), self.up(x_BTD)
                missing_BTD = self.wanted_BTD[row : row + batch] - self.down(self.act(gate) * up)
                fit.add(row, x_BTD, slope(self.act, gate, up, role), missing_BTD)
            batches = [(row, min(batch, ROWS - row)) for row in range(0, ROWS, batch)]
            fit.solve(steps=steps, damping=damping, batches=batches)
        assert torch.equal(inner.bias, getattr(self, role).bias)
        return inner.weight.double()

    def error(self, weight_FD: Tensor, role: str) -> float:
        return float((self.output(weight_FD, role) - self.wanted_BTD.double()).square().sum(-1).mean())


def dense(made: Case, role: str) -> Tensor:
    """One Gauss-Newton step by lstsq, each row of the weight held back by what it is worth."""
    weight_FD = getattr(made, role).weight.double()
    jacobian = torch.autograd.functional.jacobian(lambda each: made.output(each, role), weight_FD)
    rows = jacobian.reshape(ROWS * LENGTH * HIDDEN, WIDE * HIDDEN)
    missing = (made.wanted_BTD.double() - made.output(weight_FD, role)).flatten()
    x_ND, tokens = made.x_BTD.double().flatten(0, 1), ROWS * LENGTH
    slopes_NF = slope(made.act, made.gate(made.x_BTD), made.up(made.x_BTD), role).double().flatten(0, 1)
    worth_F = slopes_NF.square().mean(0) * made.down.weight.double().square().sum(0)
    stiff_F = DAMPING * x_ND.square().mean() * worth_F
    pull = (tokens * stiff_F).sqrt().repeat_interleave(HIDDEN).diag()
    left, right = torch.cat([rows, pull]), torch.cat([missing, torch.zeros(WIDE * HIDDEN).double()])
    return weight_FD + torch.linalg.lstsq(left, right[:, None]).solution.view(WIDE, HIDDEN)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("role", ["up", "gate"])
def test_it_is_the_dense_least_squares(role: str, act: str) -> None:
    made = Case(act)
    before_FD, expected_FD = getattr(made, role).weight.double(), dense(made, role)
    found_FD = made.solve(role, steps=80)
    assert float((found_FD - expected_FD).norm() / (expected_FD - before_FD).norm()) < 1e-3
    assert float((expected_FD - before_FD).norm()) > 0.1


@pytest.mark.parametrize("role", ["up", "gate"])
def test_few_steps_go_most_of_the_way(role: str) -> None:
    made = Case("silu")
    before, few, many = (
        made.error(weight_FD, role)
        for weight_FD in (getattr(made, role).weight.double(), made.solve(role, steps=6), made.solve(role, steps=80))
    )
    assert few < before
    if role == "up":  # linear in the weight: no other is better, but for the pull
        assert few - many < 0.2 * (before - many)


def test_batches_do_not_matter() -> None:
    made = Case("silu")
    torch.testing.assert_close(made.solve("up", steps=6), made.solve("up", steps=6, batch=2), rtol=1e-4, atol=1e-5)


def test_a_row_that_never_counts_stays_as_it_is() -> None:
    made = Case("silu")
    made.gate.weight[3], made.gate.bias[3] = 0, -1e4
    found_FD = made.solve("up", steps=20)
    assert torch.equal(found_FD[3].float(), made.up.weight[3])
    assert bool(found_FD.isfinite().all())


def test_what_is_right_already_stays_as_it_is() -> None:
    made = Case("silu")
    made.wanted_BTD = made.output(made.up.weight.double(), "up").float()
    torch.testing.assert_close(made.solve("up", steps=6).float(), made.up.weight, rtol=1e-4, atol=1e-5)


def test_room_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * ROWS * LENGTH * (HIDDEN + WIDE + HIDDEN)  # inputs, slopes, what is missing
    monkeypatch.setattr(spool, "free_bytes", lambda path: needed)
    Case("silu").solve("up", steps=1)
    monkeypatch.setattr(spool, "free_bytes", lambda path: needed - 1)
    with pytest.raises(OutputError, match=f"got {needed:,} bytes"):
        Case("silu").solve("up", steps=1)
