"""The least squares of queries against the dense normal equations, built from one Jacobian in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional as autograd
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbouring
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kvfold.contracts.site import Attention, Rope
from kvfold.disk import spool
from kvfold.errors import OutputError
from kvfold.hf import Attended
from kvfold.repair.queries import LogitFit, Turn

ROWS, LENGTH, HIDDEN, WIDTH = 6, 12, 10, 8
DAMPING = 1e-2


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A teacher's and a student's attention at work on the same rows, and the student's q."""

    teacher: Attention
    student: Attention
    taught: Attended
    learnt: Attended
    q: nn.Linear
    q_norm: Any

    def part(self, first: int, last: int) -> tuple[Attended, Attended]:
        """Some of the rows."""

        def cut(seen: Attended) -> Attended:
            rows = {
                name: getattr(seen, name)[first:last] for name in ("input_BTD", "query_BHTE", "key_BGSE", "heads_BTN")
            }
            return replace(seen, **rows)

        return cut(self.taught), cut(self.learnt)


FULL = Rope(WIDTH, 100.0)


def case(
    *,
    rope: Rope | None = FULL,
    biased: bool = False,
    normed: bool = False,
    window: int | None = None,
    groups: int = 2,
    scales: tuple[float, float] = (0.4, WIDTH**-0.5),
) -> Case:
    """Random keys, and logits large enough that attention looks at some of them and not at others."""
    teacher = Attention(HIDDEN, 4, 4, WIDTH, rope=rope)
    student = replace(teacher, num_key_value_heads=groups, norms="pre_rope" if normed else "none")
    cos = sin = mask = None
    if rope:
        angles_TP = torch.arange(float(LENGTH))[:, None] * rope.theta ** (-torch.arange(0, rope.dims, 2) / rope.dims)
        angles_TE = angles_TP.repeat(1, 2) if rope.half_split else angles_TP.repeat_interleave(2, 1)
        cos, sin = angles_TE.cos(), angles_TE.sin()
    if window:
        ones_TT = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        mask = (ones_TT.tril() & ~ones_TT.tril(-window)).expand(ROWS, 1, LENGTH, LENGTH)
    x_BTD = drawn(ROWS, LENGTH, HIDDEN, seed=1) * torch.linspace(0.3, 2, HIDDEN)

    def seen(heads: int, scale: float, seed: int) -> Attended:
        return Attended(
            x_BTD,
            1.5 * drawn(ROWS, 4, LENGTH, WIDTH, seed=seed),
            drawn(ROWS, heads, LENGTH, WIDTH, seed=seed + 1) + drawn(1, heads, 1, WIDTH, seed=seed + 2),
            mask,
            scale,
            cos,
            sin,
            x_BTD,
            x_BTD,
        )

    q = nn.Linear(HIDDEN, 4 * WIDTH, bias=biased).requires_grad_(False)
    q.weight.copy_(0.3 * drawn(4 * WIDTH, HIDDEN, seed=2))
    if biased:
        q.bias.copy_(drawn(4 * WIDTH, seed=3))
    q_norm: Any = None
    if normed:
        q_norm = LlamaRMSNorm(WIDTH, eps=0).requires_grad_(False)
        q_norm.weight.copy_(1 + 0.3 * drawn(WIDTH, seed=4))
    return Case(teacher, student, seen(4, scales[0], 20), seen(groups, scales[1], 30), q, q_norm)


def solve(made: Case, *, steps: int, batch: int = ROWS, parts: int = ROWS, damping: float = DAMPING) -> Tensor:
    """The student's q afterwards; the case keeps its own."""
    q = copy.deepcopy(made.q)
    with (
        torch.inference_mode(),
        LogitFit(made.teacher, made.student, q, made.q_norm, [LENGTH] * ROWS) as fit,
    ):
        for row in range(0, ROWS, parts):
            fit.add(row, *made.part(row, row + parts))
        batches = [(row, min(batch, ROWS - row)) for row in range(0, ROWS, batch)]
        fit.solve(steps=steps, damping=damping, batches=batches)
    if made.q.bias is not None:
        assert torch.equal(q.bias, made.q.bias)
    return q.weight.double().view(4, WIDTH, HIDDEN)


