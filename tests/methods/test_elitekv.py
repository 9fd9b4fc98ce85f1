"""elitekv: what it says of itself, what it chooses within a ratio, and what its student keeps of a teacher."""

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

from kvfold import hf
from kvfold.contracts.cache import grouped_cache
from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.requests import AttentionGram, Computed, InputGram, QueryGram, SampledPairs
from kvfold.contracts.site import REPAIRABLE, Attention, Roles, Shape, Site, SiteTensors
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export.exporting import export
from kvfold.families import all_families
from kvfold.methods import elitekv
from kvfold.predict.plan import PlanSettings, plan
from kvfold.predict.roofline import cache_share, decode_step
from kvfold.solve import latent
from kvfold.solve.shared_heads import Moments
from kvfold.train.uptrain import UptrainSettings, uptrain

TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7


def shape_of(family: str = "llama", **changes: Any) -> Shape:
    found = all_families()[family]
    return found.shape({**found.tiny(), **changes})


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site_of(family: str = "qwen2", **changes: Any) -> tuple[Attention, Roles, Moments, dict[str, Tensor]]:
    """Random tensors of a site with the moments and the pairs of a made-up text."""
    attention = shape_of(family, **changes).sites[Site(0)]
    roles = {role: drawn(*form, seed=n) for n, (role, form) in enumerate(attention.roles().items())}
    x_ND = 0.3 + drawn(400, attention.hidden_size, seed=50) * torch.logspace(0, -1, attention.hidden_size).double()
    y_ND = 0.5 * x_ND.roll(1, 0) + 0.5 * x_ND
    q_ND, k_ND = (x_ND @ roles[role].T + roles.get(f"{role}_bias", torch.zeros(())) for role in ("q", "k"))
    q_NHE, k_NGE = (each.view(400, -1, attention.head_dim) for each in (q_ND, k_ND))
    moments = Moments(
        x_ND.T @ x_ND / 400,
        x_ND.mean(0),
        torch.einsum("nhe,nhf->hef", q_NHE, q_NHE) / 400,
        y_ND.T @ y_ND / 400,
        y_ND.mean(0),
    )
    sample = {
        "q_NHE": q_NHE[:40],
        "k_NGE": k_NGE[:40],
        "row_N": torch.arange(40) // 10,
        "position_N": torch.arange(40) % 10,
    }
    return attention, roles, moments, sample


# --- what it asks and refuses ---------------------------------------------------------------------------------------


def test_it_asks_for_what_it_reads() -> None:
    shape, split = shape_of(), {"rope_chunks": 2, "latent_dim": 8}
    site = Site(0)

    def asked(**settings: Any) -> set[Any]:
        return {each for each in elitekv.METHOD.needs(elitekv.Config(**settings), shape) if each.site == site}

    pairs, moments = SampledPairs(site, 2048), {InputGram(site), QueryGram(site), AttentionGram(site)}
    assert asked(**split) == {pairs, *moments}
    assert asked(**split, search="uniform") == moments
    assert asked(**split, metric="inputs", search="uniform") == {InputGram(site)}
    assert asked(**split, metric="weights") == {pairs}
    assert asked(ratio=0.5) == {pairs, *moments, Computed(site)}
    assert asked(ratio=0.5, metric="weights", search="uniform") == set()
    assert not elitekv.METHOD.needs(elitekv.METHOD.lossless(shape), shape)


def test_normed_keys_and_mixed_heads_are_refused() -> None:
    config = elitekv.Config(rope_chunks=2, latent_dim=8)
    with pytest.raises(SettingError, match="layer 0: keys are normed, and no normed key is a linear"):
        config.check(shape_of("qwen3"))
    shape = shape_of()
    mixed = shape.with_sites({Site(1): replace(shape.sites[Site(1)], num_key_value_heads=2)})
    with pytest.raises(SettingError, match=r"layers differ in their key/value heads \(got 2 to 4\)"):
        config.check(mixed)


