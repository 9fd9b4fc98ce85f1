"""Training encoder-decoders: the loss is the model's own, runs go on to the bit, Adafactor is as published."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from examples import paired
from kvfold import hf
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import DataError, SettingError
from kvfold.families import all_families
from kvfold.text.pairs import UNSEEN, Pairs, corpus, start_id
from kvfold.text.tokens import token_file
from kvfold.train import losses as objectives
from kvfold.train.loop import make_optimizer
from kvfold.train.placing import prepare
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.settings import TrainSettings, rate
from kvfold.train.uptrain import UptrainSettings, objective, uptrain

Make = Callable[..., Path]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 40
SMALL: dict[str, Any] = {"sequence_length": 32, "batch_size": 4, "precision": "fp32"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{'abcdefgh'[n % 8] * (1 + n % 5)}\t{n:b}\n" for n in range(24)))
    return path


@pytest.fixture
def student(tiny_checkpoint: Make, tmp_path: Path) -> Path:
    return convert(tiny_checkpoint("t5"), tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("t5", {}),
        ("t5", {"tie_word_embeddings": False}),
        ("bart", {}),
        *paired().values(),
        ("t5gemma", {}),
        ("t5gemma", {"tie_word_embeddings": False, "initializer_range": 2.0}),
    ],
    ids=str,
)
def test_hidden_states_and_head_are_the_models_logits(family: str, changes: dict[str, Any]) -> None:
    model: Any = hf.build({**all_families()[family].tiny(), **changes}, seed=0, attention=hf.ATTENTION).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.linspace(-1, 1, 96))
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    target = ids.flip(1)[:, :6].clone()
    target[1, 4:] = UNSEEN
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[2, 5:] = False
    batch = Pairs(ids, seen, target)
    with torch.no_grad():
        begun = batch.shifted(start_id(model.config))  # mBART's own labels would begin with their last token
        expected = model(input_ids=ids, attention_mask=seen, decoder_input_ids=begun, labels=target)
        h_BTD = objectives.hidden_states(model, batch)
    counts = target != UNSEEN  # behind the end a model reads what it likes
    torch.testing.assert_close(objectives.Head.of(model).logits(h_BTD)[counts], expected.logits[counts])
    evaluate = objective(model, None, {"ce": 1.0}, (), UptrainSettings(data="x", tokens=1))
    torch.testing.assert_close(evaluate(batch)[0], expected.loss)
    guided = objective(model, model, {"kl": 1.0}, (), UptrainSettings(data="x", tokens=1))
    torch.testing.assert_close(guided(batch)[0].detach(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_kl_counts_targets_and_no_padding() -> None:
    config = all_families()["t5"].tiny()
    model, teacher = (hf.build(config, seed=seed, attention=hf.ATTENTION).eval() for seed in (0, 1))
    target = torch.tensor([[5, 6, 7, 1], [8, 1, UNSEEN, UNSEEN]])
    batch = Pairs(torch.tensor([[4, 5, 6], [7, 8, 1]]), torch.ones(2, 3, dtype=torch.bool), target)
    found = objective(model, teacher, {"kl": 1.0}, (), UptrainSettings(data="x", tokens=1))(batch)[0]
    ours, theirs = (
        each(input_ids=batch.input_BS, labels=target).logits.log_softmax(-1)[target != UNSEEN]
        for each in (model, teacher)
    )
    torch.testing.assert_close(found, (theirs.exp() * (theirs - ours)).sum(-1).mean())


# --- uptraining -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "kl", "attention"])
def test_a_student_learns_from_text(loss: str, student: Path, text: Path, tmp_path: Path) -> None:
    settings = UptrainSettings(data=str(text), tokens=32 * 4 * 30, loss=loss, log_every=1, learning_rate=3e-3, **SMALL)
    out = uptrain(student, tmp_path / "out", settings)
    losses = [line["loss"] for line in log(out)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert hf.load(out).config.model_type == "kvfold_t5"  # type: ignore[union-attr]
    before, after = load_file(student / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: each.shape for name, each in before.items()} == {name: each.shape for name, each in after.items()}
    step = (Checkpoint.open(out).lineage or {})["steps"][-1]
    assert (step["stage"], step["tokens"], step["settings"]["loss"]) == ("uptrain", 32 * 4 * 30, loss)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_run_that_broke_off_ends_as_if_it_had_not(
    optimizer: Any, student: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = UptrainSettings(
        data=str(pairs), tokens=32 * 4 * 8, loss="ce", optimizer=optimizer, checkpoint_steps=3, dropout=0.1, **SMALL
    )
    whole = uptrain(student, tmp_path / "whole", settings)
    calls, real = [0], objectives.hidden_states

    def broken(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyError("broke off")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "hidden_states", broken)
        with pytest.raises(KeyError):
            uptrain(student, tmp_path / "out", settings)
    again = uptrain(student, tmp_path / "out", settings)
    one, other = (load_file(path / "model.safetensors") for path in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_alpha_counts_the_tokens_of_the_pretraining(text: Path, tmp_path: Path) -> None:
    teacher = _pretrained(text, tmp_path)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 1})
    settings = UptrainSettings(data=str(text), alpha=0.25, **SMALL)
    out = uptrain(student, tmp_path / "out", settings, teacher=teacher)
    assert (Checkpoint.open(out).lineage or {})["steps"][-1]["tokens"] == 32 * 4 * 5


def test_text_sampled_from_the_teacher_is_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="only a decoder can sample text"):
        uptrain(student, tmp_path / "out", UptrainSettings(data="self", tokens=128, **SMALL))
    assert not (tmp_path / "out").exists()


# --- pre-training ---------------------------------------------------------------------------------------------------


def _pretrained(text: Path, tmp_path: Path, **changes: Any) -> Path:
    config = {**all_families()["t5"].tiny(), "vocab_size": 400, "tie_word_embeddings": False, **changes}
    settings = PretrainSettings(data=str(text), tokens=32 * 4 * 20, **SMALL)
    return pretrain(config, tmp_path / "teacher", settings)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_pretrain_makes_a_t5_that_stock_transformers_loads(tied: bool, text: Path, tmp_path: Path) -> None:
    made = _pretrained(text, tmp_path, tie_word_embeddings=tied)
    stock, events = AutoModelForSeq2SeqLM.from_pretrained(made, output_loading_info=True)
    assert not any(events[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (stock.lm_head.weight is stock.shared.weight) == tied
    source = Checkpoint.open(made)
    assert sum(source.spec(name).numel for name in source.names()) == source.shape.parameters
    ids = torch.arange(10, 30)[None]
    ours: Any = hf.load(made)
    with torch.inference_mode():
        expected = stock.eval()(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids, decoder_input_ids=ids).logits, expected)
    tokenizer = hf.load_tokenizer(made)
    assert tokenizer.decode(tokenizer.encode("shoures soote")) == "shoures soote"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert hf.generate(ours, ids, max_new_tokens=4).shape[1] <= 5


@pytest.mark.slow
def test_the_tokenizer_can_know_another_text(text: Path, tmp_path: Path) -> None:
    config = {**all_families()["t5"].tiny(), "vocab_size": 400}
    other = tmp_path / "other.txt"
    other.write_text("žluťoučký kůň " * 200)
    settings = PretrainSettings(data=str(text), tokens=128, tokenizer_data=(str(other),), **SMALL)
    known, plain = (
        hf.load_tokenizer(pretrain(config, tmp_path / name, each))
        for name, each in (("both", settings), ("one", dataclasses.replace(settings, tokenizer_data=())))
    )
    assert len(known.encode("žluťoučký kůň")) < len(plain.encode("žluťoučký kůň"))


@pytest.mark.slow
def test_a_vocabulary_without_room_for_sentinels_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"too small .* \(got 300\); allowed: at least 358"):
        _pretrained(text, tmp_path, vocab_size=300)
    with pytest.raises(DataError, match="shorter than one batch"):
        corpus(text, _pretrained(text, tmp_path)).check(batch_size=1000, length=32, vocab_size=400)


# --- optimiser, schedule, dropout -----------------------------------------------------------------------------------


def test_adafactor_is_as_published() -> None:
    """Algorithm 4 of arXiv 1804.04235 by hand: factored moments, clipping, steps relative to the parameter."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    settings = TrainSettings(data="x", optimizer="adafactor", learning_rate=1e-2)
    groups = [{"params": [weight], "share": 1.0, "weight_decay": 0.0}]
    optimizer, expected = make_optimizer(groups, settings), weight.detach().clone()
    rows, columns = torch.zeros(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        optimizer.step()
        kept = 1 - step**-0.8
        rows = kept * rows + (1 - kept) * gradient.square().mean(1)
        columns = kept * columns + (1 - kept) * gradient.square().mean(0)
        update = gradient / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        size = max(1e-3, float(expected.square().mean().sqrt()))
        expected = expected - min(1e-2, step**-0.5) * size * update
    torch.testing.assert_close(weight.detach(), expected)


def test_a_constant_rate_stays() -> None:
    settings = TrainSettings(data="x", schedule="constant", warmup=0.1)
    assert [rate(settings, step, 20) for step in (0, 1, 2, 19)] == [0.5, 1.0, 1.0, 1.0]


def test_dropout_is_set_everywhere() -> None:
    config = {**all_families()["t5"].tiny(), "dropout_rate": 0.3}
    for given, expected in ((None, 0.3), (0.0, 0.0), (0.1, 0.1)):
        model = hf.build(config, seed=0)
        prepare(model, TrainSettings(data="x", dropout=given))
        found = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        found |= {module.dropout for module in model.modules() if type(module).__name__ == "T5Attention"}
        assert found == {expected}


def test_new_settings_do_not_change_the_identity_of_older_outputs() -> None:
    settings = TrainSettings(data="x")
    assert not {"optimizer", "dropout", "tokenizer_data"} & set(settings.identity())
    assert not {"optimizer", "dropout", "tokenizer_data"} & set(PretrainSettings().identity())
    assert TrainSettings(data="x", optimizer="adafactor").identity()["optimizer"] == "adafactor"
    assert math.isclose(TrainSettings(data="x", dropout=0.0).identity()["dropout"], 0.0)


def test_a_text_is_tokenised_alike_for_both_kinds_of_model(text: Path, tiny_checkpoint: Make) -> None:
    teacher = tiny_checkpoint("t5")
    spans: Any = corpus(text, teacher)
    assert spans.tokens.tokens.tolist() == token_file(text, teacher).tokens.tolist()
