"""Linear attention with a window, against weights written out one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.attention import linear
from kvfold.attention.linear import Past, Sinks, Sums, Weights, absorbed, decode, linear_attention, slopes

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass
class Case:
    """One way to mix the parts: query heads, key heads, widths, and what is switched on."""

    heads: int = 4
    groups: int = 2
    window: int = 0
    sinks: int = 0
    normalised: bool = True
    decay: str | None = None
    gate: bool = False
    features: bool = True
    signed: bool = False  # features of either sign, as rotation after them makes


CASES = {
    "plain": Case(),
    "supra": Case(normalised=False, decay="slopes", signed=True),
    "retnet": Case(normalised=False, decay="retnet", signed=True),
    "windowed": Case(window=5),
    "hybrid": Case(window=4, sinks=3, gate=True),
    "forgetting": Case(window=3, sinks=2, gate=True, decay="slopes"),
    "alone": Case(window=6, sinks=2, features=False),
    "many heads": Case(heads=6, groups=6, window=1, gate=True),
    "one key head": Case(heads=3, groups=1, window=2, sinks=1),
}


def drawn(
    case: Case, tokens: int, dtype: torch.dtype, seed: int = 0, padding: tuple[int, ...] = (0, 0)
) -> dict[str, Any]:
    """Random inputs, and which tokens are padding, which are sinks."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = len(padding)
    phi = [noise(batch, heads, tokens, 5) for heads in (case.heads, case.groups)]
    decay = None if case.decay is None else torch.tensor(slopes(case.decay, case.groups), dtype=dtype)  # type: ignore[arg-type]
    at_BN = torch.tensor(padding)[:, None] + torch.arange(case.sinks)
    seen_BS = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    free_BS = seen_BS & (torch.arange(tokens) >= at_BN.amax(1, keepdim=True) + 1 if case.sinks else seen_BS)
    return {
        "q": noise(batch, case.heads, tokens, 6),
        "k": noise(batch, case.groups, tokens, 6),
        "v": noise(batch, case.groups, tokens, 7),
        "phi_q": phi[0] if case.signed else phi[0].abs(),
        "phi_k": phi[1] if case.signed else phi[1].abs(),
        "gate": 0.2 + noise(case.heads).abs() if case.gate else None,
        "decay": decay,
        "at": at_BN,
        "seen": seen_BS,
        "free": free_BS,
    }


def textbook(case: Case, given: dict[str, Any]) -> Tensor:
    """Every weight by itself, `o_BHTE`; rows of padding are left at 0."""
    q, k, v, phi_q, phi_k = (given[name] for name in ("q", "k", "v", "phi_q", "phi_k"))
    batch, heads, tokens, width = q.shape
    rows = []
    for row in range(batch):
        first = int(given["seen"][row].long().argmax())
        for head in range(heads):
            group = head // (heads // case.groups)
            for token in range(tokens):
                near, far = [], []
                for other in range(first, token + 1):
                    is_near = token - other < case.window or (case.window and other < first + case.sinks)
                    (near if is_near else far).append(other)
                top, bottom = v.new_zeros(v.shape[-1]), v.new_zeros(())
                if near:
                    z = torch.stack([q[row, head, token] @ k[row, group, j] / math.sqrt(width) for j in near])
                    weight = (z - z.max()).exp() * (1 if given["gate"] is None else given["gate"][head])
                    top, bottom = top + weight @ v[row, group, near], bottom + weight.sum()
                for other in far if case.features else []:
                    share = phi_q[row, head, token] @ phi_k[row, group, other]
                    if given["decay"] is not None:
                        share = share * (given["decay"][group] * (token - other)).exp()
                    top, bottom = top + share * v[row, group, other], bottom + share
                rows.append(top / bottom if case.normalised and token >= first else top)
    return torch.stack(rows).view(batch, heads, tokens, -1)


def weights_of(case: Case, given: dict[str, Any]) -> Weights:
    return Weights(case.window, case.normalised, 1 / math.sqrt(6), given["decay"], given["gate"])


def sinks_of(case: Case, given: dict[str, Any], start: int = 0) -> Sinks | None:
    """The first tokens of each row that are no padding, counted from `start`."""
    if not case.sinks:
        return None
    at = given["at"][:, None, :, None].clamp_max(given["k"].shape[2] - 1)
    k, v = (given[name].gather(2, at.expand(-1, case.groups, -1, given[name].shape[-1])) for name in ("k", "v"))
    return Sinks(k, v, given["at"] - start)