# --- the same in float64, head by head, from the definition ---------------------------------------------------------


def logits(made: Case, weight_ED: Tensor, head: int) -> Tensor:
    """The student's logits of one head (B, T, S), by transformers' own norm and rotation."""
    x_BTD, learnt = made.learnt.input_BTD.double(), made.learnt
    query_BTE = x_BTD @ weight_ED.T
    if made.q.bias is not None:
        query_BTE = query_BTE + made.q.bias.double()[head * WIDTH : (head + 1) * WIDTH]
    if made.q_norm is not None:
        query_BTE = query_BTE / query_BTE.square().mean(-1, keepdim=True).sqrt() * made.q_norm.weight.double()
    if learnt.cos_TE is not None and learnt.sin_TE is not None:
        dims, cos_TE, sin_TE = learnt.cos_TE.shape[1], learnt.cos_TE.double(), learnt.sin_TE.double()
        turned_B1TE = query_BTE[:, None, :, :dims]
        assert made.student.rope is not None
        turn = apply_rotary_pos_emb if made.student.rope.half_split else neighbouring
        turned_B1TE = turn(turned_B1TE, turned_B1TE, cos_TE[None], sin_TE[None])[0].double()
        query_BTE = torch.cat([turned_B1TE[:, 0], query_BTE[..., dims:]], dim=-1)
    key_BSE = learnt.key_BGSE.double()[:, head // made.student.query_group]
    return learnt.scale * query_BTE @ key_BSE.mT


def visible(made: Case) -> Tensor:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(ROWS, -1, -1)
    return causal if made.learnt.mask is None else made.learnt.mask[:, 0]


def spread(made: Case, head: int, error_BTS: Tensor) -> Tensor:
    """Errors minus their mean under the teacher's attention, times its root: `Var = sum of squares` (B, T, S)."""
    own_BTS = made.taught.scale * made.taught.query_BHTE[:, head].double() @ made.taught.key_BGSE[:, head].double().mT
    p_BTS = own_BTS.masked_fill(~visible(made), -torch.inf).softmax(-1)
    error_BTS = torch.where(visible(made), error_BTS, 0.0)
    return p_BTS.sqrt() * (error_BTS - (p_BTS * error_BTS).sum(-1, keepdim=True))


def wanted(made: Case, head: int) -> Tensor:
    return made.taught.scale * made.taught.query_BHTE[:, head].double() @ made.taught.key_BGSE[:, head].double().mT


def stiffness(made: Case, head: int) -> float:
    """The pull towards where q is: `damping^2` of an input's square times that of a key's coordinate."""
    x = made.learnt.input_BTD.double().square().mean()
    key_BSE = made.learnt.key_BGSE[:, head // made.student.query_group].double()
    return float((DAMPING * made.learnt.scale) ** 2 * x * key_BSE.square().mean())


def dense(made: Case, head: int) -> Tensor:
    """One Gauss-Newton step by lstsq on all (token, key) pairs at once: exact where nothing is normed."""
    before_ED = made.q.weight.double().view(4, WIDTH, HIDDEN)[head]

    def error(weight_ED: Tensor) -> Tensor:
        return spread(made, head, logits(made, weight_ED, head) - wanted(made, head)).flatten()

    jacobian_NW = torch.func.jacrev(error)(before_ED).flatten(1)
    pull = (ROWS * LENGTH * stiffness(made, head)) ** 0.5
    left = torch.cat([jacobian_NW, pull * torch.eye(WIDTH * HIDDEN).double()])
    right = torch.cat([-error(before_ED), torch.zeros(WIDTH * HIDDEN).double()])
    change = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution
    return before_ED + change.view(WIDTH, HIDDEN)


def objective(made: Case, weight_HED: Tensor) -> Tensor:
    """The mean over tokens of the variance of the logits' errors, over heads, with the pull (H,)."""
    before_HED = made.q.weight.double().view(4, WIDTH, HIDDEN)
    found = []
    for head in range(4):
        errors = spread(made, head, logits(made, weight_HED[head], head) - wanted(made, head))
        pull = stiffness(made, head) * (weight_HED[head] - before_HED[head]).square().sum()
        found.append(errors.square().sum() / (ROWS * LENGTH) + pull)
    return torch.stack(found)


CASES: dict[str, Callable[[], Case]] = {
    "plain": case,
    "biased": lambda: case(biased=True),
    "partly rotated": lambda: case(rope=Rope(6, 100.0)),
    "neighbours rotated": lambda: case(rope=Rope(WIDTH, 100.0, half_split=False)),
    "not rotated": lambda: case(rope=None),
    "windowed": lambda: case(window=4),
    "one head of keys": lambda: case(groups=1),
    "normed": lambda: case(normed=True),
    "normed, biased, windowed": lambda: case(normed=True, biased=True, window=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_dense_least_squares(name: str) -> None:
    made = CASES[name]()
    found_HED = solve(made, steps=120)
    before_HED = made.q.weight.double().view(4, WIDTH, HIDDEN)
    for head in range(4):
        expected_ED = dense(made, head)
        off = (found_HED[head] - expected_ED).norm() / (expected_ED - before_HED[head]).norm()
        assert float(off) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "normed" not in name])
def test_no_gradient_is_left(name: str) -> None:
    made = CASES[name]()

    def gradient(weight_HED: Tensor) -> Tensor:
        weight_HED = weight_HED.clone().requires_grad_()
        objective(made, weight_HED).sum().backward()
        assert weight_HED.grad is not None
        return weight_HED.grad.flatten(1).norm(dim=1)

    before_H = gradient(made.q.weight.double().view(4, WIDTH, HIDDEN))
    assert bool((gradient(solve(made, steps=120)) < 1e-4 * before_H).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_few_steps_are_most_of_the_way(name: str) -> None:
    """Of the true objective, which for a normed q is not the one that was solved."""
    made = CASES[name]()
    start_H, six_H, many_H = (
        objective(made, weight_HED)
        for weight_HED in (
            made.q.weight.double().view(4, WIDTH, HIDDEN),
            solve(made, steps=6),
            solve(made, steps=120),
        )
    )
    assert bool((six_H < start_H).all())
    if made.q_norm is None:
        assert bool((start_H - six_H > 0.9 * (start_H - many_H)).all())


def test_no_step_is_no_change() -> None:
    made = case()
    assert torch.equal(solve(made, steps=0), made.q.weight.double().view(4, WIDTH, HIDDEN))


def test_the_window_is_felt() -> None:
    """Or the comparison above would hold for a mask that nobody reads."""
    windowed = case(window=4)
    causal = replace(windowed, learnt=replace(windowed.learnt, mask=None))
    assert float((solve(windowed, steps=120) - solve(causal, steps=120)).abs().max()) > 0.05


def test_batches_do_not_matter() -> None:
    made = case(window=4, normed=True)
    whole_HED = solve(made, steps=6)
    for parts, batch in ((2, 6), (3, 2), (6, 4), (1, 1)):
        torch.testing.assert_close(solve(made, steps=6, parts=parts, batch=batch), whole_HED, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
def test_a_student_that_is_the_teacher_stays_as_it_is(normed: bool) -> None:
    made = case(groups=4, normed=normed, biased=True)
    weight_HED = made.q.weight.double().view(4, WIDTH, HIDDEN)
    scale = made.taught.scale
    query_BHTE = torch.stack(
        [
            torch.linalg.lstsq(
                made.learnt.key_BGSE[:, head].double(), logits(made, weight_HED[head], head).mT / made.learnt.scale
            ).solution.mT
            for head in range(4)
        ],
        dim=1,
    )
    made = replace(
        made,
        taught=replace(made.learnt, query_BHTE=query_BHTE.float() * made.learnt.scale / scale, scale=scale),
    )
    torch.testing.assert_close(solve(made, steps=6), weight_HED, rtol=0, atol=1e-5)


def test_a_student_of_a_stretched_teacher_is_stretched_back() -> None:
    """Keys twice as long, and every logit is to be had by q of half the length; the constant of a row costs nothing."""
    made = case(groups=4, scales=(WIDTH**-0.5, WIDTH**-0.5))
    weight_HED = made.q.weight.double().view(4, WIDTH, HIDDEN)
    query_BHTE = (made.learnt.input_BTD @ made.q.weight.T).view(ROWS, LENGTH, 4, WIDTH).transpose(1, 2)
    assert made.learnt.cos_TE is not None
    assert made.learnt.sin_TE is not None
    query_BHTE, _ = apply_rotary_pos_emb(query_BHTE, query_BHTE, made.learnt.cos_TE[None], made.learnt.sin_TE[None])
    taught = replace(made.learnt, query_BHTE=query_BHTE)
    far_B1E = drawn(ROWS, 4, 1, WIDTH, seed=9)  # added to all keys of a row: each logit of a query moves alike
    for keys_BGSE in (2 * made.learnt.key_BGSE, 2 * made.learnt.key_BGSE + far_B1E):
        stretched = replace(made, taught=taught, learnt=replace(made.learnt, key_BGSE=keys_BGSE))
        found_HED = solve(stretched, steps=120, damping=1e-4)
        torch.testing.assert_close(found_HED, weight_HED / 2, rtol=0, atol=2e-3)


def test_a_norm_over_all_heads_is_differentiated_as_a_whole() -> None:
    """Its derivative and the transpose of that, against autograd through transformers' own norm."""
    made, norm = case(), LlamaRMSNorm(4 * WIDTH, eps=0).requires_grad_(False).double()
    norm.weight.copy_(1 + 0.3 * drawn(4 * WIDTH, seed=4))
    own, change, pulled = (drawn(ROWS, 4, LENGTH, WIDTH, seed=seed).double() for seed in (5, 6, 7))
    cos_TE, sin_TE = made.learnt.cos_TE, made.learnt.sin_TE
    assert cos_TE is not None
    assert sin_TE is not None

    def whole(own_BHTE: Tensor) -> Tensor:
        heads_BHTE = norm(own_BHTE.transpose(1, 2).flatten(2)).view(ROWS, LENGTH, 4, WIDTH).transpose(1, 2)
        turned: Tensor = apply_rotary_pos_emb(heads_BHTE, heads_BHTE, cos_TE[None], sin_TE[None])[0]
        return turned

    turn, close = (
        Turn(made.learnt, made.student.rope, norm, own),
        {"rtol": 1e-4, "atol": 1e-5},
    )  # the norm computes in float32
    torch.testing.assert_close(turn.whole(own), whole(own), **close)
    torch.testing.assert_close(turn.change(change), autograd.jvp(whole, own, change)[1], **close)
    torch.testing.assert_close(turn.back(pulled), autograd.vjp(whole, own, pulled)[1], **close)


@pytest.mark.parametrize("saturated", [slice(0, 1), slice(0, 4)])
@pytest.mark.parametrize("normed", [False, True])
def test_a_head_that_looks_at_one_key_stays_as_it_is(saturated: slice, normed: bool) -> None:
    """Its attention is 0 and 1 to the bit, and no logit's error has a price."""
    made = case(normed=normed)
    made.taught.query_BHTE[:, saturated] *= 1e5
    found_HED, before_HED = solve(made, steps=6), made.q.weight.double().view(4, WIDTH, HIDDEN)
    assert bool(found_HED.isfinite().all())
    torch.testing.assert_close(found_HED[saturated], before_HED[saturated], rtol=0, atol=1e-5)
    assert not torch.allclose(found_HED[saturated.stop :], before_HED[saturated.stop :]) or saturated.stop == 4


def test_room_is_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokens = case(), ROWS * LENGTH
    needed = 4 * tokens * (HIDDEN + 2 * WIDTH + 4 * WIDTH + 4 * LENGTH)  # inputs, shared keys, their means, attention
    monkeypatch.setattr(spool, "free_bytes", lambda path: needed)
    solve(made, steps=1)
    monkeypatch.setattr(spool, "free_bytes", lambda path: needed - 1)
    with pytest.raises(OutputError, match=f"got {needed:,} bytes"):
        solve(made, steps=1)
