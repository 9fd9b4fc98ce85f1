"""Budgets: the mix against every other mix, the whole that they count from, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.contracts.per_layer import divisors, spelled
from kvfold.contracts.requests import Answers, FoldedKL, FoldedRecall
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.methods import gqa
from kvfold.predict.plan import plan
from kvfold.solve.budget import alike, cheapest, part, price, uniform

Make = Callable[..., Path]


def model(layers: Sequence[tuple[int, int]], **changes: Any) -> Shape:
    """A shape of layers with these (key/value heads, head width)."""
    sites = {Site(layer): Attention(96, heads, heads, width) for layer, (heads, width) in enumerate(layers)}
    return Shape("llama", "llama", sites, 96, 100, len(sites), 10**6, "float32", 256, **changes)


def told(shape: Shape, kl: Callable[[Site, int], float]) -> Answers:
    return {
        FoldedKL(site, heads): {"kl": torch.tensor(kl(site, heads), dtype=torch.float64)}
        for site, attention in shape.sites.items()
        for heads in divisors(attention.num_key_value_heads)[:-1]
    }


def every_mix(shape: Shape) -> list[dict[Site, int]]:
    numbers = (divisors(attention.num_key_value_heads) for attention in shape.sites.values())
    return [dict(zip(shape.sites, mix, strict=True)) for mix in itertools.product(*numbers)]


def cost(shape: Shape, answers: Answers, mix: dict[Site, int]) -> tuple[int, int]:
    """Micronats and elements of a mix, added up by hand."""
    whole = {site: attention.num_key_value_heads for site, attention in shape.sites.items()}
    nats = [answers[FoldedKL(*each)]["kl"].item() for each in mix.items() if each[1] < whole[each[0]]]
    return sum(round(1e6 * kl) for kl in nats), sum(heads * shape.sites[site].head_dim for site, heads in mix.items())


@pytest.mark.slow
@given(data=st.data())
def test_no_mix_within_the_budget_is_cheaper(data: st.DataObject) -> None:
    layers = data.draw(
        st.lists(st.tuples(st.sampled_from([1, 4, 6, 8]), st.sampled_from([8, 24])), min_size=2, max_size=4)
    )
    shape = model(layers)
    draw = st.one_of(st.integers(0, 3).map(lambda n: n / 10), st.floats(0, 5))  # with ties, and without
    answers = told(shape, lambda site, heads: data.draw(draw))
    everything = sum(heads * width for heads, width in layers)
    budget = data.draw(st.floats(sum(width for _, width in layers) / everything, 1))
    mix = cheapest(budget, shape, answers)
    within = [each for each in every_mix(shape) if cost(shape, answers, each)[1] <= budget * everything * (1 + 1e-9)]
    assert cost(shape, answers, mix) == min(cost(shape, answers, each) for each in within)
    assert mix == cheapest(budget, shape, answers)
    same = [each for each in within if len(set(each.values())) == 1]
    best = uniform(budget, shape, answers)
    assert cost(shape, answers, best) == min(cost(shape, answers, each) for each in same)
    assert price(shape, answers, mix) <= price(shape, answers, best) + 1e-6 * len(layers)


def test_a_mix_by_recall_keeps_the_layers_that_copy() -> None:
    """Layer 0 costs most KL, layer 1 all of the copying; a fold that helps to copy is free, not worth a head."""
    shape = model([(4, 8)] * 3)
    kls, rises = (0.3, 0.1, 0.2), (-0.5, 2.0, 0.0)
    answers = {
        **told(shape, lambda site, heads: kls[site.layer]),
        **{
            FoldedRecall(site, heads): {"rise": torch.tensor(rises[site.layer], dtype=torch.float64)}
            for site in shape.sites
            for heads in (1, 2)
        },
    }
    kl, recall = gqa.COSTS["kl"], gqa.COSTS["recall"]
    assert list(cheapest(0.5, shape, answers, kl).values()) == [4, 1, 1]
    assert list(cheapest(0.5, shape, answers, recall).values()) == [1, 4, 1]
    both = cheapest(0.84, shape, answers, gqa.COSTS["both"])
    assert list(both.values()) == [4, 4, 1]
    assert price(shape, answers, both, gqa.COSTS["both"]) == pytest.approx(0.2)
    config = gqa.Config("auto", budget=0.84, budget_metric="both")
    found = gqa.METHOD.found(config, shape, answers)
    assert found["mix"] == {"kv_heads": "4/4/1", "cache": 0.75, "kl": 0.2, "rise": 0.0}
    assert found["rise"]["layer 1"] == {"1": 2.0, "2": 2.0, "4": 0.0}
    asked = gqa.METHOD.needs(config, shape)
    assert {each for each in asked if isinstance(each, FoldedKL | FoldedRecall)} == set(answers)


@pytest.mark.slow
def test_a_large_model_against_dynamic_programming() -> None:
    shape, room = model([(64, 128)] * 80), 80 * 16
    answers = told(shape, lambda site, heads: math.sin(site.layer) ** 2 / heads)
    least = [0.0] * (room + 1)  # micronats of the layers so far, within so many heads
    for site in shape.sites:
        prices = {heads: cost(shape, answers, {site: heads})[0] for heads in divisors(64)}
        least = [
            min((least[left - heads] + kl for heads, kl in prices.items() if heads <= left), default=math.inf)
            for left in range(room + 1)
        ]
    assert cost(shape, answers, cheapest(0.25, shape, answers))[0] == least[room]


def test_what_costs_nothing_is_folded_even_when_there_is_room() -> None:
    shape = model([(8, 8)] * 3)
    answers = told(shape, lambda site, heads: 2e-7 if site.layer == 1 else 0.1)
    assert cheapest(1.0, shape, answers) == {Site(0): 8, Site(1): 1, Site(2): 8}


def test_a_budget_is_met_to_the_last_element() -> None:
    shape = model([(100, 2)])  # 0.29 * 100 is 28.999999999999996 in floating point
    assert alike(0.29, model([(10, 2)] * 10)) == {
        **dict.fromkeys(map(Site, range(10)), 2),
        **dict.fromkeys(map(Site, range(3)), 5),
    }
    assert cheapest(0.2, shape, told(shape, lambda site, heads: 1 / heads)) == {Site(0): 20}


@given(data=st.data())
def test_alike_leaves_no_room_for_another_head(data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.tuples(st.sampled_from([2, 4, 6, 8]), st.just(8)), min_size=1, max_size=6))
    shape, everything = model(layers), sum(heads for heads, _ in layers)
    budget = data.draw(st.floats(len(layers) / everything, 1))
    heads = alike(budget, shape)
    assert sum(heads.values()) <= budget * everything + 1e-6
    for site, count in heads.items():
        more = [each for each in divisors(layers[site.layer][0]) if each > count]
        assert not more or sum(heads.values()) - count + more[0] > budget * everything
    if len(set(layers)) == 1:
        numbers = divisors(layers[0][0])
        assert max(map(numbers.index, heads.values())) - min(map(numbers.index, heads.values())) <= 1


def test_a_student_counts_from_its_root() -> None:
    grouped = model([(4, 8)] * 4, root_elements=2 * 8 * 8 * 4)  # of a root of 8 heads
    assert part(grouped, dict.fromkeys(grouped.sites, 4)) == 0.5
    assert set(alike(0.25, grouped).values()) == {2}
    with pytest.raises(
        SettingError, match=r"budget is out of range \(got 0.1\); allowed: 0.125 \(one head everywhere\) to"
    ):
        gqa.Config("auto", budget=0.1).check(grouped)
    gqa.Config("auto", budget=0.125).check(grouped)


# --- the setting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            gqa.Config("auto"),
            "gqa: kv_heads auto needs a budget; add --budget, 0.125 (one head everywhere) to 1, "
            "as a part of the root teacher's cache",
        ),
        *(
            (
                gqa.Config("auto", budget=budget),
                f"gqa: budget is out of range (got {budget:g}); allowed: 0.125 (one head everywhere) to 1, "
                "as a part of the root teacher's cache",
            )
            for budget in (0.0, -1.0, 0.1249, 1.01, math.nan)
        ),
        (
            gqa.Config(2, budget=0.5),
            "gqa: budget does not apply to kv_heads 2 (got 0.5); set --kv-heads auto, or leave out --budget",
        ),
        (
            gqa.Config("4/2/1"),
            "gqa: kv_heads has 3 numbers for 4 layers (got 4/2/1); give one for each layer, or one for all",
        ),
        (gqa.Config("4/2/1/3"), "gqa: kv_heads 3 does not divide the 8 query heads of layer 3; choose 1, 2, 4 or 8"),
        (
            gqa.Config("self=4/2/1/1,cross=2"),
            "gqa: kv_heads needs a number for self (got self=4/2/1/1,cross=2); allowed: a whole number, or self=N",
        ),
    ],
)
def test_a_refusal_is_one_line(config: gqa.Config, line: str) -> None:
    with pytest.raises(SettingError) as caught:
        config.check(model([(8, 8)] * 4))
    assert str(caught.value) == line


def test_heads_layer_by_layer() -> None:
    shape = model([(8, 8)] * 4)
    config = gqa.Config("self=4/2/8/1", init="mean")
    config.check(shape)
    resolved = gqa.METHOD.resolve(config, shape, {})
    assert resolved == gqa.Config("4/2/8/1", init="mean")
    assert gqa.METHOD.resolve(resolved, shape, {}) == resolved
    assert gqa.METHOD.resolve(gqa.Config("2/2/2/2"), shape, {}) == gqa.Config(2)
    assert [site.num_key_value_heads for site in gqa.METHOD.student(config, shape).shape.sites.values()] == [4, 2, 8, 1]
    assert gqa.METHOD.cache_spec(config, shape).bytes_per_token(1) == 2 * 8 * 15
    assert {request.site.layer for request in gqa.METHOD.needs(gqa.Config("4/2/8/1"), shape)} == {0, 1, 3}


def test_kinds_can_each_have_layers() -> None:
    sites = {Site(layer, kind): Attention(64, 8, 8, 8) for layer in range(2) for kind in ("self", "cross", "encoder")}
    shape = Shape("t5", "t5", sites, 64, 100, 2, 10**6, "float32", 256)
    heads = gqa.heads_by_site(gqa.Config("self=4/2,cross=1"), shape)
    assert heads == {Site(0): 4, Site(1): 2, Site(0, "cross"): 1, Site(1, "cross"): 1}
    resolved = gqa.METHOD.resolve(gqa.Config("cross=1/1,self=4/2"), shape, {})
    assert spelled(resolved)["kv_heads"] == "self=4/2,cross=1"


def test_auto_asks_for_every_fold_and_resolves_to_the_cheapest() -> None:
    shape = model([(4, 8)] * 3)
    config = gqa.Config("auto", init="mean", budget=0.5)
    asked = gqa.METHOD.needs(config, shape)
    assert asked == [FoldedKL(Site(layer), heads) for layer in range(3) for heads in (1, 2)]
    assert sum(question.bytes(shape) for question in asked) == 48
    assert len(gqa.METHOD.needs(gqa.Config("auto", budget=0.5), shape)) == len(asked) + 9  # and the moments
    answers = told(shape, lambda site, heads: [1.0, 0.1, 0.1][site.layer] / heads)
    resolved = gqa.METHOD.resolve(config, shape, answers)
    assert resolved == gqa.Config("4/1/1", init="mean")
    resolved.check(shape)
    found = gqa.METHOD.found(config, shape, answers)
    assert found["mix"] == {"kv_heads": "4/1/1", "cache": 0.5, "kl": pytest.approx(0.2)}
    assert found["uniform"] == {"kv_heads": 2, "cache": 0.5, "kl": pytest.approx(0.6)}
    assert found["kl"]["layer 0"] == {"1": 1.0, "2": 0.5, "4": 0.0}
    assert gqa.METHOD.found(resolved, shape, answers) == {}


# --- plan and convert ------------------------------------------------------------------------------------------------


def test_a_plan_shows_the_bytes_of_the_budget(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    made = plan(teacher, settings={"kv_heads": "auto", "budget": 0.6})
    assert made.after.cache_bytes_per_token <= 0.6 * made.before.cache_bytes_per_token
    assert made.after.kv_heads == "2"  # a further layer of four heads would be 0.625
    assert any(
        "evenly over layers; the conversion measures how many heads each keeps" in line for line in made.warnings
    )
    half = convert(teacher, tmp_path / "half", "gqa", {"kv_heads": 2})
    again = plan(half, settings={"kv_heads": "auto", "budget": 0.4})
    assert again.root_cache_bytes_per_token == made.before.cache_bytes_per_token
    assert again.after.kv_heads == "1 to 2"  # 6 of 16 heads
    assert again.after.cache_bytes_per_token == 6 / 16 * again.root_cache_bytes_per_token
    with pytest.raises(SettingError, match=r"budget is out of range .got 0.2.; allowed: 0.25"):
        plan(half, settings={"kv_heads": "auto", "budget": 0.2})


def test_a_list_by_hand(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "4/2/1/2"}))
    assert [site.num_key_value_heads for site in student.shape.sites.values()] == [4, 2, 1, 2]
    uniform = {
        heads: Checkpoint.open(convert(teacher, tmp_path / f"{heads}", "gqa", {"kv_heads": heads}))
        for heads in (1, 2, 4)
    }
    for layer, heads in enumerate((4, 2, 1, 2)):
        for role in "qkvo":
            name = f"model.layers.{layer}.self_attn.{role}_proj.weight"
            assert torch.equal(student.read(name), uniform[heads].read(name))


def test_auto_without_text(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="gqa needs calibration text, and none is given; add --cal"):
        convert(tiny_checkpoint(), tmp_path / "student", "gqa", {"kv_heads": "auto", "budget": 0.5})
    assert not list(tmp_path.glob("student*"))
