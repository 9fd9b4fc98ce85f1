"""Loss, KL and agreement against transformers' own loss, brute force, and torch.distributions."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvfold import hf
from kvfold.evaluate import loss
from kvfold.families import all_families


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Two models that agree on some tokens: the teacher's head is the student's with noise."""
    student = hf.build({**all_families()["llama"].tiny(), "initializer_range": 0.3}, seed=0).eval()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        head = teacher.lm_head.weight
        head += 0.2 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    return {"student": student, "teacher": teacher}


@pytest.fixture(scope="module", name="ids_N")
def _ids() -> Tensor:
    return torch.randint(0, 96, (65,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def scored(models: dict[str, nn.Module], ids_N: Tensor, **settings: Any) -> dict[str, Tensor]:
    return loss.score(models, ids_N, **{"length": 16, "stride": 16, "batch_size": 3, **settings})


def per_token(sums: dict[str, Tensor], key: str) -> float:
    return float(sums[key].sum() / sums["tokens"].sum())


@given(tokens=st.integers(1, 300), length=st.integers(1, 64), share=st.floats(0, 1))
def test_windows_count_every_token_once_with_its_context(tokens: int, length: int, share: float) -> None:
    stride = max(1, round(share * length))
    counted = []
    for number, (begin, count) in enumerate(loss.windows(tokens, length, stride)):
        end = begin + min(length, tokens)
        assert begin >= 0
        assert end <= tokens
        counted += range(end - count, end)
        if number:
            assert count <= stride
            assert end - count - begin >= length - stride  # what lies before the first token that counts
    assert counted == list(range(tokens))


@torch.no_grad()
def test_loss_is_that_of_transformers_on_windows_that_do_not_overlap(
    models: dict[str, nn.Module], ids_N: Tensor
) -> None:
    student = models["student"]
    theirs = [student(ids_N[None, b : b + 17], labels=ids_N[None, b : b + 17]).loss.item() for b in range(0, 64, 16)]
    sums = scored({"student": student}, ids_N)
    assert sums["tokens"].tolist() == [16] * 4
    assert (sums["student"] / 16).tolist() == pytest.approx(theirs, rel=1e-5)
    found = loss.summary(sums, "student", text_bytes=100)
    assert found["loss"] == pytest.approx(sum(theirs) / 4, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(theirs) / 4), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(64 * sum(theirs) / 4 / math.log(2) / 100, rel=1e-5)
    assert found["loss_stderr"] == pytest.approx(torch.tensor(theirs).std().item() / 2, rel=1e-4)


@pytest.mark.parametrize("stride", [1, 5, 16])
@torch.no_grad()
def test_sliding_window_is_brute_force(models: dict[str, nn.Module], ids_N: Tensor, stride: int) -> None:
    """Each token by itself, in the context that the stated stride gives it."""
    ids_N, length = ids_N[:40], 16
    student, lost = models["student"], 0.0
    for token in range(1, len(ids_N)):
        beyond = max(0, token - length)  # tokens past the first window
        end = min(length + math.ceil(beyond / stride) * stride, len(ids_N) - 1)
        context_T = ids_N[max(0, end - length) : token]
        if stride == 1:
            assert len(context_T) == min(token, length)
        lost -= float(student(context_T[None]).logits[0, -1].log_softmax(-1)[ids_N[token]])
    assert per_token(scored({"student": student}, ids_N, stride=stride), "student") == pytest.approx(
        lost / (len(ids_N) - 1), rel=1e-5
    )


@torch.no_grad()
def test_kl_and_agreement_are_those_of_torch(models: dict[str, nn.Module], ids_N: Tensor) -> None:
    logits = {who: model(ids_N[:-1].view(4, 16)).logits.double() for who, model in models.items()}
    p, q = (torch.distributions.Categorical(logits=logits[who]) for who in ("teacher", "student"))
    sums = scored(models, ids_N)
    assert per_token(sums, "kl") == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(), rel=1e-4)
    same = (p.probs.argmax(-1) == q.probs.argmax(-1)).double().mean().item()
    assert 0 < same < 1
    assert per_token(sums, "agreement") == same
    assert per_token(sums, "teacher") == pytest.approx(-p.log_prob(ids_N[1:].view(4, 16)).mean().item(), rel=1e-5)
    found = loss.distance(sums)
    assert found["loss_gap"] == pytest.approx(per_token(sums, "student") - per_token(sums, "teacher"), rel=1e-9)
    gaps = (sums["student"] - sums["teacher"]) / 16
    assert found["loss_gap_stderr"] == pytest.approx(gaps.std().item() / 2, rel=1e-9)


@torch.no_grad()
def test_a_model_is_no_distance_from_itself(models: dict[str, nn.Module], ids_N: Tensor) -> None:
    found = loss.distance(scored({"student": models["student"], "teacher": models["student"]}, ids_N, stride=7))
    assert found == {"loss_gap": 0.0, "loss_gap_stderr": 0.0, "kl": 0.0, "agreement": 1.0}


def test_batches_and_chunks_change_nothing(
    models: dict[str, nn.Module], ids_N: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(models, ids_N, stride=5, batch_size=64)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 96 * 3)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 96 * 16 * 2)
    parts = scored(models, ids_N, stride=5, batch_size=64)
    for key, sums_W in whole.items():
        torch.testing.assert_close(parts[key], sums_W, rtol=1e-5, atol=1e-5)


class Seen(nn.Module):
    """A model that predicts nothing, and notes how large a batch it was given."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.seen: list[tuple[int, int]] = []

    def forward(self, ids_BT: Tensor, **options: Any) -> SimpleNamespace:
        self.seen.append(tuple(ids_BT.shape))
        return SimpleNamespace(logits=torch.zeros(*ids_BT.shape, self.config.vocab_size))


def test_a_batch_is_cut_where_its_logits_would_not_fit(ids_N: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 96 * 16 * 2 + 1)
    model = Seen(96)
    sums = scored({"student": model}, ids_N, batch_size=64)
    assert model.seen == [(2, 16), (2, 16)]
    assert per_token(sums, "student") == pytest.approx(math.log(96), rel=1e-6)


def test_half_precision_logits_are_scored_in_single() -> None:
    logits_NV = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
    targets_N = torch.arange(50)
    found = loss.token_scores(logits_NV, logits_NV * 2, targets_N=targets_N)
    wanted = nn.functional.cross_entropy(logits_NV.double(), targets_N, reduction="none")
    assert found["student"].dtype == torch.float32
    torch.testing.assert_close(found["student"].double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_text_shorter_than_a_window_is_one_window(models: dict[str, nn.Module], ids_N: Tensor) -> None:
    sums = scored(models, ids_N[:6])
    assert sums["tokens"].tolist() == [5]
    assert loss.summary(sums, "student", 5)["loss_stderr"] is None


def test_a_loss_beyond_all_floats_still_has_a_summary() -> None:
    sums = {"student": torch.tensor([1e6, 1e6]), "tokens": torch.tensor([10.0, 10.0])}
    assert math.isfinite(loss.summary(sums, "student", 20)["perplexity"])
