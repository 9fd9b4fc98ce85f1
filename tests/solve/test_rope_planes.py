"""RoPElite in one pass against the search that the paper describes, on rotations by transformers itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvfold.contracts.site import Attention, Rope, Site
from kvfold.families import all_families
from kvfold.solve import rope_planes

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
ROWS, LENGTH = 3, 12


def attention_of(heads: int, groups: int, scaling: dict[str, Any]) -> Attention:
    family = all_families()["llama"]
    attention = family.shape(family.tiny()).sites[Site(0)]
    rope = Rope(8, 100.0, scaling={**scaling, "rope_theta": 100.0})
    return replace(attention, num_attention_heads=heads, num_key_value_heads=groups, rope=rope)


def sample(attention: Attention, seed: int = 0) -> dict[str, Tensor]:
    """All tokens of a few rows, as calibration answers them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = ROWS * LENGTH
    scales_HE = torch.rand(4, 4, generator=generator).repeat(1, 2) + 0.3  # planes of unlike weight
    groups = attention.num_key_value_heads
    return {
        "q_NHE": torch.randn(tokens, attention.num_attention_heads, 8, generator=generator) * scales_HE,
        "k_NGE": torch.randn(tokens, groups, 8, generator=generator) * scales_HE[:groups],
        "row_N": torch.arange(ROWS).repeat_interleave(LENGTH),
        "position_N": torch.arange(LENGTH).repeat(ROWS),
    }


def naive(attention: Attention, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The paper's search: whole logits of every row, once for each candidate of each round, head by head."""
    assert attention.rope is not None
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=attention.num_attention_heads,
        head_dim=8,
        max_position_embeddings=128,
        rope_parameters=dict(attention.rope.scaling or {}),
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = (each.double() for each in rotary(torch.zeros(1, dtype=torch.float64), torch.arange(LENGTH)[None]))
    factor = rotary.attention_scaling  # of q and of k, rotated or not
    visible_TT = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    orders, losses = [], []
    for group in range(attention.num_key_value_heads):
        query = given["q_NHE"].double().unflatten(0, (ROWS, LENGTH)).transpose(1, 2)
        query = query[:, group * attention.query_group : (group + 1) * attention.query_group]
        key = given["k_NGE"].double().unflatten(0, (ROWS, LENGTH)).transpose(1, 2)[:, group : group + 1]
        turned = apply_rotary_pos_emb(query, key, cos, sin)

        def scores(kept: list[int], turned: Any = turned, still: Any = (query, key)) -> Tensor:
            mine = torch.zeros(8, dtype=torch.bool)
            mine[[*kept, *(plane + 4 for plane in kept)]] = True
            q, k = (torch.where(mine, a, factor * b) for a, b in zip(turned, still, strict=True))
            return (q @ k.mT * 8**-0.5)[..., visible_TT]

        whole, kept, left = scores([0, 1, 2, 3]), [], []
        while len(kept) < 4:
            distances = {
                plane: float((scores([*kept, plane]) - whole).abs().mean()) for plane in range(4) if plane not in kept
            }
            kept.append(min(distances, key=lambda plane: distances[plane]))
            left.append(distances[kept[-1]])
        orders.append(kept)
        losses.append(left)
    return torch.tensor(orders), torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_one_pass_is_the_search_of_the_paper(scaling: str, heads: int, groups: int) -> None:
    attention = attention_of(heads, groups, SCALINGS[scaling])
    given = sample(attention)
    assert attention.rope is not None
    found = [(seen, rope_planes.elite(seen)) for seen in rope_planes.pairs_of(attention, attention.rope, given)]
    orders, losses = naive(attention, given)
    assert torch.equal(torch.stack([order_C for _, order_C in found]), orders)
    left = [
        torch.stack([rope_planes.left(seen, order_C[: kept + 1]).abs().mean() for kept in range(len(order_C))])
        for seen, order_C in found
    ]
    torch.testing.assert_close(torch.stack(left), losses, rtol=1e-5, atol=1e-6)


def test_heads_differ() -> None:
    """Or the comparison above would hold for a search that took every head's planes from the first."""
    attention = attention_of(4, 4, SCALINGS["default"])
    assert len({tuple(order) for order in naive(attention, sample(attention))[0].tolist()}) > 1


def test_pairs_do_not_reach_over_rows_or_forwards() -> None:
    attention = attention_of(4, 4, SCALINGS["default"])
    assert attention.rope is not None
    seen = next(rope_planes.pairs_of(attention, attention.rope, sample(attention)))
    assert len(seen.lost_XC) == ROWS * LENGTH * (LENGTH + 1) // 2


def test_many_pairs_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attention_of(4, 2, SCALINGS["default"])
    assert attention.rope is not None
    whole = next(rope_planes.pairs_of(attention, attention.rope, sample(attention)))
    monkeypatch.setattr(rope_planes, "MOST", 200)
    seen = next(rope_planes.pairs_of(attention, attention.rope, sample(attention)))
    assert 100 <= len(seen.lost_XC) <= 200
    assert all(bool((whole.lost_XC == row).all(1).any()) for row in seen.lost_XC[:5])


def test_baselines_are_what_they_are_called() -> None:
    assert rope_planes.uniform(12, 4).tolist() == [0, 4, 7, 11]
    assert rope_planes.uniform(12, 1).tolist() == [0]
    assert rope_planes.uniform(4, 4).tolist() == [0, 1, 2, 3]
    product_XC = torch.tensor([[0.1, -3.0, 2.0, 0.5], [0.2, -3.0, 1.0, 0.0]], dtype=torch.float64)
    assert rope_planes.contribution(rope_planes.Pairs(product_XC, product_XC)).tolist() == [2, 3, 0, 1]


def test_what_is_left_is_that_of_the_planes_not_kept() -> None:
    lost_XC = torch.tensor([[1.0, -2.0, 6.0], [1.0, 2.0, -6.0]], dtype=torch.float64)
    seen = rope_planes.Pairs(lost_XC, lost_XC)
    assert rope_planes.left(seen, torch.tensor([2])).tolist() == [-1, 3]
    assert rope_planes.left(seen, torch.tensor([0, 1, 2])).tolist() == [0, 0]
    assert rope_planes.elite(seen).tolist() == [2, 1, 0]
