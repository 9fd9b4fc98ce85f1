from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.contracts.cache import CacheSpec, Slot, grouped_cache
from kvfold.contracts.per_layer import PerSite, divisors, spelled
from kvfold.contracts.requests import AttentionGram, CrossGram, InputGram, QueryGram, SampledPairs
from kvfold.contracts.site import DTYPE_BYTES, KINDS, Attention, Kind, Shape, Site
from kvfold.errors import SettingError
from kvfold.families import all_families
from kvfold.methods import gqa
from kvfold.settings import decode

kinds = st.lists(st.sampled_from(KINDS), min_size=1, unique=True)
counts = st.integers(1, 10**6)


def model(sites: Mapping[Site, Attention]) -> Shape:
    """A model of these attentions and 1,000 parameters elsewhere."""
    parameters = 1000 + sum(attention.parameters for attention in sites.values())
    return Shape("llama", "llama", sites, 96, 64, len(sites), parameters, "float32", 128)


def of_heads(heads: int, kv_heads: int, layers: int = 2) -> Shape:
    return model({Site(layer): Attention(96, heads, kv_heads, 8) for layer in range(layers)})


# --- settings that differ by layer and by kind ----------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """Settings of one number by site."""

    heads: PerSite | Literal["auto"]


def decoded(value: object) -> PerSite | Literal["auto"]:
    return decode(Numbers, {"heads": value}, "test").heads


@given(counts, kinds)
def test_one_number_holds_for_every_site(number: int, known: list[Kind]) -> None:
    sites = [Site(layer, kind) for kind in known for layer in range(3)]
    for value in (number, f" {number} "):
        made = decoded(value)
        assert made.by_site(sites, "heads", "test") == dict.fromkeys(sites, number)
        assert spelled(Numbers(made)) == {"heads": value}


@given(
    st.dictionaries(st.sampled_from(KINDS), counts | st.lists(counts, min_size=3, max_size=3), min_size=1),
    st.randoms(),
    st.sampled_from(["", " "]),
)
def test_kinds_are_named_in_any_order(wanted: dict[Kind, Any], random: Any, space: str) -> None:
    rows = {kind: row if isinstance(row, list) else [row] * 3 for kind, row in wanted.items()}
    parts = [
        f"{space}{kind}{space}={space}{'/'.join(map(str, row if isinstance(row, list) else [row]))}{space}"
        for kind, row in wanted.items()
    ]
    random.shuffle(parts)
    made = decoded(",".join(parts))
    by_site = {Site(layer, kind): row[layer] for kind, row in rows.items() for layer in range(3)}
    assert made.by_site(by_site, "heads", "test") == by_site
    assert {site: made.at(site) for site in by_site} == by_site
    again = PerSite.of(by_site)
    assert again.by_site(by_site, "heads", "test") == by_site
    assert PerSite.parse(again.spelled()) == again
    assert PerSite.parse(made.spelled()) == made


def test_the_spelling_of_a_file_is_kept() -> None:
    for value in (8, "4/2/2/1", "self=8,cross=4", "self=4/2,cross=1", "auto"):
        assert spelled(Numbers(decoded(value))) == {"heads": value}
    assert decoded("8") == decoded(8)
    assert spelled(Numbers(decoded("8"))) == {"heads": "8"}, "a hash of settings tells them apart, as it always did"


@settings(max_examples=50)
@given(st.text(alphabet="selfcroind=,/0123456789 -.²٣x") | st.text() | st.integers() | st.booleans() | st.floats())
def test_any_value_is_read_or_refused_in_one_line(value: Any) -> None:
    try:
        made = decoded(value)
    except SettingError as error:
        line = str(error)
    else:
        assert made == "auto" or min(map(min, made.numbers.values())) >= 1
        return
    assert line.startswith("test: heads cannot be ")
    assert "; allowed: a whole number, or one for each layer (4/2/2/1), or for each kind of site" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "text", ["slef=4,cross=2", "self=4,cross=0", "self=4,self=2", "0", "4,2", "4,self=2", "4/2/", "4/x"]
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="heads cannot be"):
        decoded(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "self=4",
            "test: heads needs a number for self or cross (got self=4); allowed: a whole number, or self=N,cross=N",
        ),
        ("4/2", "test: heads has 2 numbers for 3 layers (got 4/2); give one for each layer, or one for all"),
    ],
)
def test_a_number_for_each_site_or_a_refusal(text: str, line: str) -> None:
    sites = [Site(layer, kind) for layer in range(3) for kind in ("self", "cross")]
    with pytest.raises(SettingError) as caught:
        decoded(text).by_site(sites, "heads", "test")
    assert str(caught.value) == line


# --- cache arithmetic -----------------------------------------------------------------------------------------------

slots = st.builds(
    Slot,
    storage=st.sampled_from("abcdef"),
    per_token=st.integers(0, 999),
    constant=st.integers(0, 999),
    per_encoder_token=st.integers(0, 999),
    window=st.none() | st.integers(1, 50),
)
specs = st.lists(slots, max_size=8, unique_by=lambda slot: slot.storage).map(lambda found: CacheSpec(tuple(found)))
tokens = st.integers(0, 100)