def test_lengthening_that_changes_with_the_text_is_refused() -> None:
    attention, _, _, sample = site_of()
    assert attention.rope is not None
    other = replace(attention, rope=replace(attention.rope, scaling={"rope_type": "longrope"}))
    with pytest.raises(SettingError, match="longrope"):
        latent.survey(other, "elite", [2], sample)


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("factor", ["joint", "separate"])
def test_its_metric_is_what_errors_do_to_logits_and_outputs(family: str, factor: Any) -> None:
    """Against samples: the mean squares of `q . dk` and of `o dv`, head by head, weighed as the page says."""
    attention, roles, moments, _ = site_of(family, num_key_value_heads=2)
    planes_GK = torch.tensor([[0, 2], [1, 3]])
    cut = latent.Cut.of(attention, roles, planes_GK)
    new, lost = latent.cut_site(attention, roles, planes_GK, 6, metric="outputs", factor=factor, moments=moments)
    x_ND = 0.3 + drawn(400, 32, seed=50) * torch.logspace(0, -1, 32).double()
    y_ND = 0.5 * x_ND.roll(1, 0) + 0.5 * x_ND
    q_NHE = (x_ND @ roles["q"].T + roles.get("q_bias", 0)).view(400, 4, 8)
    weight_H, total, whole = latent.AVERAGED * latent.spreads(cut, roles, moments), 0.0, 0.0
    for head in range(4):
        group = head // 2
        free = latent.coordinates(attention, planes_GK)[group][4:]
        query = q_NHE[:, head, free]
        teacher = (x_ND - x_ND.mean(0)) @ cut.free_GND[group].T
        student = (x_ND - x_ND.mean(0)) @ (new["k_up"] @ new["kv_down"]).view(2, 4, 32)[group].T
        for errors, sums in ((teacher - student, "total"), (teacher, "whole")):
            logits = (query @ errors.T) / 8**0.5  # every query with every key
            part = float(weight_H[head] * logits.square().mean())
            total, whole = (total + part, whole) if sums == "total" else (total, whole + part)
        o_DE = roles["o"].view(32, 4, 8)[:, head]
        values = (y_ND - y_ND.mean(0)) @ roles["v"].view(2, 8, 32)[group].T
        kept = (y_ND - y_ND.mean(0)) @ (new["v_up"] @ new["kv_down"]).view(2, 8, 32)[group].T
        total += float(((values - kept) @ o_DE.T).square().sum(1).mean())
        whole += float((values @ o_DE.T).square().sum(1).mean())
    assert lost == pytest.approx(total / whole, rel=1e-6)
    mean = y_ND.mean(0)  # what attention reads on average is read off the latent without an error
    expected = roles["v"] @ mean + roles.get("v_bias", 0)
    torch.testing.assert_close(new["v_up"] @ (new["kv_down"] @ mean) + new["v_up_bias"], expected)


@pytest.mark.parametrize("metric", ["weights", "inputs", "outputs"])
def test_a_wider_latent_loses_less_and_one_latent_no_more_than_two(metric: Any) -> None:
    attention, roles, moments, _ = site_of()
    planes_GK = torch.tensor([[0, 1]] * 4)
    given: dict[str, Any] = {"metric": metric}
    given |= {"moments": moments} if metric == "outputs" else {"gram_DD": moments.gram_DD} if metric == "inputs" else {}
    joint = [latent.cut_site(attention, roles, planes_GK, w, factor="joint", **given)[1] for w in (4, 8, 16, 32)]
    apart = [latent.cut_site(attention, roles, planes_GK, w, factor="separate", **given)[1] for w in (4, 8, 16, 32)]
    assert joint == sorted(joint, reverse=True)
    assert all(one <= two * (1 + 1e-6) for one, two in zip(joint, apart, strict=True))
    assert joint[-1] < 1e-12


