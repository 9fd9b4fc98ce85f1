"""T5Gemma: soft caps, windows and a wider encoder, through calibration, conversion, training and decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5GemmaForConditionalGeneration

from kvfold import hf, methods
from kvfold.calibrate.decoder import CalibrationSettings, calibrate
from kvfold.contracts.requests import AttentionGram, InputGram, QueryGram, Request
from kvfold.contracts.site import Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.evaluate.bench import BenchSettings, bench
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.families import all_families
from kvfold.predict.plan import plan
from kvfold.text.pairs import corpus
from kvfold.train import losses as objectives
from kvfold.train.pretrain import PretrainSettings, pretrain
from kvfold.train.uptrain import UptrainSettings, uptrain
from tolerance import assert_same

Make = Callable[..., Path]
TINY = all_families()["t5gemma"].tiny()
EXACT = CalibrationSettings(dtype="float64", length=48)


def wide(**decoder: Any) -> dict[str, Any]:
    """An encoder wider and less deep than the decoder, as in T5Gemma 9B-2B, with the vocabulary of the tokenizer."""
    parts = {"encoder": {"hidden_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2}, "decoder": decoder}
    return {part: {**TINY[part], "vocab_size": 300, **changes} for part, changes in parts.items()}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{'abcdefgh'[n % 8] * (1 + n % 9)} {n * n:o}\t{n:b} is {n:o}\n" for n in range(40)))
    return path


def ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 260, (batch, tokens), generator=torch.Generator().manual_seed(seed))


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_student_of_one_number_is_a_t5gemma_like_any_other(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5gemma", tokenizer=False)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2})
    before, after = (json.loads((path / "config.json").read_text()) for path in (teacher, student))
    assert after.pop("decoder") == {**before.pop("decoder"), "num_key_value_heads": 2}
    assert after == before
    stock, found = AutoModelForSeq2SeqLM.from_pretrained(student, output_loading_info=True)
    assert type(stock) is T5GemmaForConditionalGeneration
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    planned = plan(teacher, "gqa", {"kv_heads": 2})
    assert "a sliding window of 6 tokens bounds the cache of 2 of 4 layers already" in planned.warnings[0]
    assert [each.name for each in planned.engines if each.loads] == ["transformers"]
    assert planned.engines[0].how == "AutoModelForSeq2SeqLM, without kvfold"
    mixed = convert(teacher, tmp_path / "mixed", "gqa", {"kv_heads": "self=4/2/2/4,cross=1"})
    told = json.loads((mixed / "config.json").read_text())
    assert (told["model_type"], told["num_key_value_heads"]) == ("kvfold_t5gemma", [4, 2, 2, 4])
    again = convert(mixed, tmp_path / "again", "gqa", {"kv_heads": 1})
    one = json.loads((again / "config.json").read_text())
    assert one.pop("decoder") == {**told["decoder"], "num_key_value_heads": 1}
    assert one == before


def test_a_format_is_said_in_all_parts(tiny_checkpoint: Make, tmp_path: Path) -> None:
    parts = {part: {**TINY[part], "dtype": "float32"} for part in ("encoder", "decoder")}
    teacher = tiny_checkpoint("t5gemma", tokenizer=False, **parts)
    options = ConvertSettings(dtype="bfloat16")
    said = json.loads(
        (convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}, options=options) / "config.json").read_text()
    )
    assert [each["dtype"] for each in (said, said["encoder"], said["decoder"])] == ["bfloat16"] * 3


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_moments_are_those_of_capped_and_windowed_attention(tiny_checkpoint: Make, pairs: Path) -> None:
    """Against the probabilities that transformers' own eager attention shows."""
    source = Checkpoint.open(tiny_checkpoint("t5gemma", **wide(num_key_value_heads=2)))
    sites = [Site(0), Site(1), Site(2, "cross"), Site(0, "encoder")]
    asked: list[Request] = [kind(site) for site in sites for kind in (InputGram, QueryGram, AttentionGram)]
    read = corpus(pairs, source.path)
    answers = calibrate(source, asked, read, EXACT)
    model: Any = hf.load(source.path, dtype="float64", attention="eager")
    heard: dict[tuple[Site, str], list[Tensor]] = {}
    given: dict[str, Tensor] = {}
    for site in sites:
        for name in "qk":
            module = model.get_submodule(source.family.module(site)).get_submodule(f"{name}_proj")
            module.register_forward_hook(lambda _, x, y, at=f"{site} {name}": given.update({at: (x[0][0], y[0])}))
    for row in read.rows(48):
        one, other = (torch.from_numpy(side)[None] for side in row)
        start = torch.tensor([[model.config.decoder.bos_token_id]])
        with torch.no_grad():
            said = model(
                input_ids=one, decoder_input_ids=torch.cat([start, other[:, :-1]], dim=1), output_attentions=True
            )
        shown = {"self": said.decoder_attentions, "cross": said.cross_attentions, "encoder": said.encoder_attentions}
        for site in sites:
            p_HTS, token = shown[site.kind][site.layer][0], torch.arange(shown[site.kind][site.layer].shape[2])
            x_SD = given[f"{site} k"][0]
            for what, found in (
                ("x", x_SD),
                ("q", given[f"{site} q"][1].unflatten(-1, (-1, 8))),
                ("y", p_HTS[token % len(p_HTS), token] @ x_SD),
            ):
                heard.setdefault((site, what), []).append(found)
    for site in sites:
        x, q, y = (torch.cat(heard[site, what]) for what in "xqy")
        assert x.shape[1] == (32 if site.kind == "self" else 48)
        close = {"rtol": 1e-4, "atol": 1e-6}  # eager takes its softmax in float32
        torch.testing.assert_close(answers[InputGram(site)]["gram_DD"], x.T @ x / len(x), **close)
        torch.testing.assert_close(
            answers[QueryGram(site)]["gram_HEE"], torch.einsum("nhe,nhf->hef", q, q) / len(q), **close
        )
        torch.testing.assert_close(answers[AttentionGram(site)]["gram_DD"], y.T @ y / len(y), **close)
        torch.testing.assert_close(answers[AttentionGram(site)]["mean_D"], y.mean(0), **close)


