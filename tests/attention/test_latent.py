"""Latent attention against the textbook, against keys and values written out, and against transformers' rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvfold.attention import grouped
from kvfold.attention.latent import absorbed_attention, absorbs, reference, turn, written_out

SHAPES = {  # batch, heads, groups, head width, rotated, latent
    "multi-head": (2, 4, 4, 8, 4, 6),
    "grouped": (2, 6, 2, 8, 2, 5),
    "multi-query": (1, 4, 1, 8, 6, 3),
    "all rotated": (2, 4, 2, 8, 8, 7),
    "none rotated": (2, 4, 2, 8, 0, 9),
}


def drawn(shape: str, tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    batch, heads, groups, width, rotated, latent = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (batch, heads, tokens, width),
        (batch, keys, groups * rotated),
        (batch, keys, latent),
        (groups, width - rotated, latent),
        (groups, width, latent),
        (groups, width),
    ]
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 63), (7, 7), (5, 12)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_absorbed_is_the_textbook(shape: str, tokens: int, keys: int, dtype: torch.dtype, within: float) -> None:
    given = drawn(shape, tokens, keys, dtype)
    expected = reference(*drawn(shape, tokens, keys), scale=0.3)
    torch.testing.assert_close(absorbed_attention(*given, scale=0.3).double(), expected, rtol=within, atol=within)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_the_textbooks(shape: str, kind: str) -> None:
    given = drawn(shape, 3, 9)
    visible = torch.rand(len(given[0]), 1, 3, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[..., 0] = True
    mask = visible if kind == "bool" else torch.where(visible, 0.0, -torch.inf).double()
    torch.testing.assert_close(absorbed_attention(*given, mask=mask), reference(*given, mask=mask))


@pytest.mark.parametrize("shape", SHAPES)
def test_capped_logits_are_the_textbooks(shape: str) -> None:
    given = drawn(shape, 3, 9)
    capped = absorbed_attention(*given, softcap=0.8)
    torch.testing.assert_close(capped, reference(*given, softcap=0.8))
    assert (capped - absorbed_attention(*given)).norm() > 0.01 * capped.norm()
    bias = torch.randn(given[3].shape[:2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    biased = absorbed_attention(*given, softcap=0.8, k_bias_GN=bias)
    torch.testing.assert_close(biased, reference(*given, softcap=0.8, k_bias_GN=bias))
    if bias.numel():  # all tokens alike, and felt
        assert (biased - capped).norm() > 0.01 * capped.norm()
        torch.testing.assert_close(absorbed_attention(*given, k_bias_GN=bias), absorbed_attention(*given))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_not_causal_sees_every_key(shape: str) -> None:
    given, everything = drawn(shape, 3, 9), torch.ones(3, 9, dtype=torch.bool)
    torch.testing.assert_close(absorbed_attention(*given, causal=False), reference(*given, mask=everything))


def test_a_query_that_may_look_at_nothing_gets_the_bias_and_finite_gradients() -> None:
    given = [each.requires_grad_() for each in drawn("grouped", 2, 5)]
    mask = torch.ones(2, 1, 2, 5, dtype=torch.bool)
    mask[0, :, 1] = False
    o_BHTE = absorbed_attention(*given, mask=mask)
    torch.testing.assert_close(o_BHTE[0, :, 1], given[-1].repeat_interleave(3, 0))
    o_BHTE.sum().backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in given)


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_values_written_out_are_what_is_absorbed(shape: str) -> None:
    q_BHTE, *kept = drawn(shape, 6, 6)
    expected = grouped.reference(q_BHTE, *written_out(*kept), causal=True)
    torch.testing.assert_close(absorbed_attention(q_BHTE, *kept), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_textbooks(shape: str) -> None:
    found, expected = ([each.clone().requires_grad_() for each in drawn(shape, 3, 7)] for _ in range(2))
    for given, attention in ((found, absorbed_attention), (expected, reference)):
        (attention(*given) ** 2).sum().backward()
    for ours, theirs in zip(found, expected, strict=True):
        if ours.numel():
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 63), (7, 7), (5, 12)])
def test_one_rotated_key_for_all_heads_is_that_key_in_each(tokens: int, keys: int) -> None:
    """DeepSeek's layout, with values of another width, against heads that have a rotated key each, in front."""
    q_BHTE, _, latent_BSR, k_up_GNR, v_up_GER, bias_GE = drawn("multi-head", tokens, keys)
    key_BSP = torch.randn(2, keys, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = (latent_BSR, k_up_GNR, v_up_GER[:, :6], bias_GE[:, :6])
    expected = reference(q_BHTE.roll(4, -1), key_BSP.repeat(1, 1, 4), *given)
    assert expected.shape[-1] == 6
    torch.testing.assert_close(absorbed_attention(q_BHTE, key_BSP, *given, shared=True), expected)
    torch.testing.assert_close(reference(q_BHTE, key_BSP, *given, shared=True), expected)
    if tokens == keys:
        written = written_out(key_BSP, *given, shared=True)
        torch.testing.assert_close(grouped.reference(q_BHTE, *written, causal=True), expected)


def test_fewer_operations_decide() -> None:
    """Counted by hand for 4 heads of 8, 4 rotated, a latent of 12: 48 more a query and key, against 576 a key."""
    assert absorbs(1, False, 4, 4, 8, 4, 12)
    assert absorbs(1, True, 4, 4, 8, 4, 12)
    assert not absorbs(9, True, 4, 4, 8, 4, 12)  # a prompt: all its keys are new
    per_query, per_key = 4 * (2 * 12 + 4 - 2 * 8), 12 * 4 * (2 * 8 - 4)
    assert (per_query, per_key) == (48, 576)
    assert absorbs(11, False, 4, 4, 8, 4, 12)
    assert not absorbs(12, False, 4, 4, 8, 4, 12)
    assert absorbs(90, False, 4, 4, 8, 4, 6)  # absorbed is less work in every step


def test_planes_are_turned_as_transformers_turns_whole_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    heads_BTGE = torch.randn(2, 5, 3, 8, generator=generator)
    angles_BTE = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)
    cos_BTE, sin_BTE = angles_BTE.cos(), angles_BTE.sin()
    whole, _ = apply_rotary_pos_emb(heads_BTGE.transpose(1, 2), heads_BTGE.transpose(1, 2), cos_BTE, sin_BTE)
    planes_GP = torch.tensor([[0, 3], [1, 2], [2, 0]])
    kept = torch.stack([heads_BTGE[:, :, g, [*p, *(p + 4)]] for g, p in enumerate(planes_GP)], dim=2)
    expected = torch.stack([whole[:, g, :, [*p, *(p + 4)]] for g, p in enumerate(planes_GP)], dim=2)
    assert torch.equal(turn(kept, cos_BTE, sin_BTE, planes_GP), expected)