@given(specs, tokens, tokens, st.integers(1, 9), st.sampled_from([1, 2, 4, 8]))
def test_bytes_are_constant_and_per_token_and_per_encoder_token(
    spec: CacheSpec, seen: int, encoded: int, batch: int, itemsize: int
) -> None:
    expected = 0
    for slot in spec.slots:
        kept = seen if slot.window is None or seen < slot.window else slot.window
        expected += slot.constant + slot.per_token * kept + slot.per_encoder_token * encoded
    assert spec.elements(seen, encoded) == expected
    assert spec.bytes(seen, batch=batch, itemsize=itemsize, encoder_tokens=encoded) == expected * batch * itemsize


@pytest.mark.slow
@given(specs, tokens, tokens)
def test_a_shared_storage_is_counted_once(spec: CacheSpec, seen: int, encoded: int) -> None:
    twice = CacheSpec((*spec.slots, *spec.slots))
    assert twice.elements(seen, encoded) == spec.elements(seen, encoded)
    assert twice.bytes_per_token() == spec.bytes_per_token()


@given(specs, tokens)
def test_one_more_token_adds_as_much_as_the_first_until_a_window_is_full(spec: CacheSpec, seen: int) -> None:
    added, first = spec.bytes(seen + 1) - spec.bytes(seen), spec.bytes(1) - spec.bytes(0)
    full = any(slot.window is not None and slot.window <= seen and slot.per_token for slot in spec.slots)
    assert added < first if full else added == first
    assert abs(spec.bytes_per_token(tokens=seen + 1) * (seen + 1) - spec.bytes(seen + 1)) <= (seen + 1) / 2


def test_the_cache_of_every_kind_of_site() -> None:
    attention = Attention(96, 12, 4, 8)
    shape = model({Site(0, "encoder"): attention, Site(0): attention, Site(0, "cross"): attention})
    cache = grouped_cache(shape)
    assert cache.bytes_per_token(itemsize=2) == 2 * 4 * 8 * 2  # keys and values of the decoder's own attention
    assert cache.bytes(0, encoder_tokens=5, itemsize=2) == 5 * 2 * 4 * 8 * 2  # of its look at the encoder
    assert cache.elements(0) == 0  # an encoder keeps nothing


# --- shapes ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number / n == number // n]


@given(st.sampled_from([(12, 12), (12, 4), (8, 8), (6, 2)]), st.integers(1, 4), st.data())
def test_parameters_follow_the_heads(heads: tuple[int, int], layers: int, data: st.DataObject) -> None:
    shape = of_heads(*heads, layers=layers)
    fewer = data.draw(st.sampled_from(divisors(heads[1])))
    changed = shape.with_sites({site: Attention(96, heads[0], fewer, 8) for site in shape.sites})
    assert changed.parameters == of_heads(heads[0], fewer, layers=layers).parameters
    assert changed.with_sites(shape.sites) == shape


def test_roles_of_an_attention() -> None:
    attention = Attention(96, 12, 4, 8, frozenset("qv"), norms="pre_rope", extra={"gate": (3, 5)})
    assert attention.roles() == {
        "q": (96, 96),
        "k": (32, 96),
        "v": (32, 96),
        "o": (96, 96),
        "q_bias": (96,),
        "v_bias": (32,),
        "q_norm": (8,),
        "k_norm": (8,),
        "gate": (3, 5),
    }
    assert attention.query_group == 3


def test_sites_are_named_for_people() -> None:
    assert [str(Site(3)), str(Site(0, "cross"))] == ["layer 3", "layer 0 (cross)"]
    assert set(get_args(Kind)) == set(KINDS)


def test_requests_say_how_large_their_answers_are() -> None:
    shape, site = of_heads(12, 4), Site(1)
    assert InputGram(site).bytes(shape) == 8 * (96 * 96 + 96)
    assert CrossGram(Site(0), site).bytes(shape) == 8 * 96 * 96
    assert QueryGram(site).bytes(shape) == 8 * 12 * 8 * 8
    assert AttentionGram(site).bytes(shape) == 8 * (96 * 96 + 96)
    assert SampledPairs(site, 10).bytes(shape) == 10 * (4 * (12 + 4) * 8 + 16)


# --- head counts that cannot be -------------------------------------------------------------------------------------


def test_the_message_of_the_house() -> None:
    with pytest.raises(SettingError) as caught:
        gqa.Config(kv_heads=5).check(of_heads(12, 12))
    assert str(caught.value) == (
        "gqa: kv_heads 5 does not divide the 12 query heads of layer 0; choose 1, 2, 3, 4, 6 or 12"
    )


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 50))
def test_a_head_count_is_taken_when_it_divides_and_refused_with_those_that_do(
    kv_heads: int, group: int, wanted: int
) -> None:
    shape = of_heads(kv_heads * group, kv_heads)
    if kv_heads % wanted == 0:
        gqa.Config(kv_heads=wanted).check(shape)
        assert gqa.METHOD.student(gqa.Config(kv_heads=wanted), shape).shape.sites[Site(1)].num_key_value_heads == wanted
        return
    with pytest.raises(SettingError) as caught:
        gqa.Config(kv_heads=wanted).check(shape)
    kind = "query" if group == 1 else "key/value"
    line, _, remedy = str(caught.value).partition("; choose ")
    assert line == f"gqa: kv_heads {wanted} does not divide the {kv_heads} {kind} heads of layer 0"
    offered = [int(word) for word in remedy.replace(" or ", ", ").split(", ")]
    assert offered == divisors(kv_heads)
    for number in offered:
        gqa.Config(kv_heads=number).check(shape)


def test_dtypes_that_families_name_are_known() -> None:
    for family in all_families().values():
        assert family.shape(family.tiny()).dtype in DTYPE_BYTES
