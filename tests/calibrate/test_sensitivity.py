"""Sensitivity against students that were really converted, and what a conversion with a budget leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.calibrate import CalibrationSettings, sensitivity
from kvfold.calibrate.decoder import calibrate
from kvfold.calibrate.sensitivity import measure
from kvfold.contracts.requests import FoldedKL, Question, UniformKL
from kvfold.contracts.site import Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint, Writer
from kvfold.errors import CheckpointError, Interrupted
from kvfold.methods import gqa
from kvfold.progress import Silent
from kvfold.report.card import card
from kvfold.solve.budget import uniform_folds
from kvfold.text.pairs import PairFile, batched
from kvfold.text.tokens import TokenFile

Make = Callable[..., Path]
METHOD = gqa.METHOD
AUTO = gqa.Config("auto", init="mean", budget=0.5)
SETTINGS = CalibrationSettings(sensitivity_tokens=48)
TEXT = "When that Aprill with his shoures soote the droghte of March hath perced to the roote. " * 40
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sensitivity, "LENGTH", 16)
    return tmp_path / "cache"


def token_file(count: int = 160) -> TokenFile:
    ids = np.random.default_rng(0).integers(3, 96, count).astype(np.uint32)
    return TokenFile(Path("text"), ids, 96, "text", "text")


def folds(source: Checkpoint) -> list[FoldedKL]:
    return [each for each in gqa.METHOD.needs(AUTO, source.shape) if isinstance(each, FoldedKL)]


def rows(tokens: TokenFile) -> Tensor:
    """Three rows of 16: the first, the middle and the last of 160 tokens."""
    return torch.stack([torch.from_numpy(tokens.tokens[at : at + 16].astype("int64")) for at in (0, 72, 144)])


def textbook_kl(teacher: Path, student: Path, ids_BT: Tensor) -> float:
    """Mean over tokens of `sum p log(p / q)`, in float64, token by token."""
    with torch.inference_mode():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")(ids_BT)
            .logits.softmax(-1)
            .flatten(0, 1)
            for path in (teacher, student)
        )
    return sum(float((p_V * (p_V / q_V).log()).sum()) for p_V, q_V in zip(p, q, strict=True)) / len(p)


# --- the number ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", SOURCES)
def test_it_is_the_kl_of_a_student_with_one_or_all_layers_folded(
    tiny_checkpoint: Make, tmp_path: Path, family: str
) -> None:
    teacher = tiny_checkpoint(family, tokenizer=False, num_hidden_layers=3, **SOURCES[family])
    source, tokens = Checkpoint.open(teacher), token_file()
    sites, have = tuple(source.shape.cached_sites), source.shape.sites[Site(0)].num_key_value_heads
    together = [UniformKL(sites, count) for count, _ in uniform_folds(source.shape)]
    assert [each.heads for each in together] == {2: [1], 4: [1, 2]}[have]
    asked = [*folds(source), *together]
    found = measure(source, METHOD, AUTO, asked, {}, tokens, SETTINGS)
    assert set(found) == set(asked)
    for number, (question, answer) in enumerate(found.items()):
        heads = [have] * 3
        for site in question.sites:
            heads[site.layer] = question.heads  # type: ignore[union-attr]
        settings = {"kv_heads": "/".join(map(str, heads)), "init": "mean"}
        student = convert(teacher, tmp_path / f"{number}", "gqa", settings)
        expected = textbook_kl(teacher, student, rows(tokens))
        assert expected > 1e-5  # or the comparison would say little
        assert answer["kl"].dtype == torch.float64
        assert answer["kl"].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def textbook_pairs_kl(teacher: Path, student: Path, pairs: PairFile) -> float:
    """The same of an encoder-decoder, one pair after the other."""
    models = [hf.load(path, dtype="float64") for path in (teacher, student)]
    total, tokens = 0.0, 0
    for given, target in pairs.pairs:
        begun_BT = batched([(given, target)]).shifted(models[0].config.decoder_start_token_id or 0)  # type: ignore[union-attr]
        ids_BS = torch.from_numpy(np.asarray(given))[None]
        with torch.inference_mode():
            p, q = (model(input_ids=ids_BS, decoder_input_ids=begun_BT).logits[0].softmax(-1) for model in models)
        total, tokens = total + float((p * (p / q).log()).sum()), tokens + len(target)
    return total / tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_it_is_the_kl_of_an_encoder_decoder_with_one_attention_folded(
    tiny_checkpoint: Make, tmp_path: Path, family: str
) -> None:
    """Of each kind, self and cross, in each layer; pairs of two lengths, all of which the sample takes."""
    teacher = tiny_checkpoint(family, tokenizer=False)
    source, draw = Checkpoint.open(teacher), np.random.default_rng(0)
    rows = [tuple(draw.integers(3, 96, length) for length in ((9, 7), (12, 5))[each % 2]) for each in range(6)]
    pairs = PairFile(rows, [], "text", "text", 96)  # type: ignore[arg-type]
    found = measure(source, METHOD, AUTO, folds(source), {}, pairs, SETTINGS)
    assert {question.site for question in found if isinstance(question, FoldedKL)} == set(source.shape.cached_sites)
    for question in (FoldedKL(Site(0), 1), FoldedKL(Site(2), 2), FoldedKL(Site(0, "cross"), 1), FoldedKL(Site(3), 1)):
        heads = {kind: [4] * 4 for kind in ("self", "cross")}
        heads[question.site.kind][question.site.layer] = question.heads
        spelled = ",".join(f"{kind}={'/'.join(map(str, row))}" for kind, row in heads.items())
        made = convert(teacher, tmp_path / f"{question}", "gqa", {"kv_heads": spelled, "init": "mean"})
        expected = textbook_pairs_kl(teacher, made, pairs)
        assert expected > 1e-6
        assert found[question]["kl"].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_an_encoder_decoder_within_a_budget(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """A budget counts a token of the decoder and one of the encoder; the mix is the cheapest by its own prices."""
    source = Checkpoint.open(tiny_checkpoint("t5"))
    (tmp_path / "text.txt").write_text(TEXT)
    options = ConvertSettings(calibration=str(tmp_path / "text.txt"), calibration_length=48, repair=("o",))
    student = convert(source.path, tmp_path / "out", "gqa", {"kv_heads": "auto", "budget": 0.5}, options=options)
    made = Checkpoint.open(student)
    assert made.lineage is not None
    step = made.lineage["steps"][-1]
    counts = [made.shape.sites[site].num_key_value_heads for site in source.shape.cached_sites]
    assert sum(counts) <= 0.5 * 4 * len(counts)
    assert step["found"]["mix"]["kl"] <= step["found"]["uniform"]["kl"]
    assert set(step["found"]["kl"]) == {str(site) for site in source.shape.cached_sites}
    assert "self=" in step["settings"]["kv_heads"]


def test_moments_and_seeds_are_used(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False, num_hidden_layers=2)
    source, tokens = Checkpoint.open(teacher), token_file()
    fit = replace(AUTO, init="fit")
    moments = calibrate(
        source, [each for each in gqa.METHOD.needs(fit, source.shape) if not isinstance(each, FoldedKL)], tokens
    )
    question = FoldedKL(Site(1), 2)
    found = measure(source, METHOD, fit, [question], moments, tokens, SETTINGS)[question]["kl"]
    roles = {role: source.read(f"model.layers.1.self_attn.{role}_proj.weight") for role in "qkvo"}
    site = Site(1)
    made = gqa.METHOD.convert({site: gqa.SiteTensors(source.shape.sites[site], roles)}, moments, gqa.Config(2))[site]
    model = hf.load(teacher, dtype="float64")
    kept = model(rows(tokens)).logits.log_softmax(-1)
    for role, tensor in made.items():
        full = tensor.view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1) if role in "kv" else tensor
        model.get_submodule(f"model.layers.1.self_attn.{role}_proj").weight.data = full
    changed = model(rows(tokens)).logits.log_softmax(-1)
    expected = (kept.exp() * (kept - changed)).sum(-1).mean().item()
    assert found.item() == pytest.approx(expected, rel=1e-3)
    drawn = [
        measure(source, METHOD, replace(AUTO, init="random", init_seed=seed), [question], {}, tokens, SETTINGS)
        for seed in (0, 1)
    ]
    assert drawn[0][question]["kl"] != drawn[1][question]["kl"]


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_answers_are_kept_whatever_the_budget(
    tiny_checkpoint: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokens = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False)), token_file()
    source.hash()  # which has progress of its own
    events: list[Any] = []

    class Listener(Silent):
        def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
            events.append(total)

        def advance(self, amount: float, note: str = "") -> None:
            events.append(amount)

    some = measure(source, METHOD, AUTO, folds(source)[:3], {}, tokens, SETTINGS, progress=Listener())
    assert events == [3 * 48, 48, 48, 48]
    whole = measure(source, METHOD, AUTO, folds(source), {}, tokens, SETTINGS, progress=Listener())
    assert events[4] == 5 * 48  # the three are not measured again
    assert {question: whole[question]["kl"] for question in some} == {each: some[each]["kl"] for each in some}
    assert len(list((cache / "sensitivity").iterdir())) == 1
    fresh = tiny_checkpoint("llama", tokenizer=False, name="copy")
    monkeypatch.setattr(hf, "load_source", lambda *given, **named: pytest.fail("the teacher was loaded"))
    again = measure(Checkpoint.open(fresh), METHOD, replace(AUTO, budget=0.7), folds(source), {}, tokens, SETTINGS)
    assert again == whole
    with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
        measure(source, METHOD, replace(AUTO, init="first"), folds(source), {}, tokens, SETTINGS)


def test_what_was_measured_before_a_stop_stays(
    tiny_checkpoint: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokens = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False)), token_file()
    costs, calls = sensitivity._Measurement.costs, list[int]()

    def stopped(self: Any, teacher: Any, layer: int, *given: Any) -> Any:
        calls.append(layer)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return costs(self, teacher, layer, *given)

    monkeypatch.setattr(sensitivity._Measurement, "costs", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(source, METHOD, AUTO, folds(source), {}, tokens, SETTINGS)
    found = measure(source, METHOD, AUTO, folds(source), {}, tokens, SETTINGS)
    assert calls == [0, 1, 2, 2, 3]
    for file in (cache / "sensitivity").iterdir():
        file.unlink()
    assert measure(source, METHOD, AUTO, folds(source), {}, tokens, SETTINGS) == found


def test_logits_that_are_not_finite(tiny_checkpoint: Make) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint.open(teacher)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        measure(source, METHOD, AUTO, folds(source), {}, token_file(), SETTINGS)


def test_a_short_text_and_a_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = sensitivity.spread
    assert spread(token_file(160), 64, CalibrationSettings(sensitivity_tokens=8)).shape == (1, 16)
    every = spread(token_file(160), 64, CalibrationSettings())
    assert torch.equal(every.flatten(), torch.from_numpy(token_file(160).tokens.astype("int64")))
    monkeypatch.setattr(sensitivity, "LENGTH", 256)
    assert spread(token_file(10), 512, CalibrationSettings()).shape == (1, 10)


# --- conversions with a budget ---------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> ConvertSettings:
    (tmp_path / "text.txt").write_text(TEXT)
    return ConvertSettings(calibration=str(tmp_path / "text.txt"), calibration_tokens=600, repair=("none",))


def one_head_in_disguise(folder: Path, layer: int) -> None:
    """Make all heads of a layer images of its first: keys by a factor for each plane, values by any matrix."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(5)
    for role in "kv":
        heads = tensors[f"model.layers.{layer}.self_attn.{role}_proj.weight"].view(4, 8, -1)
        for head in heads[1:]:
            if role == "v":
                head.copy_(torch.randn(8, 8, generator=generator) @ heads[0])
                continue
            a, b = torch.randn(2, 4, 1, generator=generator)
            head.copy_(torch.cat([a * heads[0][:4] - b * heads[0][4:], b * heads[0][:4] + a * heads[0][4:]]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        found: Tensor = hf.load(folder)(rows(token_file())).logits
    return found


@pytest.mark.slow
def test_heads_that_are_one_already_are_merged_without_loss(
    tiny_checkpoint: Make, tmp_path: Path, text: ConvertSettings
) -> None:
    teacher = tiny_checkpoint("llama")
    one_head_in_disguise(teacher, 2)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": "auto", "budget": 1.0}, options=text)
    (step,) = json.loads((student / "kvfold.json").read_text())["steps"]
    assert step["settings"]["kv_heads"] == "4/4/1/4"
    assert step["found"]["mix"]["kl"] < 1e-6
    assert step["found"]["kl"]["layer 1"]["1"] > 1e-4
    (found,) = step["found"]["sites"].items()
    assert found[0] == "layer 2"
    assert found[1]["lossless"] == [0]
    assert found[1]["lost"][0] < 1e-9
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)
    events = card(student, [])
    assert (
        "within 100.0% of the root teacher's cache: 4/4/1/4, of predicted KL 0.0000 nats before any repair; 4 in"
        in events
    )
    assert "Heads that were linear images of one another, merged without loss: layer 2 (1 of 1 groups)." in events
    half = convert(teacher, tmp_path / "half", "gqa", {"kv_heads": 2}, options=text)
    (step,) = json.loads((half / "kvfold.json").read_text())["steps"]
    lossless = {name: site["lossless"] for name, site in step["found"]["sites"].items()}
    assert lossless == {"layer 0": [], "layer 1": [], "layer 2": [0, 1], "layer 3": []}


def test_rounding_to_a_narrow_format_is_no_loss(tiny_checkpoint: Make, tmp_path: Path, text: ConvertSettings) -> None:
    teacher = tiny_checkpoint("llama")
    one_head_in_disguise(teacher, 2)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}, options=text)
    sites = json.loads((student / "kvfold.json").read_text())["steps"][0]["found"]["sites"]
    assert {name: site["lossless"] for name, site in sites.items() if site["lossless"]} == {"layer 2": [0, 1]}
    assert all(1e-9 < lost < 1e-5 for lost in sites["layer 2"]["lost"])