def computed(case: Case, given: dict[str, Any]) -> Tensor:
    keys = max(given["k"].shape[2] - case.window, 0)
    phi = (given["phi_q"], given["phi_k"][:, :, :keys]) if case.features else (None, None)
    return linear_attention(
        given["q"],
        given["k"],
        given["v"],
        *phi,
        weights_of(case, given),
        Past(None, sinks_of(case, given), given["free"]),
    )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts have many."""
    monkeypatch.setattr(linear, "CHUNK", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 17])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_textbook_with_gradients(name: str, tokens: int, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = drawn(case, tokens, dtype)
    learns = [key for key in ("q", "k", "v", "phi_q", "phi_k", "gate") if given[key] is not None]
    for key in learns:
        given[key].requires_grad_(True)
    expected = textbook(case, given)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = torch.autograd.grad((expected * probe).sum(), [given[key] for key in learns], allow_unused=True)
    found = computed(case, given)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    got = torch.autograd.grad((found * probe).sum(), [given[key] for key in learns], allow_unused=True)
    for key, one, other in zip(learns, got, wanted, strict=True):
        one, other = (torch.zeros_like(given[key]) if each is None else each for each in (one, other))
        scale = float(other.abs().max().clamp_min(1))
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, msg=key)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CASES)
def test_padding_on_the_left_is_not_there(name: str) -> None:
    case = CASES[name]
    given = drawn(case, 23, torch.float64, padding=(0, 6, 13))
    expected = textbook(case, given)
    found = computed(case, given)
    assert found.isfinite().all()
    for row, padding in enumerate((0, 6, 13)):
        torch.testing.assert_close(found[row, :, padding:], expected[row, :, padding:], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", CASES)
def test_a_text_in_parts_is_the_text(name: str) -> None:
    """Sums are carried from a prompt to more tokens, and from there token by token."""
    case, tokens = CASES[name], 27
    given = drawn(case, tokens, torch.float64)
    expected, weights = textbook(case, given), weights_of(case, given)
    sums: Sums | None = None
    kept, done, parts = 0, 0, []  # tokens in the sums; tokens read
    for count in (11, 2, 9, *[1] * 5):
        end = done + count
        start = kept
        window = max(end - case.window, start)  # what is absorbed after this part

        def at(name: str, first: int, last: int) -> Tensor:
            found: Tensor = given[name][:, :, first:last]
            return found

        phi_q = at("phi_q", done, end) if case.features else None
        phi_k = at("phi_k", start, window) * given["free"][:, None, start:window, None] if case.features else None
        if count == 1:
            if phi_k is not None:
                sums = absorbed(sums, phi_k, at("v", start, window), weights)
            past = Past(sums, sinks_of(case, given, window), given["free"][:, window:end])
            parts.append(decode(at("q", done, end), at("k", window, end), at("v", window, end), phi_q, weights, past))
        else:
            past = Past(sums, sinks_of(case, given, start), given["free"][:, start:end])
            keys = at("k", start, end), at("v", start, end)
            parts.append(linear_attention(at("q", done, end), *keys, phi_q, phi_k, weights, past))
            if phi_k is not None:
                sums = absorbed(sums, phi_k, at("v", start, window), weights)
        kept, done = window, end
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=1e-9, atol=1e-9)


def test_a_window_over_the_whole_text_is_softmax_attention() -> None:
    case = Case(window=29, gate=True)
    given = drawn(case, 29, torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(computed(case, given), expected, rtol=1e-12, atol=1e-12)


def test_slopes_are_the_published_ones() -> None:
    """Of 32 heads, SUPRA's shipped configuration (research notes of its code)."""
    gamma = [math.exp(each) for each in slopes("slopes", 32)]
    assert [round(gamma[head - 1], 4) for head in (1, 8, 16, 24, 32)] == [0.4313, 0.7788, 0.9394, 0.9845, 0.9961]
    assert [round(math.exp(each), 6) for each in slopes("retnet", 3)] == [0.96875, 0.984375, 0.992188]
    assert len(slopes("slopes", 3)) == 3  # no power of two


def test_bfloat16_under_autocast_stays_near() -> None:
    case = CASES["hybrid"]
    given = drawn(case, 150, torch.float32)
    expected = computed(case, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(case, given)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().max()) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-linear-attention's kernels run on a GPU alone")
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_chunked_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    case = CASES[name]
    given = {
        key: each.cuda() if isinstance(each, Tensor) else each for key, each in drawn(case, 200, torch.float32).items()
    }
    assert linear.kernels(given["q"].device) is not None
    found = computed(case, given)
    monkeypatch.setattr(linear, "kernels", lambda device: None)
    torch.testing.assert_close(found, computed(case, given), rtol=1e-2, atol=1e-2)
