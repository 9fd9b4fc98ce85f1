"""What heads and folds cost on rows that end in a copy: against hooked models, students, and a planted circuit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits import HEADS, VOCABULARY, planted
from kvfold import hf
from kvfold.calibrate.decoder import calibrate
from kvfold.calibrate.recall import copies
from kvfold.calibrate.sensitivity import COPY_LENGTH, measure
from kvfold.contracts.requests import COPIED, AblatedKL, AblatedRecall, FoldedRecall, HeadKL, Question
from kvfold.contracts.site import Site
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.methods import gqa
from kvfold.text.copies import SPAN
from kvfold.text.tokens import TokenFile

Make = Callable[..., Path]
ONE = gqa.Config(gqa.PerSite.parse(1), weigh="ablation")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


def token_file(vocabulary: int = 96) -> TokenFile:
    ids = np.random.default_rng(0).integers(3, vocabulary, 600).astype(np.uint32)
    return TokenFile(Path("text"), ids, vocabulary, "text", "text")


def copied_rows(vocabulary: int = 96, count: int = COPIED[FoldedRecall]) -> Tensor:
    rows_BT = copies(token_file(vocabulary), COPY_LENGTH, count)
    assert torch.equal(rows_BT[:, :SPAN], rows_BT[:, -SPAN:])
    return rows_BT


def copy_loss(model: Any, count: int = COPIED[FoldedRecall]) -> float:
    """Mean loss of the second occurrence, token by token, but for its first."""
    rows_BT = copied_rows(model.config.vocab_size, count)
    log_p_BTV = model(rows_BT).logits.double().log_softmax(-1)
    at_T = range(rows_BT.shape[1] - SPAN + 1, rows_BT.shape[1])
    return -float(np.mean([log_p_BTV[row, at - 1, ids_T[at]] for row, ids_T in enumerate(rows_BT) for at in at_T]))


# --- against whole forward passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_what_a_head_is_worth_is_what_a_hooked_teacher_lacks(tiny_checkpoint: Make, family: str) -> None:
    teacher = tiny_checkpoint(family, tokenizer=False, num_hidden_layers=2, num_key_value_heads=2)
    source, model = Checkpoint.open(teacher), hf.load(teacher, dtype="float64")
    heads = [(Site(1), 1), (Site(0), 0)]
    questions = [kind(*head) for kind in (HeadKL, AblatedKL, AblatedRecall) for head in heads]
    found = measure(source, gqa.METHOD, ONE, questions, {}, token_file())
    attention = source.shape.sites[Site(0)]

    def averaged(head: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def before(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            heads_BTHE = given[0].unflatten(-1, (attention.num_attention_heads, attention.head_dim)).clone()
            for reader in range(head * attention.query_group, (head + 1) * attention.query_group):
                for row_THE in heads_BTHE:
                    row_THE[:, reader] = row_THE[:, reader].sum(0) / len(row_THE)
            return (heads_BTHE.flatten(2),)

        return before

    copied_BT, text_BT = copied_rows(count=COPIED[HeadKL]), spread_rows(token_file())
    with torch.inference_mode():
        whole = [model(rows_BT).logits.log_softmax(-1) for rows_BT in (copied_BT, text_BT)]
        before = copy_loss(model, COPIED[AblatedRecall])
        for head in heads:
            output = model.get_submodule(f"model.layers.{head[0].layer}.self_attn.o_proj")
            handle = output.register_forward_pre_hook(averaged(head[1]))
            for kind, p_BTV, rows_BT in zip((HeadKL, AblatedKL), whole, (copied_BT, text_BT), strict=True):
                expected = float((p_BTV.exp() * (p_BTV - model(rows_BT).logits.log_softmax(-1))).sum(-1).mean())
                assert expected > 1e-5  # or the comparison would say little
                assert found[kind(*head)]["kl"].item() == pytest.approx(expected, rel=1e-3)
            rise = copy_loss(model, COPIED[AblatedRecall]) - before
            handle.remove()
            assert abs(rise) > 1e-4
            assert found[AblatedRecall(*head)]["rise"].item() == pytest.approx(rise, rel=1e-2, abs=1e-5)


def spread_rows(tokens: TokenFile) -> Tensor:
    """Two rows of 256 of 600 tokens: the first and the last."""
    return torch.stack([torch.from_numpy(tokens.tokens[at : at + 256].astype("int64")) for at in (0, 344)])


def test_the_recall_of_a_fold_is_that_of_a_student(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False, num_hidden_layers=2)
    question = FoldedRecall(Site(1), 1)
    mean = replace(ONE, init="mean")
    found = measure(Checkpoint.open(teacher), gqa.METHOD, mean, [question], {}, token_file())
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "4/1", "init": "mean"})
    with torch.inference_mode():
        expected = copy_loss(hf.load(student)) - copy_loss(hf.load(teacher))
    assert abs(expected) > 1e-4
    assert found[question]["rise"].item() == pytest.approx(expected, rel=1e-2)


# --- a planted induction circuit -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_planted_circuit_is_found_and_kept(tiny_checkpoint: Make) -> None:
    source = Checkpoint.open(planted(tiny_checkpoint))
    with torch.inference_mode():
        assert copy_loss(hf.load(source.path)) < 3.0  # of log 2000 = 7.6: it copies
    heads = [HeadKL(Site(layer), head) for layer in range(2) for head in range(HEADS)]
    assert set(heads) <= set(gqa.METHOD.needs(ONE, source.shape))
    asked: list[Question] = list(gqa.METHOD.needs(replace(ONE, weigh="uniform"), source.shape))
    answers = calibrate(source, asked, token_file(VOCABULARY))  # type: ignore[arg-type]
    found = measure(source, gqa.METHOD, ONE, heads, {}, token_file(VOCABULARY))
    best = sorted(heads, key=lambda head: -float(found[head]["kl"]))
    assert set(best[:2]) == {HeadKL(Site(0), 1), HeadKL(Site(1), 2)}
    assert found[best[1]]["kl"] > 10 * found[best[2]]["kl"]
    fold = FoldedRecall(Site(1), 1)
    uniform = measure(source, gqa.METHOD, replace(ONE, weigh="uniform"), [fold], answers, token_file(VOCABULARY))
    weighed = measure(source, gqa.METHOD, ONE, [fold], {**answers, **found}, token_file(VOCABULARY))
    assert uniform[fold]["rise"] > 2.0
    assert weighed[fold]["rise"] < 0.3