@pytest.mark.slow
def test_the_mix_is_what_a_list_by_hand_would_be(tiny_checkpoint: Make, tmp_path: Path, text: ConvertSettings) -> None:
    teacher = tiny_checkpoint("qwen2")
    auto = {"kv_heads": "auto", "budget": 0.5}
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "gqa", auto, options=text))
    assert student.lineage is not None
    (step,) = student.lineage["steps"]
    mix = [int(heads) for heads in str(step["settings"]["kv_heads"]).split("/")]
    assert sum(mix) <= 8
    assert [site.num_key_value_heads for site in student.shape.sites.values()] == mix
    assert step["settings"]["budget"] is None
    assert step["found"]["budget"] == 0.5
    assert step["found"]["mix"]["kl"] <= step["found"]["uniform"]["kl"]
    by_hand = convert(teacher, tmp_path / "by hand", "gqa", {"kv_heads": step["settings"]["kv_heads"]}, options=text)
    assert Checkpoint.open(by_hand).hash() == student.hash()
    lines: list[str] = []
    listener = Silent()
    listener.say = lines.append  # type: ignore[method-assign]
    convert(teacher, tmp_path / "student", "gqa", auto, options=text, progress=listener)
    assert "is complete" in lines[0]


@pytest.mark.slow
def test_a_budget_spent_on_recall_with_weighed_heads(
    tiny_checkpoint: Make, tmp_path: Path, text: ConvertSettings
) -> None:
    teacher = tiny_checkpoint("llama", num_hidden_layers=2)
    auto = {"kv_heads": "auto", "budget": 0.625, "budget_metric": "both", "weigh": "ablation"}
    student = convert(teacher, tmp_path / "student", "gqa", auto, options=text)
    (step,) = json.loads((student / "kvfold.json").read_text())["steps"]
    assert set(step["found"]["mix"]) == {"kv_heads", "cache", "kl", "rise"}
    assert step["found"]["rise"].keys() == step["found"]["kl"].keys() == {"layer 0", "layer 1"}
    assert re.search(r"of predicted KL [\d.]+ and rise of the loss of copying [\d.]+ nats before", card(student, []))
    alike = {"kv_heads": step["settings"]["kv_heads"], "weigh": "uniform"}
    uniform = convert(teacher, tmp_path / "uniform", "gqa", alike, options=text)
    assert Checkpoint.open(uniform).hash() != Checkpoint.open(student).hash()


