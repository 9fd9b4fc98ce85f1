"""Attention by blocks against PyTorch's own and the textbook."""

from __future__ import annotations

import pytest
import torch

from kvfold.attention.blocked import LONGEST, blocked_attention, worthwhile
from kvfold.attention.grouped import grouped_attention, reference


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 257])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_the_textbook_with_gradients(tokens: int, groups: int, dtype: torch.dtype, near: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, pull = (
        torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (6, groups, groups, 6)
    )
    for scale in (None, 0.7):
        inputs = [each.clone().requires_grad_() for each in (q, k, v)]
        mine, right = blocked_attention(*inputs, scale=scale), reference(*inputs, causal=True, scale=scale)
        torch.testing.assert_close(mine, right, rtol=near, atol=near)
        for one, other in zip(
            torch.autograd.grad((mine * pull).sum(), inputs),
            torch.autograd.grad((right * pull).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=near, atol=10 * near)


def test_in_bf16_it_stays_near_and_is_what_grouped_attention_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 100, 16, generator=generator) for heads in (4, 2, 2))
    exact = reference(q, k, v, causal=True)
    half = [each.bfloat16() for each in (q, k, v)]
    mine = blocked_attention(*half)
    assert (mine.float() - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(grouped_attention(*half, causal=True), mine)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_attention(q, k, v, causal=True), mine)


def test_only_where_it_is_faster() -> None:
    q = torch.zeros(1, 2, 64, 8, dtype=torch.bfloat16)
    assert worthwhile(q, q)
    assert not worthwhile(q.float(), q.float())
    assert not worthwhile(q[:, :, :1], q), "one token is decoded elsewhere"
    assert not worthwhile(q, q.repeat(1, 1, 2, 1)), "a cache in front of it"
    long = torch.zeros(1, 1, LONGEST + 1, 8, dtype=torch.bfloat16)
    assert not worthwhile(long, long)
