"""The grouped kernel against the textbook, forward and backward, over shapes, masks and both ways of decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.attention import grouped
from kvfold.attention.grouped import grouped_attention, reference

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2}
Inputs = tuple[Tensor, Tensor, Tensor]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """q, k and v of `shape` = (B, H, G, T, S, E); the values of v are as wide as the keys."""
    batch, heads, groups, tokens, keys, width = shape
    draw = torch.Generator().manual_seed(seed)
    sizes = ((heads, tokens), (groups, keys), (groups, keys))
    q, k, v = (torch.randn(batch, *size, width, generator=draw, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, v


def _error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def _agree(inputs: Inputs, **options: Any) -> None:
    """Outputs and all three gradients are those of the textbook, to the tolerance of the dtype."""
    mine = tuple(each.clone().requires_grad_() for each in inputs)
    book = tuple(each.double().requires_grad_() for each in inputs)
    ours, theirs = grouped_attention(*mine, **options), reference(*book, **options)
    assert ours.shape == theirs.shape
    assert ours.dtype == inputs[0].dtype
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours.double() * weights).sum().backward()
    (theirs * weights).sum().backward()
    bound = TOLERANCE[inputs[0].dtype]
    assert _error(ours, theirs) < bound
    for name, got, wanted in zip("qkv", mine, book, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        # one key alone has the weight 1: the gradients of q and k are nothing, in truth and here
        assert _error(got.grad, wanted.grad) < bound or wanted.grad.norm() < 1e-12 > got.grad.norm() - 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_forward_and_gradients_are_the_textbooks(tokens: int, groups: int, dtype: torch.dtype) -> None:
    _agree(_inputs((2, 8, groups, tokens, tokens, 16), dtype), causal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("matmul", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_decoding_one_token_both_ways(
    monkeypatch: pytest.MonkeyPatch, masked: bool, matmul: bool, groups: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(grouped, "_matmul_is_faster", lambda q, k: matmul)
    mask = torch.arange(63)[None, None, None] >= torch.tensor([0, 40])[:, None, None, None] if masked else None
    _agree(_inputs((2, 8, groups, 1, 63, 16), dtype), mask=mask)


def test_the_faster_way_is_chosen_by_rows_and_size() -> None:
    def chosen(dtype: torch.dtype, rows: int, keys: int) -> bool:
        q, k = torch.empty(4, 8, rows, 64, dtype=dtype), torch.empty(4, 8, keys, 64, dtype=dtype)
        return grouped._matmul_is_faster(q, k)

    assert chosen(torch.float32, 1, 4096)
    assert not chosen(torch.float32, 1, 64)  # few keys: one call instead of four
    assert not chosen(torch.float32, 4, 4096)  # a group's rows of float32: the fused kernel, at any size
    assert not chosen(torch.float32, 32, 64)
    assert chosen(torch.bfloat16, 1, 16)  # one row of bfloat16: never the fused kernel
    assert chosen(torch.bfloat16, 32, 4096)


@given(
    st.integers(1, 3),
    st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3), (1, 1)]),
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from([1, 4, 6]),
    st.booleans(),
    st.sampled_from(["none", "bool", "float"]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_and_mask(
    batch: int,
    heads: tuple[int, int],
    tokens: int,
    cached: int,
    width: int,
    causal: bool,
    kind: str,
    seed: int,
) -> None:
    keys = tokens + cached
    inputs = _inputs((batch, *heads, tokens, keys, width), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    mask = None
    if kind != "none":
        per_head = bool(seed % 2)
        mask = torch.rand(batch, heads[0] if per_head else 1, tokens, keys, generator=draw) > 0.3
        mask |= torch.eye(tokens, keys, dtype=torch.bool).roll(cached, dims=-1)  # every query sees itself
    if kind == "float" and mask is not None:
        bias = torch.randn(mask.shape, generator=draw, dtype=torch.float64)
        mask = bias.masked_fill(~mask, -math.inf)
    ours = grouped_attention(*inputs, mask=mask, causal=causal, scale=0.3)
    torch.testing.assert_close(ours, reference(*inputs, mask=mask, causal=causal, scale=0.3))


@pytest.mark.parametrize("matmul", [True, False])
def test_a_query_that_may_look_at_nothing_gets_nothing(monkeypatch: pytest.MonkeyPatch, matmul: bool) -> None:
    monkeypatch.setattr(grouped, "_matmul_is_faster", lambda q, k: matmul)
    for tokens in (1, 3):
        inputs = [each.requires_grad_() for each in _inputs((2, 4, 2, tokens, 5, 8))]
        mask = torch.ones(2, 1, tokens, 5, dtype=torch.bool)
        mask[1] = False
        output = grouped_attention(*inputs, mask=mask)
        output.sum().backward()
        assert not output[1].any()
        assert output[0].all()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in inputs)


class _Memory(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returns anew."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in made if isinstance(made, tuple) else (made,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_heads_are_not_expanded_when_one_token_is_decoded(masked: bool, dtype: torch.dtype) -> None:
    q, k, v = _inputs((2, 8, 2, 1, 2048, 64), dtype)
    mask = torch.ones(2, 1, 1, 2048, dtype=torch.bool) if masked else None
    with _Memory() as memory:
        grouped_attention(q, k, v, mask=mask)
    assert memory.largest <= 2 * 8 * 2048 * 4  # at most the logits: not even one copy of the keys
    with _Memory() as memory:
        k.repeat_interleave(4, dim=1)
    assert memory.largest >= 4 * k.nbytes  # what it would have been


def test_dropout_reaches_the_kernel() -> None:
    q, k, v = _inputs((1, 4, 2, 1, 64, 8))
    torch.manual_seed(0)
    assert not torch.equal(grouped_attention(q, k, v, dropout=0.5), grouped_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 9), (7, 7), (5, 12)])
@pytest.mark.parametrize("seen", ["causal", "bool", "float", "all"])
def test_capped_logits_are_the_textbooks(tokens: int, keys: int, groups: int, seen: str, dtype: torch.dtype) -> None:
    """With a cap so low that it moves what comes out."""
    inputs, options = _inputs((2, 8, groups, tokens, keys, 16), dtype), {"softcap": 0.7, "scale": 0.5}
    mask = torch.rand(2, 1, tokens, keys, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., -1] = True
    chosen: dict[str, Any] = {"causal": {"causal": True}, "bool": {"mask": mask}, "float": {"mask": 3 * mask.to(dtype)}}
    options |= chosen.get(seen, {})
    _agree(inputs, **options)
    if keys > 1:
        capped, plain = (grouped_attention(*inputs, **{**options, "softcap": cap}) for cap in (0.7, None))
        assert _error(capped, plain) > 0.01


def test_a_capped_query_that_sees_nothing_gets_nothing() -> None:
    q, k, v = _inputs((1, 4, 2, 3, 3, 8))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = False
    made = grouped_attention(q, k, v, mask=mask, softcap=2.0)
    assert not made[:, :, 1].any()
    torch.testing.assert_close(made[:, :, ::2], reference(q, k, v, softcap=2.0)[:, :, ::2])


@pytest.mark.slow
def test_decoding_can_be_compiled_whole() -> None:
    q, k, v = _inputs((1, 4, 2, 1, 64, 8))
    compiled = torch.compile(grouped_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), grouped_attention(q, k, v))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
def test_sinks_are_the_textbooks(kind: str, tokens: int, softcap: float | None) -> None:
    inputs, sinks_H = _inputs((2, 8, 2, tokens, 9, 16)), torch.linspace(-3, 3, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, tokens, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True
    options: dict[str, Any] = {"causal": True} if kind == "causal" else {"mask": mask}
    if kind == "float":
        options["mask"] = torch.where(mask, 0.5, -math.inf).double()
    _agree(inputs, **options, softcap=softcap, sinks_H=sinks_H)


def test_a_sink_takes_what_a_row_that_sees_nothing_has() -> None:
    q, k, v = _inputs((1, 4, 2, 3, 5, 8))
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[:, :, 1] = False
    made = grouped_attention(q, k, v, mask=mask, sinks_H=torch.zeros(4, dtype=torch.float64))
    assert bool((made[:, :, 1] == 0).all())
    assert bool(made.isfinite().all())


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "sinks_H": torch.linspace(-1, 1, 8)}])
@pytest.mark.parametrize("value_heads", [(0, 1, 2, 3, 0, 1, 2, 3), (1, 1, 0, 0, 0, 1, 0, 1)])
def test_values_may_be_grouped_apart_from_keys(
    tokens: int, masked: bool, more: dict[str, Any], value_heads: tuple[int, ...]
) -> None:
    q, k, _ = _inputs((2, 8, 2, tokens, 11, 16))
    v = _inputs((2, 8, 1 + max(value_heads), tokens, 11, 16), seed=1)[2]
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[0, ..., :3] = False
    _agree((q, k, v), mask=mask if masked else None, causal=True, value_heads=value_heads, **more)