@pytest.mark.slow
def test_a_budget_of_a_student_counts_from_its_root(
    tiny_checkpoint: Make, tmp_path: Path, text: ConvertSettings
) -> None:
    half = convert(tiny_checkpoint(), tmp_path / "half", "gqa", {"kv_heads": 2})
    student = convert(half, tmp_path / "student", "gqa", {"kv_heads": "auto", "budget": 0.3125}, options=text)
    heads = [site.num_key_value_heads for site in Checkpoint.open(student).shape.sites.values()]
    assert sorted(heads) == [1, 1, 1, 2]  # 5 of the root's 16


def test_measurements_from_before_a_stop_are_recorded(
    tiny_checkpoint: Make, tmp_path: Path, text: ConvertSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = tiny_checkpoint(), tmp_path / "out"
    options = replace(text, shard_size=20_000)
    write, left = Writer.write, [30]

    def stopped(self: Writer, name: str, tensor: Tensor) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(self, name, tensor)

    monkeypatch.setattr(Writer, "write", stopped)
    with pytest.raises(Interrupted):
        convert(teacher, out, "gqa", {"kv_heads": 2}, options=options)
    monkeypatch.setattr(Writer, "write", write)
    made: list[Site] = []
    fold = gqa.METHOD.fold
    monkeypatch.setattr(gqa.METHOD, "fold", lambda group, *given: (made.extend(group), fold(group, *given))[1])
    convert(teacher, out, "gqa", {"kv_heads": 2}, options=options)
    assert 0 < len(made) < 4  # some were written before
    (step,) = json.loads((out / "kvfold.json").read_text())["steps"]
    assert sorted(step["found"]["sites"]) == [f"layer {layer}" for layer in range(4)]
    assert not list(out.glob(".*"))


def test_the_questions_are_gqas_own(tiny_checkpoint: Make) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False, num_key_value_heads=1))
    asked: list[Question] = list(gqa.METHOD.needs(replace(AUTO, init="fit"), source.shape))
    assert asked == []  # one head cannot become fewer
