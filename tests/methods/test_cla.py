"""cla: who reads whom, what owners start from, what a budget buys, and what may follow a student that shares."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import APART
from kvfold import hf
from kvfold.calibrate import CalibrationSettings, sensitivity
from kvfold.calibrate.decoder import calibrate
from kvfold.calibrate.sensitivity import measure
from kvfold.contracts.requests import ConvertedKL, CrossGram, InputGram, QueryGram
from kvfold.contracts.site import REPAIRABLE, Roles, Shape, Site, SiteTensors
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk import record
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import fingerprint
from kvfold.errors import KvfoldError, SettingError, UnsupportedModel
from kvfold.export.exporting import export
from kvfold.families import all_families
from kvfold.methods import cla
from kvfold.predict.plan import plan
from kvfold.report.folder import findings
from kvfold.report.studies import cache_bytes
from kvfold.run.recipe import cells, read_recipe
from kvfold.run.runner import _chain, _method, run
from kvfold.text.tokens import token_file
from pages.marks import END, START, with_tables

ROOT = Path(__file__).parents[2]
TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7

TAKERS = APART


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def shape_of(layers: int = 4, family: str = "llama", heads: tuple[int, ...] = (), **changes: Any) -> Shape:
    found = all_families()[family]
    shape = found.shape({**found.tiny(), "num_hidden_layers": layers, **changes})
    sites = {
        Site(layer): replace(shape.sites[Site(layer)], num_key_value_heads=count) for layer, count in enumerate(heads)
    }
    return shape.with_sites(sites)


# --- layouts -------------------------------------------------------------------------------------------------------

DRAWN = {
    ("pairs", 2, 8): "00224466",
    ("pairs", 3, 8): "00033366",
    ("pairs", 2, 5): "00224",
    ("pairs", 1, 3): "012",
    ("pairs", 8, 8): "00000000",
    ("keep_ends", 2, 8): "01133557",
    ("keep_ends", 3, 8): "01114447",
    ("trailing", 2, 8): "01233333",
    ("trailing", 4, 8): "01111111",
    ("trailing", 2, 5): "01222",
    ("sandwich", 2, 8): "01222227",
    ("sandwich", 2, 10): "0122222289",
    ("sandwich", 4, 8): "01111111",
    ("sandwich", 3, 8): "01111117",
    ("sandwich", 1, 4): "0123",
}


@pytest.mark.parametrize(("layout", "share", "layers"), DRAWN)
def test_layouts_are_those_of_the_papers(layout: str, share: int, layers: int) -> None:
    config, shape = cla.Config(share=share, layout=layout), shape_of(layers)
    config.check(shape)
    sources = cla.sources_of(config, shape)
    assert "".join(map(str, sources)) == DRAWN[layout, share, layers]
    owners = math.ceil(layers / share)
    if layout != "keep_ends":
        assert len(set(sources)) == owners
    resolved = cla.METHOD.resolve(config, shape, {})
    assert resolved == cla.Config(layout=",".join(map(str, sources)))
    assert cla.sources_of(resolved, shape) == sources
    student = cla.METHOD.student(resolved, shape).shape
    assert cla.METHOD.cache_spec(resolved, shape).elements(1) == len(set(sources)) * 2 * 4 * 8
    assert set(student.owners) == {source for layer, source in enumerate(sources) if source != layer}


def test_share_is_2_unless_it_is_said() -> None:
    assert cla.sources_of(cla.Config(), shape_of(6)) == [0, 0, 2, 2, 4, 4]
    assert cla.METHOD.lossless(shape_of()).share == 1


def test_layers_that_differ_do_not_share() -> None:
    windows = shape_of(family="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=3)
    with pytest.raises(SettingError, match="layer 3 cannot read keys and values of layer 2.*another window"):
        cla.Config().check(windows)
    cla.Config(layout="0,0,2,3").check(windows)
    assert not any(len(group) > 1 and group[-1] == Site(3) for group in cla.METHOD.groups(auto(0.7), windows))


def auto(budget: float, share: int | None = None) -> cla.Config:
    return cla.Config(layout="auto", budget=budget, share=share)


# --- a budget ------------------------------------------------------------------------------------------------------


def answers_of(shape: Shape, seed: int) -> dict[Any, Any]:
    draw = np.random.default_rng(seed)
    return {
        each: {"kl": torch.tensor(draw.random())}
        for each in cla.METHOD.needs(auto(0.5), shape)
        if isinstance(each, ConvertedKL)
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("heads", [(4,) * 6, (4, 2, 1, 4, 2, 2)])
def test_auto_finds_the_best_cut_of_all(seed: int, heads: tuple[int, ...]) -> None:
    shape = shape_of(6, heads=heads)
    answers = answers_of(shape, seed)
    for budget in (0.4, 0.55, 0.75, 1.0):
        config = auto(budget)
        config.check(shape)
        best = (math.inf, math.inf)
        for cuts in itertools.product([True, False], repeat=5):
            firsts = [0, *(layer + 1 for layer, cut in enumerate(cuts) if cut), 6]
            groups = [tuple(map(Site, range(*pair))) for pair in itertools.pairwise(firsts)]
            size = sum(heads[group[0].layer] for group in groups)
            if all(len(group) <= cla.SPAN for group in groups) and size <= budget * sum(heads):
                cost = sum(float(answers[ConvertedKL(group)]["kl"]) for group in groups if len(group) > 1)
                best = min(best, (cost, size))
        told = cla.METHOD.found(config, shape, answers)["chosen"]
        assert told["kl"] == pytest.approx(best[0])
        assert told["cache"] == pytest.approx(best[1] / sum(heads))
        assert told["layout"] == cla.METHOD.resolve(config, shape, answers).layout


def test_a_budget_is_a_part_of_the_roots_bytes() -> None:
    """Two heads of four are half of it already; what is left is shared."""
    shape = replace(shape_of(6, num_key_value_heads=2), root_elements=6 * 2 * 4 * 8)
    answers = answers_of(shape, 0)
    for budget, owners in ((0.5, 6), (0.25, 3), (0.17, 2)):
        sources = cla.sources_of(cla.METHOD.resolve(auto(budget), shape, answers), shape)
        assert len(set(sources)) == owners
    with pytest.raises(SettingError, match=r"budget.*got 0\.1.*allowed: 0\.1667 \(4 layers to an owner\) to 1"):
        auto(0.1).check(shape)
    auto(0.1, share=6).check(shape)
    with pytest.raises(SettingError, match="needs a budget"):
        cla.Config(layout="auto").check(shape)


@pytest.mark.slow
@pytest.mark.parametrize("family", TAKERS)
@pytest.mark.parametrize("init", ["fit", "copy"])
def test_the_price_of_a_group_is_the_kl_of_a_student_that_shares_there(
    family: str,
    init: Any,
    tiny_checkpoint: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Checkpoint.open(tiny_checkpoint(family))
    tokens = token_file(str(text), source.path)
    config = replace(auto(0.5, share=3), init=init)
    asked = cla.METHOD.needs(config, source.shape)
    moments = calibrate(source, [each for each in asked if not isinstance(each, ConvertedKL)], tokens)
    groups = [ConvertedKL((Site(0), Site(1))), ConvertedKL((Site(1), Site(2), Site(3)))]
    settings = CalibrationSettings(sensitivity_tokens=480)
    monkeypatch.setattr(sensitivity, "LENGTH", 48)
    found = measure(source, cla.METHOD, config, groups, moments, tokens, settings)
    starts = [row * (len(tokens) - 48) // 9 for row in range(10)]
    ids_BT = torch.stack([torch.from_numpy(tokens.tokens[at : at + 48].astype("int64")) for at in starts])
    options = ConvertSettings(calibration=str(text), repair=())
    with torch.inference_mode():
        taught = hf.load(source.path)(ids_BT).logits.log_softmax(-1)
        for group, layout in zip(groups, ("0,0,2,3", "0,1,1,1"), strict=True):
            student = convert(source.path, tmp_path / layout, "cla", {"layout": layout, "init": init}, options=options)
            learnt = hf.load(student)(ids_BT).logits.log_softmax(-1)
            kl = float((taught.exp() * (taught - learnt)).sum(-1).mean())
            assert kl > 1e-3
            assert float(found[group]["kl"]) == pytest.approx(kl, rel=1e-2)


def test_what_is_asked_is_what_is_used() -> None:
    shape = shape_of()
    a, b = Site(0), Site(1)
    assert cla.METHOD.needs(cla.Config(layout="0,0,2,3"), shape) == [
        InputGram(a), QueryGram(a), InputGram(b), QueryGram(b), CrossGram(a, b)
    ]  # fmt: skip
    for init in ("copy", "mean"):
        assert not cla.METHOD.needs(cla.Config(init=init), shape)  # type: ignore[arg-type]
        assert not cla.METHOD.repairs(cla.Config(init=init))  # type: ignore[arg-type]
    assert set(cla.METHOD.repairs(cla.Config())) == set(REPAIRABLE)
    asked = cla.METHOD.needs(auto(0.5, share=3), shape)
    assert len(asked) == len(set(asked))
    fits = [each.sites for each in asked if isinstance(each, ConvertedKL)]
    assert fits == [
        (Site(0), Site(1)),
        (Site(0), Site(1), Site(2)),
        (Site(1), Site(2)),
        (Site(1), Site(2), Site(3)),
        (Site(2), Site(3)),
    ]


# --- starts --------------------------------------------------------------------------------------------------------


def drawn(shape: Shape) -> dict[Site, SiteTensors]:
    generator = torch.Generator().manual_seed(0)
    return {
        site: SiteTensors(each, {role: torch.randn(form, generator=generator) for role, form in each.roles().items()})
        for site, each in shape.sites.items()
    }


@pytest.mark.parametrize("family", TAKERS)
def test_copy_keeps_the_owners_and_mean_the_mean_of_all(family: str) -> None:
    group = drawn(shape_of(3, family))
    copied, meant = (cla.METHOD.convert(group, {}, cla.Config(share=3, init=init)) for init in ("copy", "mean"))  # type: ignore[arg-type]
    owner, *consumers = group
    assert copied[owner] is group[owner].roles
    for role, before in group[owner].roles.items():
        expected = before.double()
        if role[0] in "kv":
            expected = torch.stack([group[site].roles[role].double() for site in group]).mean(0)
        torch.testing.assert_close(meant[owner][role].double(), expected)
    for site in consumers:
        for made in (copied, meant):
            assert made[site] == {role: each for role, each in group[site].roles.items() if role[0] not in "kv"}


def test_the_mean_of_unequal_heads() -> None:
    """Fewer heads stand for as many as the owner has, of more the neighbours are averaged."""
    shape = shape_of(3, heads=(2, 1, 4))
    group = drawn(shape)
    found = cla.METHOD.convert(group, {}, cla.Config(share=3, init="mean"))[Site(0)]["v"].view(2, 8, 32)
    two, one, four = (group[Site(n)].roles["v"].double().view(-1, 8, 32) for n in range(3))
    for head in range(2):
        torch.testing.assert_close(found[head], (two[head] + one[0] + four[2 * head : 2 * head + 2].mean(0)) / 3)


def gauged(source: Path) -> Any:
    """Make consumers' keys and values images of their owners', which write nothing: both read the same input."""
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for first in (0, 2):
            owner, consumer = model.model.layers[first], model.model.layers[first + 1]
            owner.self_attn.o_proj.weight.zero_()
            owner.mlp.down_proj.weight.zero_()
            consumer.input_layernorm.weight.copy_(owner.input_layernorm.weight)
            order = torch.randperm(4, generator=generator)
            turn_EE = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q * 1.5
            phase_HP1 = torch.polar(torch.ones(1), 6 * torch.rand(4, 4, 1, generator=generator))
            for role in "kv":
                own, other = (getattr(each.self_attn, f"{role}_proj") for each in (owner, consumer))
                for mine, theirs in zip(other.parameters(), own.parameters(), strict=True):
                    rows_HEX = theirs.view(4, 8, -1)[order]
                    turned = torch.complex(rows_HEX[:, :4], rows_HEX[:, 4:]) * phase_HP1
                    turned = torch.cat([turned.real, turned.imag], 1) if role == "k" else turn_EE @ rows_HEX
                    mine.copy_(turned.reshape_as(mine))
            for norm in ("q_norm", "k_norm"):  # a turn must find the same weight in both parts of a plane
                if hasattr(consumer.self_attn, norm):
                    for each in (owner, consumer):
                        weight = getattr(each.self_attn, norm).weight
                        weight[4:] = weight[:4]
    model.save_pretrained(source)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in TAKERS if family != "olmo2"])  # no norm before attention
def test_a_model_of_images_is_shared_without_loss(
    family: str, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family)
    model, ids_BT = gauged(teacher), torch.arange(34).view(2, 17) + 40
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=())
    off = {}
    for name, init, repair in (("fit", "fit", ()), ("copy", "copy", ()), ("repaired", "fit", ("q",))):
        each = dataclasses.replace(options, repair=repair)
        student = convert(teacher, tmp_path / name, "cla", {"init": init}, options=each)
        with torch.inference_mode():
            off[name] = float((hf.load(student)(ids_BT).logits - model(ids_BT).logits).abs().max())
    assert off["fit"] < 1e-4
    assert off["repaired"] < 1e-3  # each query head is held against the one that it was, wherever it stands now
    assert off["copy"] > 1e-2
    told = json.loads((tmp_path / "fit" / "kvfold.json").read_text())["steps"][-1]["found"]["sites"]
    assert all(told[f"layer {owner}"]["lossless"] == [0, 1, 2, 3] for owner in (0, 2))
    moved = [told[f"layer {consumer}"]["queries"] for consumer in (1, 3)]
    assert all(sorted(each) == [0, 1, 2, 3] for each in moved)
    assert moved != [[0, 1, 2, 3]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", TAKERS)
def test_repair_brings_consumers_nearer_to_the_teacher(
    family: str, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family)
    ids_BT = torch.tensor(hf.load_tokenizer(teacher)(TEXT)["input_ids"])[:600].view(10, 60)
    off = []
    with torch.inference_mode():
        expected = hf.load(teacher)(ids_BT).logits
        for repair in ((), ("q",), ("q", "o", "down")):
            options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=repair)
            student = convert(teacher, tmp_path / f"r{len(repair)}", "cla", {"share": 2}, options=options)
            off.append(float((hf.load(student)(ids_BT).logits - expected).square().mean()))
    # OLMo 2 norms what attention writes, so a refit of o gains less
    assert off[2] < (1 if family == "olmo2" else 0.9) * off[0]
    changed = [Checkpoint.open(tmp_path / f"r{n}").read("model.layers.1.self_attn.q_proj.weight") for n in (0, 1)]
    assert not torch.equal(*changed)


# --- what comes before and after -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_gqa_comes_first(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Heads of each layer's own, then layers: one chain, one root, one budget."""
    teacher = tiny_checkpoint()
    options = ConvertSettings(calibration=str(text), calibration_tokens=600)
    heads = convert(teacher, tmp_path / "heads", "gqa", {"kv_heads": "4/2/1/2"}, options=options)
    planned = plan(heads, "cla", {"share": 2})
    both = convert(heads, tmp_path / "both", "cla", {"share": 2}, options=options)
    config = json.loads((both / "config.json").read_text())
    assert config["model_type"] == planned.after.model_type == "kvfold_llama"
    assert config["kv_source_layers"] == [0, 0, 2, 2]
    shape = Checkpoint.open(both).shape
    assert [each.num_key_value_heads for each in shape.sites.values()] == [4, 4, 1, 1]
    per_head = 2 * 8 * 4  # keys and values, their width, bytes
    assert planned.root_cache_bytes_per_token == 16 * per_head
    assert planned.before.cache_bytes_per_token == 9 * per_head
    assert planned.after.cache_bytes_per_token == 5 * per_head
    model: Any = hf.load(both)
    cache = hf.new_cache(model, "growing", 0)
    hf.read(model, torch.arange(20).view(2, 10), cache)
    assert hf.live_cache_bytes(cache) == 2 * 10 * 5 * per_head
    lineage = json.loads((both / "kvfold.json").read_text())
    assert [step["settings"]["method"] for step in lineage["steps"]] == ["gqa", "cla"]
    budgeted = convert(heads, tmp_path / "auto", "cla", {"layout": "auto", "budget": 0.4}, options=options)
    after = Checkpoint.open(budgeted).shape
    found = json.loads((budgeted / "kvfold.json").read_text())["steps"][-1]["found"]
    used = sum(after.sites[Site(n)].num_key_value_heads for n in range(4) if after.sites[Site(n)].source is None)
    assert used / 16 == pytest.approx(found["chosen"]["cache"])
    assert used / 16 <= 0.4
    assert found["chosen"]["kl"] <= found["alike"]["kl"]
    (line,) = (each for each in findings(Checkpoint.open(budgeted).lineage or {}) if "each layer reads" in each)
    assert found["chosen"]["layout"] in line
    assert "within 40.0% of the root" in line