def test_the_expected_error_falls_with_both_and_ends_at_nothing() -> None:
    attention, roles, moments, sample = site_of()
    error_CR = latent.split_errors(attention, roles, "elite", [1, 2, 3, 4], sample, moments)
    assert error_CR.shape == (4, 33)
    assert bool((error_CR.diff(dim=1) <= 1e-12).all())
    assert bool((error_CR[:, -1].diff() < 0).all())
    assert float(error_CR[-1, -1]) < 1e-12
    blocks = latent.blocks(
        latent.Cut.of(attention, roles, latent.survey(attention, "elite", [2], sample).planes[2]),
        roles,
        "outputs",
        moments,
        None,
    )
    before = sum(block.power() for block in blocks) / blocks[1].power()
    mean = torch.stack([block.gram_DD for block in blocks]).mean(0)
    after = sum(float(((b.root_NN @ b.rows_ND) @ mean * (b.root_NN @ b.rows_ND)).sum()) for b in blocks)
    assert float(error_CR[1, 0] - error_CR[1, -1]) == pytest.approx(after / blocks[1].power())
    assert before > 0


def test_of_splits_that_lose_alike_the_one_with_the_narrowest_latent_is_taken() -> None:
    errors = torch.tensor([[9.0, 5.0, 3.0, 1.0, 0.5], [9.0, 2.0, 1.01, 0.9, 0.4], [9.0, 2.0, 2.0, 2.0, 2.0]])
    elements = torch.tensor([[2], [4], [6]]) + torch.arange(5)
    assert latent.best_split(errors, elements, 5) == (0, 3)
    assert latent.best_split(errors, elements, 6) == (0, 4)
    errors[1, 2] = 0.505
    assert latent.best_split(errors, elements, 6) == (1, 2)
    assert latent.best_split(errors, elements, 100) == (1, 4)


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ratio"), [("llama", 0.5), ("qwen2", 0.25)])
def test_a_ratio_is_kept_to_the_byte(
    family: str, ratio: float, tiny_checkpoint: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family)
    settings = {"ratio": ratio, "samples": 200}
    student = convert(teacher, tmp_path / "student", "elitekv", settings, options=ConvertSettings(calibration=text))
    whole, kept = (grouped_cache(Checkpoint.open(each).shape).bytes_per_token(4) for each in (teacher, student))
    assert 0.8 * ratio * whole <= kept <= ratio * whole
    planned = plan(teacher, "elitekv", settings)
    assert planned.after.cache_bytes_per_token <= ratio * whole
    assert "chooses how each layer splits its part" in " ".join(planned.warnings)
    step = json.loads((student / "kvfold.json").read_text())["steps"][-1]
    assert step["settings"]["ratio"] is None
    assert step["settings"]["repair"] == list(REPAIRABLE)
    assert set(step["found"]["sites"]) == {f"layer {n}" for n in range(4)}
    cache = hf.new_cache(model := hf.load(student), "growing", 0)
    hf.read(model, torch.arange(3, 13).view(2, 5), cache)
    assert hf.live_cache_bytes(cache) == kept * 2 * 5
    again = convert(teacher, tmp_path / "student", "elitekv", settings, options=ConvertSettings(calibration=text))
    assert again == student


