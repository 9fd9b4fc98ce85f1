"""One rotated key for all heads: against attention written out, the best that any method finds, and the norm itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from kvfold.contracts.site import Attention, Roles, Rope
from kvfold.solve import mla
from kvfold.solve.rope import frequencies, rotate
from kvfold.solve.shared_heads import Moments

HEADS, GROUPS, WIDTH, HIDDEN, TOKENS = 4, 2, 8, 24, 9
SITE = Attention(HIDDEN, HEADS, GROUPS, WIDTH, rope=Rope(WIDTH, 10000.0))


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def roles_of(attention: Attention = SITE) -> Roles:
    return {role: drawn(*form, seed=n) for n, (role, form) in enumerate(attention.roles().items())}


def moments_of(roles: Roles, attention: Attention = SITE) -> tuple[Tensor, Moments]:
    """Inputs of which those averaged by attention are neighbours, and their moments."""
    x_ND = 0.3 + drawn(300, HIDDEN, seed=90) * torch.logspace(0, -1, HIDDEN).double()
    y_ND = (x_ND + x_ND.roll(1, 0)) / 2
    q_NHE = (x_ND @ roles["q"].T).view(300, HEADS, WIDTH)
    grams = [each.T @ each / 300 for each in (x_ND, y_ND)]
    query_HEE = torch.einsum("nhe,nhf->hef", q_NHE, q_NHE) / 300
    return x_ND, Moments(grams[0], x_ND.mean(0), query_HEE, grams[1], y_ND.mean(0))


def logits(q_TN: Tensor, k_TN: Tensor, attention: Attention) -> Tensor:
    """The textbook's logits of rotated heads, `(H, T, S)`."""
    q_HTE, k_GTE = (each.view(TOKENS, -1, WIDTH).transpose(0, 1) for each in (q_TN, k_TN))
    assert attention.rope is not None
    theta_P, factor = frequencies(attention.rope)
    angle_TP = torch.arange(TOKENS)[:, None] * theta_P
    cos, sin = (torch.cat([each, each], dim=-1) * factor for each in (angle_TP.cos(), angle_TP.sin()))
    q_HTE, k_GTE = rotate(q_HTE, cos, sin), rotate(k_GTE, cos, sin)
    return attention.logit_scale * q_HTE @ k_GTE.repeat_interleave(attention.query_group, 0).mT