def test_a_student_that_shares_is_a_source(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("qwen2")
    student = convert(teacher, tmp_path / "student", "cla", {"init": "mean"})
    same = convert(student, tmp_path / "same", "identity")
    assert Checkpoint.open(same).hash() == Checkpoint.open(student).hash()
    planned = plan(student, "identity")
    assert planned.before.model_type == "kvfold_qwen2"
    assert planned.before.cache_bytes * 2 == plan(teacher, "identity").before.cache_bytes
    for method, settings, told in (
        ("gqa", {"kv_heads": 2}, "gqa: layers of the source share keys and values; fold heads first"),
        ("cla", {"share": 4}, "cla: layers of the source share already; convert what it was made from"),
    ):
        with pytest.raises(SettingError, match=told):
            plan(student, method, settings)
    assert hf.load_tokenizer(student)("fold")["input_ids"] == hf.load_tokenizer(teacher)("fold")["input_ids"]


def test_a_plan_says_that_reads_do_not_fall(tiny_checkpoint: Callable[..., Path]) -> None:
    planned = plan(tiny_checkpoint(), "cla", {"share": 2})
    assert planned.after.cache_bytes * 2 == planned.before.cache_bytes
    assert any("saves memory but not reads" in line for line in planned.warnings)
    assert planned.after.largest_batch > 1.9 * planned.before.largest_batch
    loads = {engine.name for engine in planned.engines if engine.loads}
    assert loads == {"transformers", "vLLM"}


@pytest.mark.parametrize("engine", ["gguf", "ctranslate2"])
def test_engines_that_cannot_share_refuse(engine: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf" if engine == "gguf" else "ctranslate2")
    student = convert(tiny_checkpoint(), tmp_path / "student", "cla", {"init": "copy"})
    with pytest.raises(UnsupportedModel, match="layers share keys and values") as told:
        export(student, tmp_path / "out", engine)
    assert isinstance(told.value, KvfoldError)
    assert "\n" not in str(told.value)


def roles_of(checkpoint: Path, layer: int) -> Roles:
    source = Checkpoint.open(checkpoint)
    site = Site(layer)
    return {role: source.read(source.family.tensor(site, role)) for role in source.shape.sites[site].roles()}


def test_consumers_have_no_keys_and_values_on_disk(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("qwen3")
    student = convert(teacher, tmp_path / "student", "cla", {"init": "copy"})
    assert roles_of(student, 1).keys() == {"q", "o", "q_norm"}
    assert roles_of(student, 0).keys() == roles_of(teacher, 0).keys()
    names = Checkpoint.open(student).names()
    assert not [name for name in names if "layers.1" in name and any(part in name for part in ("k_", "v_"))]


CHAIN: dict[str, Any] = {
    "name": "chain",
    "source": "",
    "data": "",
    "heldout": "",
    "convert": {"method": "cla", "init": "copy"},
    "uptrain": {"tokens": 64, "sequence_length": 16, "batch_size": 2, "loss": "ce", "converted_only": True},
    "evaluate": {"tokens": 256, "sequence_length": 32, "copy_distances": [], "samples": 0, "fp8": False},
    "control": True,
    "bench": {"context": [8], "batch": [1], "new_tokens": 2, "repeats": 1, "fp8": False, "memory": "1M"},
    "matrix": [{"convert.share": 2, "convert.after": [None, {"method": "gqa", "kv_heads": 1}]}],
}


@pytest.mark.slow
def test_a_recipe_folds_heads_and_then_layers(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    places = {"source": str(tiny_checkpoint()), "data": str(text), "heldout": str(text)}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**CHAIN, **places}))
    page = run(tmp_path / "recipe.yaml", out=tmp_path / "run").read_text()
    records = record.read_all(tmp_path / "run")
    plans = {each.settings.get("after"): each.metrics for each in records if each.kind == "plan"}
    per_head = 2 * 4 * 8 * 4  # keys and values, layers, width, bytes
    assert plans[None]["after"]["cache_bytes_per_token"] == 4 * per_head // 2
    first = "gqa kv_heads 1"
    assert plans[first]["before"]["cache_bytes_per_token"] == 4 * per_head
    assert plans[first]["after"]["cache_bytes_per_token"] == per_head // 2
    (bench,) = (each for each in records if each.kind == "bench")
    assert [row["cache_ratio"] for row in bench.metrics["ratios"]] == [1 / 2, 1 / 8]
    assert "read the cache of another" in page
    assert "The largest batch in" in page
    marked = with_tables(f"{START.format('largest-batch chain')}\n{END}", records)
    assert "| model | context | largest batch in 976.6 KiB, weights and cache | tokens/s | of teacher |" in marked
    assert marked.count("| 8 |") == 3
    students = [each for each in records if each.settings.get("row", {}).get("role") == "student"]
    assert {each.settings["row"].get("after") for each in students} == {None, first}
    for each in students:
        before, after = cache_bytes(records, each.settings["row"])
        assert before == 4 * per_head
        assert after == plans[each.settings["row"].get("after")]["after"]["cache_bytes_per_token"]
    folders = sorted(each.name for each in (tmp_path / "run" / "converted").iterdir())
    assert folders == ["cla_init-copy_share-2", "gqa_kv_heads-1", "gqa_kv_heads-1_then_cla_init-copy_share-2"]
    for said, told in (("gqa", "a previous conversion"), ("{method: gqa, kv_heads: 3}", "3 does not divide")):
        with pytest.raises(SettingError, match=told):
            run(tmp_path / "recipe.yaml", out=tmp_path / "other", changes=["matrix=[]", f"convert.after={said}"])
    assert not (tmp_path / "other").exists()


def test_what_comes_first_reads_the_same_calibration() -> None:
    after = {"method": "gqa", "kv_heads": 2}
    said = {"method": "cla", "repair": "none", "calibration": "text", "calibration_seed": 1, "after": after}
    first, last = _chain(said)
    assert first == {**after, "calibration": "text", "calibration_seed": 1}
    assert last == said
    own, _ = _chain({**said, "after": {**after, "calibration": "another"}})
    assert own["calibration"] == "another"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "tokens"), [("headline", 24, 600_000), ("cla-layouts", 25, 150_000), ("cla-conversion", 23, None)]
)
def test_the_recipes_are_what_they_say(name: str, rows: int, tokens: int | None) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    found = cells(recipe)
    assert recipe.name == name
    assert len({row.label for row in found}) == len(found) == rows
    assert {row.uptrain["tokens"] if row.uptrain else None for row in found} == {tokens}
    assert len({fingerprint([dict(row.convert), dict(row.uptrain or {}), row.seed]) for row in found}) == rows
    for row in found:
        *before, last = (_method(settings) for settings in _chain(row.convert))
        planned = plan(recipe.source, *last, after=before)
        assert planned.after.cache_bytes < planned.before.cache_bytes