def test_weights_alone_do_without_a_text(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    student = convert(tiny_checkpoint(tokenizer=False), tmp_path / "student", "elitekv", {"ratio": 0.5})
    settings = json.loads((student / "kvfold.json").read_text())["steps"][-1]["settings"]
    assert (settings["search"], settings["metric"], settings["repair"]) == ("uniform", "weights", [])
    assert (settings["rope_chunks"], settings["latent_dim"]) == (1, 24)


@pytest.mark.slow
@torch.inference_mode()
def test_repair_brings_the_student_nearer(tiny_checkpoint: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Heads turn each its own way, and q, o and down are refitted all the same."""
    teacher, found = tiny_checkpoint("qwen2"), {}
    tensors = load_file(teacher / "model.safetensors")
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] *= 4  # attention that looks somewhere, and not everywhere alike
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([hf.load_tokenizer(teacher)(TEXT[:250])["input_ids"]])
    expected = hf.load(teacher)(ids).logits.log_softmax(-1)
    for repair in ("none", "q", "q,o,down"):
        options = ConvertSettings(calibration=text, repair=tuple(repair.split(",")))
        settings = {"rope_chunks": 1, "latent_dim": 16, "samples": 200}
        student = convert(teacher, tmp_path / repair, "elitekv", settings, options=options)
        logits = hf.load(student)(ids).logits.log_softmax(-1)
        found[repair] = float((expected.exp() * (expected - logits)).sum(-1).mean())
    assert found["q,o,down"] < 0.8 * found["none"]
    assert found["q"] < 0.8 * found["none"]


@pytest.mark.slow
def test_it_trains_and_names_its_roles(tiny_checkpoint: Callable[..., Path], text: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "student", "elitekv", {"rope_chunks": 2, "latent_dim": 8})
    roles = ("kv_down", "k_up", "v_up", "k_rope")
    settings = UptrainSettings(data=text, tokens=512, loss="kl", sequence_length=32, batch_size=4, trainable=roles)
    trained = uptrain(student, tmp_path / "trained", settings, teacher=teacher)
    before, after = (hf.load(each).state_dict() for each in (student, trained))
    changed = {name.rsplit(".", 2)[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"kv_down", "k_up", "v_up", "k_rope"}
    assert Checkpoint.open(trained).shape == Checkpoint.open(student).shape


def test_engines_that_cannot_serve_it_say_so(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher, settings = tiny_checkpoint(), {"rope_chunks": 2, "latent_dim": 8}
    planned = plan(teacher, "elitekv", settings)
    assert {engine.name: engine.loads for engine in planned.engines} == {
        "transformers": True,
        "vLLM": False,
        "llama.cpp": False,
        "CTranslate2": False,
        "SGLang": False,
    }
    assert planned.after.model_type == "kvfold_latent_llama"
    student = convert(teacher, tmp_path / "student", "elitekv", settings)
    for engine in ("gguf", "ctranslate2"):
        with pytest.raises(UnsupportedModel, match=r"caches keys and values of heads \(got rotated and latent\)"):
            export(student, tmp_path / engine, engine)


def test_a_plan_counts_what_absorbed_steps_multiply() -> None:
    shape = shape_of()
    student = elitekv.METHOD.student(elitekv.Config(rope_chunks=1, latent_dim=16), shape).shape
    cache = grouped_cache(student)
    assert cache.bytes_per_token(1) == 4 * (2 * 4 + 16)
    step, more = (
        decode_step(student, cache, context=context, batch=1, dtype="float32", tied=False) for context in (0, 100)
    )
    assert more.flops - step.flops == 100 * 4 * 4 * 2 * (2 + 2 * 16)
    assert cache_share(student, 4) == 1  # every device reads the latent
    assert cache_share(shape, 4) == 0.25
    assert plan_parallel(shape) == pytest.approx(0.5)


def plan_parallel(shape: Shape) -> float:
    return cache_share(shape, 2)


def test_convert_is_exact_in_the_corner_for_wide_heads() -> None:
    """More value coordinates than inputs: the latent is the input itself."""
    shape = shape_of(head_dim=16)
    config = elitekv.METHOD.resolve(elitekv.METHOD.lossless(shape), shape, {})
    assert (config.rope_chunks, config.latent_dim) == (PerSite.parse(8), PerSite.parse(32))
    attention = shape.sites[Site(0)]
    roles = {role: drawn(*form, seed=n) for n, (role, form) in enumerate(attention.roles().items())}
    made = elitekv.METHOD.convert({Site(0): SiteTensors(attention, roles)}, {}, config)[Site(0)]
    assert torch.equal(made["v_up"] @ made["kv_down"], roles["v"])
    assert torch.equal(made["k_rope"], roles["k"])
    assert torch.equal(made["q"], roles["q"])
    assert "k_up" not in made


def test_plans_need_no_text(tiny_checkpoint: Callable[..., Path]) -> None:
    planned = plan(tiny_checkpoint(), "elitekv", {"ratio": 0.25}, options=PlanSettings(context=64, batch=2))
    assert planned.cache_ratio <= 0.25
    assert planned.calibration_bytes > 0
