"""Losses against torch's own on whole logits, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvfold.train.losses import Head, attention_matching, same_inputs, token_losses


def _inputs(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    h_BTD, w_VD, b_V = draw(3, 7, 8), draw(50, 8), draw(50) if bias else None
    target_BT = torch.randint(50, (3, 7), generator=generator)
    return h_BTD, w_VD, b_V, target_BT, draw(3, 7, 5), draw(50, 5)


def _whole(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, t_h: Tensor, t_w: Tensor, **known: float) -> Tensor:
    """The textbook: logits in full, torch's own losses."""
    c = known["temperature"]
    z_NV, t_NV = functional.linear(h, w, b).flatten(0, 1), functional.linear(t_h, t_w).flatten(0, 1)
    ce = functional.cross_entropy(z_NV, target.flatten())
    kl = functional.kl_div(
        (z_NV / c).log_softmax(-1), (t_NV / c).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return known["ce"] * ce + known["kl"] * c * c * kl


@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
@pytest.mark.parametrize(("ce", "kl", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.3, 2.0, 2.5)])
@pytest.mark.parametrize("bias", [True, False])
def test_token_losses_equal_torch_on_whole_logits(
    chunk: int, ce: float, kl: float, temperature: float, bias: bool
) -> None:
    h, w, b, target, t_h, t_w = _inputs(torch.float64, bias)
    learned = [each.requires_grad_() for each in (h, w, b) if each is not None]
    weights = {name: weight for name, weight in (("ce", ce), ("kl", kl)) if weight}
    total, parts = token_losses(
        h, Head(w, b), target, weights, teacher=(t_h, Head(t_w)), temperature=temperature, chunk=chunk
    )
    whole = _whole(h, w, b, target, t_h, t_w, ce=ce, kl=kl, temperature=temperature)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(3 * total, learned), torch.autograd.grad(3 * whole, learned), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert set(parts) == set(weights)
    assert not any(part.requires_grad for part in parts.values())
    assert total.item() == pytest.approx(sum(weights[name] * parts[name].item() for name in parts))


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize(("ours", "theirs"), [(1.5, 2.0), (1.5, None), (None, 2.0)])
def test_capped_logits_are_those_of_the_losses(ours: float | None, theirs: float | None, chunk: int) -> None:
    """Each head with its own cap, student and teacher."""
    h, w, b, target, t_h, t_w = _inputs(torch.float64)
    learned = [each.requires_grad_() for each in (h, w, b) if each is not None]

    def capped(z: Tensor, cap: float | None) -> Tensor:
        return z if cap is None else cap * torch.tanh(z / cap)

    total, _ = token_losses(
        h, Head(w, b, ours), target, {"ce": 0.3, "kl": 2.0}, teacher=(t_h, Head(t_w, softcap=theirs)), chunk=chunk
    )
    z_NV = capped(functional.linear(h, w, b).flatten(0, 1), ours)
    t_NV = capped(functional.linear(t_h, t_w).flatten(0, 1), theirs)
    kl = functional.kl_div(z_NV.log_softmax(-1), t_NV.log_softmax(-1), log_target=True, reduction="batchmean")
    whole = 0.3 * functional.cross_entropy(z_NV, target.flatten()) + 2.0 * kl
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    for mine, right in zip(torch.autograd.grad(total, learned), torch.autograd.grad(whole, learned), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_under_autocast_it_is_as_near_as_bf16_allows() -> None:
    h, w, b, target, t_h, t_w = _inputs(torch.float32)
    h, w = h.requires_grad_(), w.requires_grad_()
    whole = _whole(h, w, b, target, t_h, t_w, ce=0.5, kl=1.0, temperature=1.0)
    exact = torch.autograd.grad(whole, (h, w))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = token_losses(h, Head(w, b), target, {"ce": 0.5, "kl": 1.0}, teacher=(t_h, Head(t_w)))
        usual = torch.autograd.grad(_whole(h, w, b, target, t_h, t_w, ce=0.5, kl=1.0, temperature=1.0), (h, w))
    torch.testing.assert_close(total, whole, rtol=2e-2, atol=2e-2)
    for mine, right, torchs in zip(torch.autograd.grad(total, (h, w)), exact, usual, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() < 2 * (torchs - right).norm() + 1e-3 * right.norm()


def test_a_teacher_of_equal_logits_is_no_distance_and_pulls_nowhere() -> None:
    h, w, b, target, *_ = _inputs(torch.float64)
    h.requires_grad_()
    total, _ = token_losses(h, Head(w, b), target, {"kl": 1.0}, teacher=(h.detach(), Head(w, b)))
    (slope,) = torch.autograd.grad(total, h)
    assert abs(total.item()) < 1e-12
    assert slope.abs().max() < 1e-12


def test_frozen_parts_get_no_gradient_and_kl_needs_a_teacher() -> None:
    h, w, b, target, *_ = _inputs(torch.float32)
    h.requires_grad_()
    total, _ = token_losses(h, Head(w, b), target, {"ce": 1.0})
    total.backward()
    assert h.grad is not None
    assert w.grad is None
    with pytest.raises(ValueError, match="teacher"):
        token_losses(h, Head(w, b), target, {"kl": 1.0})


def test_attention_matching_is_the_normalised_mse_of_each_layer() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = {name: scale * torch.randn(2, 3, 4, generator=generator) for name, scale in (("a", 1.0), ("b", 100.0))}
    student = {name: value + 0.1 * value.square().mean().sqrt() for name, value in teacher.items()}
    assert attention_matching(student, teacher).item() == pytest.approx(0.01, rel=1e-4)
    assert attention_matching(teacher, teacher).item() == 0
    nothing = {name: torch.zeros_like(value) for name, value in teacher.items()}
    assert attention_matching(nothing, teacher).item() == pytest.approx(1)


class _Layer(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.factor * hidden_states


class _Tower(nn.Module):
    def __init__(self, factor: float, by_name: bool) -> None:
        super().__init__()
        self.first, self.second, self.by_name = _Layer(factor), _Layer(factor), by_name

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(hidden_states=x) if self.by_name else layer(x)
        return x


@pytest.mark.parametrize("by_name", [True, False])
def test_same_inputs_feeds_the_student_what_the_teacher_read(by_name: bool) -> None:
    teacher, student = _Tower(2.0, by_name), _Tower(3.0, by_name)
    x = torch.ones(1)
    with same_inputs(student, teacher, ["second"]):
        assert teacher(x).item() == 4
        assert student(x).item() == 3 * 2  # its second layer read the teacher's 2, not its own 3
    assert student(x).item() == 9