def students(x_TD: Tensor, new: Roles, angles_P: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Logits and outputs of deepseek_v3's attention as its paper writes it, with a norm that divides by 2^power."""
    rotated = 2 * len(angles_P)
    down = x_TD @ new["kv_down"].T + new.get("kv_down_bias", 0)
    latent_TR, key_TP = down[:, :width], down[:, width:]
    latent_TR = new["kv_norm"] * latent_TR / latent_TR.square().mean(-1, keepdim=True).add(mla.EPSILON).sqrt()
    q_HTE = (x_TD @ new["q"].T).view(TOKENS, HEADS, -1).transpose(0, 1)
    up_HTE = (latent_TR @ new["kv_up"].T).view(TOKENS, HEADS, -1).transpose(0, 1)
    angle_TP = torch.arange(TOKENS)[:, None] * angles_P
    cos, sin = (each.repeat_interleave(2, -1) for each in (angle_TP.cos(), angle_TP.sin()))
    turned_HTP = rotate(q_HTE[..., WIDTH:], cos, sin, half_split=False)
    key_TP = rotate(key_TP, cos, sin, half_split=False)
    found = (q_HTE[..., :WIDTH] @ up_HTE[..., :WIDTH].mT + turned_HTP @ key_TP.T) / math.sqrt(WIDTH + rotated)
    return found, up_HTE[..., WIDTH:]


@pytest.mark.parametrize("kind", ["plain", "biased", "yarn"])
def test_every_component_is_the_teacher(kind: str) -> None:
    """Logits up to a constant of each query, values, and the bias behind o, in float64."""
    attention = SITE
    if kind == "biased":
        attention = replace(SITE, biases=frozenset("kvo"))
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        attention = replace(SITE, rope=Rope(WIDTH, 10000.0, scaling=yarn))
    roles, width = roles_of(attention), GROUPS * WIDTH + 1
    source = mla.Source.of(attention, roles, "weights", None, None)
    pools = mla.counted([GROUPS] * (WIDTH // 2))
    new, lost = mla.convert_site(source, pools, width, exact=True, dtype="float64")
    assert lost == 0
    x_TD, theta_P = drawn(TOKENS, HIDDEN, seed=7), frequencies(source.attention.rope or SITE.rope)[0]  # type: ignore[arg-type]
    k_TN, v_TN = (x_TD @ roles[role].T + roles.get(f"{role}_bias", 0) for role in "kv")
    found, v_HTE = students(x_TD, new, theta_P.repeat_interleave(GROUPS), width)
    size = x_TD.square().sum(-1).max() * roles["v"].square().sum(-1).max()
    exact = float(size) / (2 * 4.0**mla.POWER)  # the part by which the norm still changes
    assert exact < 1e-5
    torch.testing.assert_close(found, logits(x_TD @ roles["q"].T, k_TN, attention), rtol=1e-10, atol=1e-10)
    heads_TN = v_HTE.transpose(0, 1).flatten(1)
    expected_TD = v_TN.view(TOKENS, GROUPS, 1, WIDTH).expand(-1, -1, 2, -1).flatten(1) @ roles["o"].T
    torch.testing.assert_close(
        heads_TN @ new["o"].T + new["o_bias"], expected_TD + roles.get("o_bias", 0), rtol=exact, atol=exact
    )


def test_one_component_is_the_best_of_its_plane() -> None:
    """The error of the logits of one plane, against a descent over all keys and all lifts."""
    roles = roles_of()
    x_ND, moments = moments_of(roles)
    source = mla.Source.of(SITE, roles, "outputs", moments, None)
    powers_PG = source.powers()
    assert powers_PG.shape == (WIDTH // 2, GROUPS)
    plane = 1
    k_GD = torch.complex(*(roles["k"].view(GROUPS, WIDTH, HIDDEN)[:, row] for row in (plane, plane + WIDTH // 2)))
    weight_G = source.weight_GP[:, plane]
    key_D = k_GD[0].clone().requires_grad_()
    lift_G = torch.ones(GROUPS, dtype=torch.complex128, requires_grad=True)
    found = torch.optim.LBFGS([key_D, lift_G], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        found.zero_grad()
        error_NG = x_ND.to(k_GD) @ (k_GD - lift_G[:, None] * key_D).T
        total = (error_NG.abs().square().mean(0) * weight_G).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    found.step(loss)
    assert float(loss().detach()) == pytest.approx(float(powers_PG[plane, 1:].sum()), rel=1e-6)


def test_what_is_not_rotated_is_in_the_latent() -> None:
    """With room for all of the rest: the error is that of planes that stand still, and nothing else."""
    roles, counts = roles_of(), [1, 2, 0, 1]
    _, moments = moments_of(roles)
    source = mla.Source.of(SITE, roles, "outputs", moments, None)
    new, _ = mla.convert_site(source, mla.counted(counts), HIDDEN + 1, exact=True, dtype="float64")
    theta_P = frequencies(SITE.rope)[0]  # type: ignore[arg-type]
    angles = torch.cat([theta_P[plane].repeat(kept) for plane, kept in enumerate(counts)])
    x_TD = drawn(TOKENS, HIDDEN, seed=8)
    found, _ = students(x_TD, new, angles, HIDDEN + 1)
    expected = logits(x_TD @ roles["q"].T, x_TD @ roles["k"].T, SITE)
    diagonal = torch.arange(TOKENS)
    torch.testing.assert_close(found[:, diagonal, diagonal], expected[:, diagonal, diagonal], rtol=1e-5, atol=1e-5)
    assert (found - expected).abs().max() > 0.1  # at other distances


@pytest.mark.parametrize(("always", "slow"), [(True, False), (False, True)])
def test_neighbours_are_folded_where_that_keeps_more(always: bool, slow: bool) -> None:
    """Planes of nearly one angle fold; planes of very different ones only if they must."""
    theta = 1.0001 if slow else 1e8
    attention = replace(SITE, rope=Rope(WIDTH, theta))
    source = mla.Source.of(attention, roles_of(), "weights", None, None)
    pools = mla.spaced(source, 2, always=always)
    assert [pool.angle for pool in pools] == [0, 2]
    assert [pool.planes for pool in pools] == [(0, 1), (2, 3)]
    if not slow:
        assert mla.spaced(source, 2, always=False)[0].planes == (0,)


def test_the_planes_that_pay_are_chosen() -> None:
    gains = [torch.tensor([[8.0, 1.0], [4.0, 3.0], [0.0, 0.0]]), torch.tensor([[80.0, 10.0], [40.0, 30.0], [0.0, 0.0]])]
    assert mla.chosen(gains, 3) == [1, 2, 0]
    assert mla.chosen(gains, 1) == [1, 0, 0]


def test_the_cost_of_standing_still_is_that_of_the_angle() -> None:
    theta_P = torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)
    cost_P = mla.missed(theta_P)
    assert 1 < cost_P[0] < 2.5
    assert cost_P[1] < cost_P[0]
    assert cost_P[2] < 1e-6
    torch.testing.assert_close(mla.missed(theta_P, theta_P), torch.zeros(3, dtype=torch.float64))


# --- the norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [24, 64, 95, 512])
def test_the_constant_holds_the_norm_still(dtype: str, width: int) -> None:
    """On transformers' own norm: a latent comes out as it went in, to the rounding of its format."""
    constant, norm_R, gain = mla.constants(width, dtype)
    kind: Any = getattr(torch, dtype)
    norm = DeepseekV3RMSNorm(width).to(kind)
    norm.weight.data.copy_(norm_R)
    latent_NR = torch.randn(200, width, generator=torch.Generator().manual_seed(0)).to(kind)
    latent_NR[:, -1] = constant
    with torch.inference_mode():
        out_NR = norm(latent_NR)
    error = (out_NR[:, :-1].double() / gain - latent_NR[:, :-1].double()).abs()
    step = torch.finfo(kind).eps
    subnormal = torch.finfo(kind).smallest_normal * step * 2.0 ** mla.POWERS.get(dtype, mla.POWER)
    length = 1 / 4.0 ** mla.POWERS.get(dtype, mla.POWER)  # |z|^2 / (2 M^2), at most twice its mean
    assert (error <= latent_NR[:, :-1].double().abs() * (2 * step + length) + subnormal).all()
    assert torch.allclose(out_NR[:, -1].double(), torch.ones(()).double(), rtol=2 * step)


def test_a_constant_fits_its_format() -> None:
    assert all(math.isfinite(mla.constants(width, "float16")[0]) for width in (2, 512, 16_384))


def test_without_a_constant_latents_have_the_length_that_the_norm_gives_them() -> None:
    roles = roles_of()
    x_ND, moments = moments_of(roles)
    source = mla.Source.of(SITE, roles, "outputs", moments, None)
    new, lost = mla.convert_site(source, mla.counted([1, 1, 1, 1]), 10, exact=False, dtype="float32")
    assert set(new) == {"q", "o", "kv_down", "kv_norm", "kv_up"}
    latent_NR = x_ND @ new["kv_down"][:10].T
    assert float(latent_NR.square().mean()) == pytest.approx(1)
    assert 0 < lost < 1