def _images(folder: Path) -> None:
    """Make heads of each pair images of one another that a fit may undo: with RoPE one complex number a plane, else any
    matrix; values any matrix."""
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if not (name.startswith("model.decoder") and name.endswith(("k_proj.weight", "v_proj.weight"))):
            continue
        heads = tensor.view(4, 8, -1)
        for head in (1, 3):
            turn = torch.randn(8, 8, generator=generator)
            if "self_attn.k" in name:
                real, imaginary = torch.randn(2, 4, generator=generator)
                turn = torch.cat(
                    [
                        torch.cat([real.diag(), -imaginary.diag()], dim=1),
                        torch.cat([imaginary.diag(), real.diag()], dim=1),
                    ]
                )
            heads[head] = turn @ heads[head - 1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_heads_that_are_images_of_one_another_merge_without_loss(
    tiny_checkpoint: Make, pairs: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("t5gemma", **wide())
    _images(teacher)
    inputs = {"input_ids": ids(2, 15), "decoder_input_ids": ids(2, 12, seed=1)}
    with torch.inference_mode():
        expected, moved = hf.load(teacher)(**inputs).logits, {}
        for init in ("fit", "mean"):
            options = ConvertSettings(calibration=str(pairs))
            student = convert(teacher, tmp_path / init, "gqa", {"kv_heads": 2, "init": init}, options=options)
            moved[init] = float((hf.load(student)(**inputs).logits - expected).abs().max())
    assert moved["fit"] < 1e-3 < 1e-2 < moved["mean"], moved


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_window_bounds_what_was_written_and_never_what_was_read(kind: Any, tiny_checkpoint: Make) -> None:
    """An input and an answer both longer than the window, decoded token by token, against no cache at all."""
    model: Any = hf.load(tiny_checkpoint("t5gemma", tokenizer=False))
    given, written = ids(2, 17) % 90 + 3, ids(2, 14, seed=1) % 90 + 3
    cache, encoded = hf.new_cache(model, kind, 14), hf.encode(model, given)
    for column in written.split(1, dim=1):
        said = hf.read(model, column, cache, encoded)
    with torch.inference_mode():
        expected = model(input_ids=given, decoder_input_ids=written).logits[:, -1]
    assert_same(said, expected)
    assert [each.keys.shape[2] for each in cache.cross_attention_cache.layers] == [17] * 4  # type: ignore[attr-defined]


@pytest.mark.slow
def test_bench_measures_the_bytes_that_plan_promises(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5gemma", **wide())
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})
    settings = BenchSettings(context=(16,), batch=(2,), new_tokens=8, repeats=1, dtype="float32")
    made = bench([teacher, student], settings, records=tmp_path / "records")
    assert made.metrics["bytes_as_predicted"]
    assert {row["kernel"].split(",")[0] for row in made.metrics["rows"]} <= {hf.ATTENTION, "eager"}


# --- training and evaluation ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_learns_from_pairs_and_is_evaluated(tiny_checkpoint: Make, pairs: Path, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5gemma", **wide())
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "self=2,cross=1"})
    for loss in ("kl", "attention"):
        settings = UptrainSettings(
            data=str(pairs),
            tokens=32 * 4 * 30,
            loss=loss,
            learning_rate=3e-3,
            log_every=1,
            sequence_length=32,
            batch_size=4,
            precision="fp32",
        )
        out = uptrain(student, tmp_path / loss, settings, teacher=teacher)
        lines = map(json.loads, (out / "train.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    asked = EvaluateSettings(data=str(pairs), answers=4, answer_tokens=6, beams=(1, 2), sequence_length=32)
    made = evaluate(tmp_path / "kl", asked, teacher=teacher, records=tmp_path / "records")
    assert made.metrics["kl"] > 0
    assert set(made.metrics["cer"]) == {"1", "2"}


def test_attentions_that_read_what_the_teachers_did_look_at_its_encoder(tiny_checkpoint: Make) -> None:
    """Teacher and itself with another encoder: fed with the same inputs, every attention says the same."""
    path = tiny_checkpoint("t5gemma", tokenizer=False)
    teacher: Any
    other: Any
    teacher, other = hf.load(path), hf.load(path)
    for parameter in other.get_encoder().parameters():
        parameter.data.mul_(0.5)
    family = Checkpoint.open(path).family
    paths = [family.module(Site(layer, kind)) for layer in range(4) for kind in ("self", "cross")]
    inputs = {"input_ids": ids(2, 9) % 90, "decoder_input_ids": ids(2, 7, seed=1) % 90}
    with (
        torch.no_grad(),
        hf.attention_outputs(teacher, paths) as theirs,
        hf.attention_outputs(other, paths) as ours,
        objectives.same_inputs(other, teacher, paths),
    ):
        teacher(**inputs)
        other(**inputs)
        for each in paths:
            torch.testing.assert_close(ours[each], theirs[each])


def test_it_is_not_pretrained(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="vocabularies of their own is not pre-trained.*t5gemma"):
        pretrain(TINY, tmp_path / "out", PretrainSettings(data="stdlib", tokens=1000))


# --- other methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("cla", {}, "cla: layer 0 (encoder): only layers of a decoder-only model can share"),
        ("elitekv", {"ratio": 0.5}, "elitekv: layer 0 (encoder): only decoder-only models can have latents of heads"),
        ("supra", {}, "supra: layer 0 (encoder): only causal self-attention with RoPE can be linear"),
    ],
)
def test_what_cannot_honour_it_says_so(method: str, settings: dict[str, Any], line: str) -> None:
    shape = all_families()["t5gemma"].shape(TINY)
    made = methods.get(method).Config(**settings)
    with pytest.raises(SettingError) as told:
        methods.check(method, made, shape)
    assert str(told.value).startswith(line)
    plain = all_families()["llama"].shape(all_families()["llama"].tiny())
    methods.check(method, made, plain)
    capped = plain.with_sites({site: replace(each, softcap=50.0) for site, each in plain.sites.items()})
    with pytest.raises(SettingError, match="logits have a soft cap.*choose gqa"):
        methods.check(method, made, capped)
