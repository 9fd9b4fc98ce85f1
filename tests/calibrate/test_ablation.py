"""What heads and folds cost on rows that end in a copy: against hooked models, students, and a planted circuit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvfold import hf
from kvfold.calibrate.decoder import calibrate
from kvfold.calibrate.recall import copies
from kvfold.calibrate.sensitivity import COPY_LENGTH, measure
from kvfold.contracts.requests import COPIED, FoldedRecall, HeadKL, Question
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


def copy_loss(model: Any) -> float:
    """Mean loss of the second occurrence, token by token, but for its first."""
    rows_BT = copied_rows(model.config.vocab_size)
    log_p_BTV = model(rows_BT).logits.double().log_softmax(-1)
    at_T = range(rows_BT.shape[1] - SPAN + 1, rows_BT.shape[1])
    return -float(np.mean([log_p_BTV[row, at - 1, ids_T[at]] for row, ids_T in enumerate(rows_BT) for at in at_T]))


# --- against whole forward passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_the_kl_of_a_head_is_that_of_a_hooked_teacher(tiny_checkpoint: Make, family: str) -> None:
    teacher = tiny_checkpoint(family, tokenizer=False, num_hidden_layers=2, num_key_value_heads=2)
    source, model = Checkpoint.open(teacher), hf.load(teacher, dtype="float64")
    questions = [HeadKL(Site(1), 1), HeadKL(Site(0), 0)]
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

    rows_BT = copied_rows(count=COPIED[HeadKL])
    with torch.inference_mode():
        p_BTV = model(rows_BT).logits.log_softmax(-1)
        for each in questions:
            output = model.get_submodule(f"model.layers.{each.site.layer}.self_attn.o_proj")
            handle = output.register_forward_pre_hook(averaged(each.head))
            q_BTV = model(rows_BT).logits.log_softmax(-1)
            handle.remove()
            expected = float((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).mean())
            assert expected > 1e-5  # or the comparison would say little
            assert found[each]["kl"].item() == pytest.approx(expected, rel=1e-3)


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

VOCABULARY = 2000  # so that few tokens occur twice in a row by chance
CODE, WIDTH, HEADS, HIDDEN, SLOW = 24, 64, 4, 128, 20
TOKEN, BEFORE, NEXT = (slice(CODE * part, CODE * (part + 1)) for part in range(3))  # of the residual stream
ALWAYS, NOISE = 3 * CODE, slice(3 * CODE + 1, HIDDEN)


def planted(tiny_checkpoint: Make) -> Path:
    """Head 1 of layer 0 attends to the token before, head 2 of layer 1 to what followed the same token before.

    A token is a code of signs in its part of the residual stream. The other heads are noise, larger than the circuit,
    and neither its heads nor the output read what they write.
    """
    folder = tiny_checkpoint(
        "llama",
        tokenizer=False,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        hidden_size=HIDDEN,
        head_dim=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
    )
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    codes_VC = torch.randn(VOCABULARY, CODE, generator=generator).sign()
    embedding_VD = tensors["model.embed_tokens.weight"]
    embedding_VD[:, TOKEN], embedding_VD[:, ALWAYS] = codes_VC, 4.0
    embedding_VD[:, NOISE] = torch.randn(VOCABULARY, HIDDEN - ALWAYS - 1, generator=generator).sign()  # of one norm
    tensors["lm_head.weight"][:, NEXT] = codes_VC
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1.0)
    planes = torch.arange(WIDTH // 2)
    slow = torch.cat([planes[SLOW:], planes[SLOW:] + WIDTH // 2])  # these hardly turn over a row
    for layer, planted_head in ((0, 1), (1, 2)):
        prefix = f"model.layers.{layer}.self_attn."
        q, k, v = (tensors[f"{prefix}{role}_proj.weight"].view(HEADS, WIDTH, HIDDEN) for role in "qkv")
        o = tensors[f"{prefix}o_proj.weight"].view(HIDDEN, HEADS, WIDTH)
        for head in set(range(HEADS)) - {planted_head}:
            for weight in (q, k, v):
                weight[head, :, NOISE] = torch.randn(WIDTH, HIDDEN - ALWAYS - 1, generator=generator)
            o[NOISE, head] = torch.randn(HIDDEN - ALWAYS - 1, WIDTH, generator=generator) / (32 if layer else 256)
        v[planted_head, :CODE, TOKEN] = torch.eye(CODE)
        if layer == 0:
            turn_P = 10_000.0 ** (-planes / len(planes))
            q[planted_head, :, ALWAYS] = 5 * torch.cat([turn_P.cos(), -turn_P.sin()])
            k[planted_head, : len(planes), ALWAYS] = 5
            o[BEFORE, planted_head, :CODE] = torch.eye(CODE)
        else:
            q[planted_head, slow, TOKEN] = 5 * torch.eye(CODE)
            k[planted_head, slow, BEFORE] = 5 * torch.eye(CODE)
            o[NEXT, planted_head, :CODE] = 2 * torch.eye(CODE)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
