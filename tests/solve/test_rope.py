"""Planes of a head as complex numbers: against transformers' own rotation, and against angles written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbouring
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvfold.contracts.config import Fields, check_rope
from kvfold.contracts.site import Rope
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families._decoder import rope_of
from kvfold.solve.rope import frequencies, pairs, put_planes, rotate, to_planes

LAYOUTS = [Rope(8, 100.0), Rope(8, 100.0, half_split=False), Rope(6, 100.0), Rope(6, 100.0, half_split=False)]
WIDTH = 8


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(head_E: Tensor, position: int, rope: Rope) -> Tensor:
    """A head at a position, by one 2 x 2 rotation after another."""
    found_E = head_E.clone()
    for plane in range(rope.dims // 2):
        angle = position * rope.theta ** (-2 * plane / rope.dims)
        one, two = (plane, plane + rope.dims // 2) if rope.half_split else (2 * plane, 2 * plane + 1)
        found_E[one] = math.cos(angle) * head_E[one] - math.sin(angle) * head_E[two]
        found_E[two] = math.sin(angle) * head_E[one] + math.cos(angle) * head_E[two]
    return found_E


@pytest.mark.parametrize("rope", LAYOUTS, ids=str)
def test_planes_are_what_rotates_together(rope: Rope) -> None:
    """Position m turns plane p by e^{i m theta_p}, and the rest of the head not at all."""
    rows_HED = drawn(3, WIDTH, 5)
    angles_P = 7 * rope.theta ** (-torch.arange(0, rope.dims, 2, dtype=torch.float64) / rope.dims)
    expected_HED = torch.stack(
        [torch.stack([turned(column_E, 7, rope) for column_E in rows_ED.T], dim=1) for rows_ED in rows_HED]
    )
    put_planes(rows_HED, to_planes(rows_HED, rope) * torch.exp(1j * angles_P)[:, None], rope)
    torch.testing.assert_close(rows_HED, expected_HED, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rope", LAYOUTS, ids=str)
def test_planes_go_back_where_they_came_from(rope: Rope) -> None:
    rows_HED = drawn(3, WIDTH, 5)
    planes_HPD = to_planes(rows_HED, rope)
    assert planes_HPD.shape == (3, rope.dims // 2, 5)
    empty_HED = torch.full_like(rows_HED, 9.0)
    put_planes(empty_HED, planes_HPD, rope)
    assert torch.equal(empty_HED[:, : rope.dims], rows_HED[:, : rope.dims])
    assert bool((empty_HED[:, rope.dims :] == 9).all())
    real, imaginary = pairs(rope)
    numbers = list(range(WIDTH))
    assert sorted(numbers[real] + numbers[imaginary]) == list(range(rope.dims))


@pytest.mark.parametrize("rope", LAYOUTS, ids=str)
def test_logits_stay_under_a_complex_factor_for_each_plane_and_change_under_more(rope: Rope) -> None:
    """k <- c k and q <- q / conj(c); a rotation that mixes two planes does not commute with positions."""
    q_E, k_E = drawn(WIDTH), drawn(WIDTH, seed=1)

    def logits(q_E: Tensor, k_E: Tensor) -> Tensor:
        return torch.stack([turned(q_E, m, rope) @ turned(k_E, n, rope) for m in range(5) for n in range(m + 1)])

    factors_P = torch.complex(drawn(rope.dims // 2, seed=2), drawn(rope.dims // 2, seed=3))
    other_q, other_k = q_E.view(1, WIDTH, 1).clone(), k_E.view(1, WIDTH, 1).clone()
    put_planes(other_k, factors_P[:, None] * to_planes(other_k, rope), rope)
    put_planes(other_q, to_planes(other_q, rope) / factors_P.conj()[:, None], rope)
    torch.testing.assert_close(logits(other_q.view(-1), other_k.view(-1)), logits(q_E, k_E), rtol=1e-11, atol=1e-11)
    wrong_q = q_E.view(1, WIDTH, 1).clone()
    put_planes(wrong_q, to_planes(wrong_q, rope) / factors_P[:, None], rope)
    assert float((logits(wrong_q.view(-1), other_k.view(-1)) - logits(q_E, k_E)).abs().max()) > 0.1
    mixed_EE = torch.linalg.qr(drawn(WIDTH, WIDTH, seed=4)).Q
    assert float((logits(mixed_EE @ q_E, mixed_EE @ k_E) - logits(q_E, k_E)).abs().max()) > 0.1


@pytest.mark.parametrize("half_split", [True, False])
@pytest.mark.parametrize("dims", [8, 6])
def test_rotation_is_transformers_own_and_has_its_transpose(dims: int, half_split: bool) -> None:
    """Cohere's for neighbouring coordinates."""
    heads_BHTE, other_BHTE = drawn(2, 3, 5, WIDTH), drawn(2, 3, 5, WIDTH, seed=1)
    angles_TP = torch.arange(5.0).double()[:, None] * 100.0 ** (-torch.arange(0, dims, 2).double() / dims)
    angles_TE = angles_TP.repeat(1, 2) if half_split else angles_TP.repeat_interleave(2, 1)
    cos_TE, sin_TE, stock = angles_TE.cos(), angles_TE.sin(), apply_rotary_pos_emb if half_split else neighbouring
    found_BHTE = rotate(heads_BHTE, cos_TE, sin_TE, half_split=half_split)
    turned_BHTE, _ = stock(
        heads_BHTE[..., :dims], heads_BHTE[..., :dims], cos_TE.expand(2, -1, -1), sin_TE.expand(2, -1, -1)
    )
    expected_BHTE = torch.cat([turned_BHTE.to(heads_BHTE), heads_BHTE[..., dims:]], dim=-1)
    torch.testing.assert_close(found_BHTE, expected_BHTE, rtol=0, atol=1e-6)  # Cohere's rotates in float32
    exact = turned(heads_BHTE[1, 2, 4], 4, Rope(dims, 100.0, half_split))
    torch.testing.assert_close(found_BHTE[1, 2, 4], exact)
    back_BHTE = rotate(other_BHTE, cos_TE, -sin_TE, half_split=half_split)
    torch.testing.assert_close((found_BHTE * other_BHTE).sum(), (heads_BHTE * back_BHTE).sum())
    torch.testing.assert_close(rotate(found_BHTE, cos_TE, -sin_TE, half_split=half_split), heads_BHTE)


SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, two scales": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, told": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3, "beta_fast": 16},
}


@pytest.mark.parametrize("scaled", SCALED)
def test_frequencies_are_transformers_own(scaled: str) -> None:
    kind = scaled.partition(",")[0]
    scaling = {"rope_type": kind, "rope_theta": 5000.0, **SCALED[scaled]}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=256, rope_parameters=dict(scaling)
    )
    rotary = LlamaRotaryEmbedding(config)
    theta_P, factor = frequencies(Rope(32, 5000.0, scaling=scaling))
    torch.testing.assert_close(rotary.inv_freq.double(), theta_P, rtol=1e-6, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling)


def test_frequencies_that_depend_on_the_text_are_refused() -> None:
    with pytest.raises(SettingError, match="'longrope' changes with the length of the text; allowed: default"):
        frequencies(Rope(8, 1e4, scaling={"rope_type": "longrope"}))


@pytest.mark.parametrize(
    "said",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_what_config_json_leaves_out_of_a_rotation_is_what_transformers_takes(said: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**sizes, **copy.deepcopy(said)))
    rope = rope_of({**sizes, **said}, 32)
    theta_P, factor = frequencies(rope)
    torch.testing.assert_close(rotary.inv_freq.double(), theta_P, rtol=1e-6, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize(
    ("scaling", "what"),
    [
        (
            {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
            'rope_type is not known here .*write "rope_type": "longrope',
        ),
        ({"type": "cubic", "factor": 2.0}, r"rope_type is not known here \(got 'cubic'\); allowed: default, linear"),
        ({"type": ["yarn"]}, "is not known here"),
        ({"type": "yarn"}, "rope_scaling.factor must be a number"),
        ({"type": "llama3", "factor": 2.0}, "rope_scaling.low_freq_factor must be a number"),
    ],
)
def test_rotations_that_transformers_would_not_load(scaling: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModel, match=what):
        check_rope(Fields({"rope_scaling": scaling}), 32)
