"""dha: its start is the teacher, its end plain heads; groups, budgets and bases; a run that stops in any stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvfold import hf
from kvfold.contracts.method import Trained
from kvfold.contracts.per_layer import PerSite
from kvfold.contracts.site import Shape, Site
from kvfold.contracts.stages import Learner
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import queries_since_root
from kvfold.errors import SettingError
from kvfold.families import all_families
from kvfold.methods import dha
from kvfold.predict.plan import plan
from kvfold.train.uptrain import UptrainSettings, uptrain
from plug import Plug

pytestmark = pytest.mark.usefixtures("alone")

IDS_BT = torch.arange(34).view(2, 17) + 40
STEPS = 8
SHARES = {"search": 0.25, "fusion": 0.5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


def shape_of(family: str, **changes: Any) -> Shape:
    found = all_families()[family]
    return found.shape({**found.tiny(), **changes})


def settings_of(text: Path, **changes: Any) -> UptrainSettings:
    given: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "tokens": STEPS * 64, "log_every": 1}
    return UptrainSettings(data=str(text), **{**given, "precision": "fp32", **changes})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()][:-1]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(IDS_BT).logits
    return found


def kept_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of the model in training when it is saved."""
    found: list[Tensor] = []
    original = dha.DHA.trained

    def trained(self: dha.DHA, student: Learner, config: dha.Config) -> Trained:
        found.append(logits(student.model))
        return original(self, student, config)

    monkeypatch.setattr(dha.DHA, "trained", trained)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mixtral"])
def test_fusion_starts_at_the_teacher_to_the_last_bit(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint(family, tokenizer=False))
    model = hf.load(source.path)
    expected = logits(model)
    student, config = Learner(model, source.shape, source.family.tensor), dha.METHOD.example(source.shape)
    dha.METHOD.begin(student, config)
    assert torch.equal(logits(model), expected)
    dha.METHOD.end("search", student, config)
    assert torch.equal(logits(model), expected)
    dha.METHOD.end("fusion", student, config)
    assert not torch.equal(logits(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi", "gpt_oss"])
def test_plain_heads_compute_what_the_fused_model_does(
    family: str, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint(family)
    student = convert(teacher, tmp_path / "student", "dha", {"kv_heads": 2, **SHARES})
    assert Checkpoint.open(student).hash() == Checkpoint.open(teacher).hash(), "plain heads start as the teacher"
    last = kept_logits(monkeypatch)
    out = uptrain(student, tmp_path / "out", settings_of(text, learning_rate=3e-3))
    lines = lines_of(out)
    assert [line["stage"] for line in lines] == ["search"] * 2 + ["fusion"] * 4 + ["after"] * 2
    assert lines[0]["kl"] == 0
    assert lines[2]["kl"] == 0, "the search leaves the weights as they are"
    assert lines[-1]["kl"] > 0
    assert [("penalty" in line) for line in lines] == [False] * 2 + [True] * 4 + [False] * 2
    made = Checkpoint.open(out)
    assert made.config["model_type"] == Checkpoint.open(teacher).config["model_type"], "stock engines load it"
    assert {each.num_key_value_heads for each in made.shape.sites.values()} == {2}
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), last[0], rtol=1e-4, atol=1e-5)
    found = json.loads((out / "kvfold.json").read_text())["steps"][-1]["found"]
    assert found["kv_heads"] == 2
    assert all(
        sorted(head for heads in groups for head in heads) == [0, 1, 2, 3] for groups in found["groups"].values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_oss"])
def test_keys_and_values_may_keep_groups_of_their_own(
    family: str, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"kv_heads": "2/1/2/4", "value_heads": 2, "servable": False, **SHARES}
    student = convert(tiny_checkpoint(family), tmp_path / "student", "dha", settings)
    last = kept_logits(monkeypatch)
    out = uptrain(student, tmp_path / "out", settings_of(text, learning_rate=3e-3))
    made = Checkpoint.open(out)
    assert made.config["model_type"].startswith("kvfold_")
    heads = [(each.num_key_value_heads, each.num_value_heads) for each in made.shape.sites.values()]
    assert heads == [(2, 2), (1, 2), (2, 2), (4, 2)]
    for loaded in (AutoModelForCausalLM.from_pretrained(out), hf.load(out)):
        torch.testing.assert_close(logits(loaded), last[0], rtol=1e-4, atol=1e-5)
    found = json.loads((out / "kvfold.json").read_text())["steps"][-1]["found"]
    assert (found["kv_heads"], found["value_heads"]) == ("2/1/2/4", 2)
    for site, attention in made.shape.sites.items():  # each query head reads the value head of its group
        order = [head for group in found["groups"][str(site)] for head in group]
        of = {head: number for number, group in enumerate(found["value_groups"][str(site)]) for head in group}
        read = tuple(of[head] for head in order)
        assert attention.value_heads in (read, None)
        assert attention.value_heads is not None or found["groups"][str(site)] == found["value_groups"][str(site)]


def test_groups_of_values_follow_their_own_distances(tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))
    learner = Learner(hf.load(source.path), source.shape, source.family.tensor)
    config = dha.Config(kv_heads=PerSite.parse(2), servable=False)
    dha.METHOD.begin(learner, config)
    alike = {"k": ([0, 3], [1, 2]), "v": ([0, 2], [1, 3])}
    with torch.no_grad():
        for site in source.shape.sites:
            for role, groups in alike.items():
                fusion = learner.map(site, role).fusion.view(4, 4, -1)
                for heads in groups:
                    fusion[heads] = fusion[heads].mean(0)
    dha.METHOD.end("search", learner, config)
    for site in source.shape.sites:
        assert {role: tuple(learner.map(site, role).groups()) for role in "kv"} == alike
    dha.METHOD.end("fusion", learner, config)
    made = dha.METHOD.trained(learner, config)
    assert {each.value_heads for each in made.shape.sites.values()} == {(0, 1, 1, 0)}
    firsts = learner.whole(Site(0), "v").unflatten(0, (4, 8))[[0, 1]].flatten(0, 1)
    assert torch.equal(made.roles[Site(0)]["v"], firsts)


def test_a_budget_gives_values_other_numbers_than_keys(tiny_checkpoint: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama", tokenizer=False))
    learner = Learner(hf.load(source.path), source.shape, source.family.tensor)
    config = dha.Config(kv_heads="auto", budget=0.625, servable=False)
    dha.METHOD.begin(learner, config)
    with torch.no_grad():
        for site in source.shape.sites:  # values are almost equal, keys are apart
            fusion = learner.map(site, "v").fusion
            fusion.copy_(1e-2 * torch.rand(fusion.shape, generator=torch.Generator().manual_seed(1)))
    dha.METHOD.end("search", learner, config)
    counts = [[len(learner.map(site, role).groups()) for role in "kv"] for site in source.shape.sites]
    assert counts == [[4, 1]] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("constraint", "left"), [("lagrangian", 0.01), ("schedule", 1e-10)])
def test_fused_heads_draw_together(
    constraint: str,
    left: float,
    tiny_checkpoint: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The spread vanishes in the fusion stage: the penalty takes steps of 0.05, and the schedule ends at 0."""
    settings = {"kv_heads": 1, "search": 0.0, "fusion": 1.0, "constraint": constraint}
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "dha", settings)
    spreads: list[float] = []
    original = dha.DHA.end

    def end(self: dha.DHA, finish: str, learner: Learner, config: dha.Config) -> None:
        spreads.append(learner.map(Site(0), "k").spread().item())
        original(self, finish, learner, config)

    monkeypatch.setattr(dha.DHA, "end", end)
    last = kept_logits(monkeypatch)
    steps = 60 if constraint == "lagrangian" else STEPS
    trained = settings_of(text, learning_rate=5e-4, schedule="constant", tokens=steps * 64)
    out = uptrain(student, tmp_path / "out", trained)
    assert spreads[0] == 1
    assert spreads[1] < left
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), last[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_stops_in_any_stage_ends_as_if_it_had_not(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama", tie_word_embeddings=True)
    student = convert(teacher, tmp_path / "student", "dha", {"kv_heads": "auto", "budget": 0.5, **SHARES})
    settings = settings_of(text, learning_rate=3e-3)
    whole = uptrain(student, tmp_path / "whole", settings)

    for steps in (1, 2, 1, 2, 1):  # in the search, at its end, in the fusion, near its end, in plain heads
        with pytest.raises(RuntimeError, match="pulled the plug"):
            uptrain(student, tmp_path / "cut", replace(settings, checkpoint_steps=1), progress=Plug(steps + 1))
    cut = uptrain(student, tmp_path / "cut", settings)
    ours, theirs = load_file(cut / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["stage"] for line in lines_of(cut)] == [line["stage"] for line in lines_of(whole)]


@pytest.mark.slow
def test_fusion_ends_when_the_spread_has_vanished_and_plain_heads_get_its_tokens(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama")
    shares = {"kv_heads": 1, "search": 0.0, "fusion": 0.75, "tolerance": 0.1}
    student = convert(teacher, tmp_path / "student", "dha", shares)
    settings = settings_of(text, learning_rate=5e-4, schedule="cosine", tokens=60 * 64)
    whole = uptrain(student, tmp_path / "whole", settings)
    stages = [line["stage"] for line in lines_of(whole)]
    fused = stages.count("fusion")
    assert stages == ["fusion"] * fused + ["after"] * (60 - fused)
    assert 0 < fused < 45
    rates = [line["lr"] for line in lines_of(whole)[fused:]]
    assert rates[-1] < 0.1 * max(rates), "the schedule of the last stage knows of its new steps"

    for steps in (fused - 1, 1, 1, 20):  # before the last step of the fusion, after it, and in plain heads
        with pytest.raises(RuntimeError, match="pulled the plug"):
            uptrain(student, tmp_path / "cut", replace(settings, checkpoint_steps=1), progress=Plug(steps + 1))
    cut = uptrain(student, tmp_path / "cut", settings)
    assert [line["stage"] for line in lines_of(cut)] == stages
    ours, theirs = load_file(cut / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    never = convert(teacher, tmp_path / "never", "dha", {**shares, "tolerance": 0.0})
    stages = [line["stage"] for line in lines_of(uptrain(never, tmp_path / "out", settings))]
    assert stages == ["fusion"] * 45 + ["after"] * 15


@pytest.mark.slow
def test_a_budget_goes_to_the_layers_whose_heads_are_apart(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama")
    settings = {"kv_heads": "auto", "budget": 0.5, "search": 1.0, "fusion": 0.0}
    student = convert(teacher, tmp_path / "student", "dha", settings)
    shape = Checkpoint.open(student).shape
    model = hf.load(student)
    learner = Learner(model, shape, Checkpoint.open(student).family.tensor)
    config = dha.Config(kv_heads="auto", budget=0.5, fusion=0.0)
    dha.METHOD.begin(learner, config)
    with torch.no_grad():
        for site in shape.sites:
            for role in "kv":  # weights that stay apart in layer 0, and are almost equal in the others
                fusion = learner.map(site, role).fusion
                fusion.copy_(torch.rand(fusion.shape, generator=torch.Generator().manual_seed(1)))
                if site.layer:
                    fusion.mul_(1e-2)
    dha.METHOD.end("search", learner, config)
    counts = [len(learner.map(site, "k").groups()) for site in shape.sites]
    assert counts[0] == 4
    assert sum(counts) <= 8
    out = uptrain(student, tmp_path / "out", settings_of(text))
    made = Checkpoint.open(out)
    assert sum(each.num_key_value_heads for each in made.shape.sites.values()) <= 8
    assert logits(AutoModelForCausalLM.from_pretrained(out)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_aligned_heads_compute_the_same_and_have_the_mean_of_align(
    family: str, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family)
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=())
    settings = {"kv_heads": 2, "init": "align", "fusion": 0.0}
    student = convert(teacher, tmp_path / "student", "dha", settings, options=options)
    torch.testing.assert_close(logits(hf.load(student)), logits(hf.load(teacher)), rtol=1e-4, atol=1e-4)
    source = Checkpoint.open(student)
    assert source.hash() != Checkpoint.open(teacher).hash()
    out = uptrain(student, tmp_path / "out", settings_of(text, tokens=64, learning_rate=1e-12))
    expected = convert(teacher, tmp_path / "gqa", "gqa", {"kv_heads": 2, "init": "align"}, options=options)
    torch.testing.assert_close(logits(hf.load(out)), logits(hf.load(expected)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("settings", "part"), [({"kv_heads": 1}, 0.25), ({"kv_heads": "auto", "budget": 0.5}, 0.5)])
def test_the_plan_says_what_uptraining_ends_in(
    settings: dict[str, Any], part: float, tiny_checkpoint: Callable[..., Path]
) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False)
    made = plan(teacher, "dha", settings)
    assert (made.cache_ratio, made.before) == (1, made.after)
    assert made.trained is not None
    assert made.trained.cache_bytes == part * made.before.cache_bytes
    if part == 0.25:
        assert made.trained == plan(teacher, "gqa", settings).after
    (row,) = [row for row in made.rows() if "uptraining" in row[0]]
    assert row[2].endswith(f"({part:.1%})")
    assert plan(teacher, "gqa", {"kv_heads": 1}).trained is None


def test_the_plan_counts_value_heads(tiny_checkpoint: Callable[..., Path]) -> None:
    made = plan(tiny_checkpoint("llama", tokenizer=False), "dha", {"kv_heads": 1, "value_heads": 2, "servable": False})
    assert made.trained is not None
    assert made.trained.cache_bytes * 8 == 3 * made.before.cache_bytes
    assert (made.trained.model_type, made.trained.kv_heads) == ("kvfold_llama", "1 of keys, 2 of values")


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        ("llama", {"kv_heads": 3}, "kv_heads 3 does not divide the 4 query heads of layer 0; choose 1, 2 or 4"),
        ("llama", {"kv_heads": 2, "fusion_rate": 0.0}, "fusion_rate must be at least 1"),
        ("llama", {"kv_heads": "auto"}, "kv_heads auto needs a budget"),
        ("llama", {"kv_heads": 2, "budget": 0.5}, "budget does not apply to kv_heads 2"),
        ("llama", {"kv_heads": 2, "search": 0.7, "fusion": 0.4}, "shares of the tokens.*0.7 and 0.4.*at most 1"),
        ("llama", {"kv_heads": "auto", "budget": 0.5, "init": "align"}, "needs the groups"),
        ("llama", {"kv_heads": 2, "value_heads": 1}, "value_heads does not apply with servable.*add --no-servable"),
        ("llama", {"kv_heads": 2, "value_heads": 3, "servable": False}, "value_heads 3 does not divide the 4 query"),
        ("llama", {"kv_heads": "auto", "value_heads": 1, "servable": False}, "does not apply with kv_heads auto"),
        ("llama", {"kv_heads": 2, "init": "align", "servable": False}, "same groups; leave out --no-servable"),
        ("stablelm", {"kv_heads": 2, "servable": False}, "stablelm has no classes for value heads"),
        ("olmo2", {"kv_heads": 2}, "layer 0: a norm over all heads.*choose gqa"),
        ("qwen3", {"kv_heads": 2, "init": "align"}, "keys are normed"),
        ("gpt_neox", {"kv_heads": 2}, "no maps of q, k, v and o of their own"),
        ("t5", {"kv_heads": 2}, "no maps of q, k, v and o of their own"),
    ],
)
def test_what_cannot_be_fused_is_refused(family: str, settings: dict[str, Any], match: str) -> None:
    shape = shape_of(family)
    kv_heads = settings["kv_heads"] if settings["kv_heads"] == "auto" else PerSite.parse(settings["kv_heads"])
    heads = {name: PerSite.parse(settings[name]) for name in ("value_heads",) if name in settings}
    with pytest.raises(SettingError, match=match):
        dha.Config(**{**settings, **heads, "kv_heads": kv_heads}).check(shape)


def test_settings_that_the_stages_decide_are_refused(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "dha", {"kv_heads": 2})
    for name, value in {"lora": 2, "trainable": ("q",), "converted_only": True, "stages": "kl:1.0"}.items():
        with pytest.raises(
            SettingError, match=f"the stages of the method decide what trains, and {name} does not apply"
        ):
            uptrain(student, tmp_path / "out", settings_of(text, **{name: value}))


@pytest.mark.slow
@pytest.mark.parametrize("servable", [True, False])
def test_what_was_handed_over_is_repaired_towards_the_root_teacher(
    servable: bool, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """By the command for a copy, whose teacher is that of the source; q knows the order of the teacher's heads."""
    teacher = tiny_checkpoint("llama", num_attention_heads=8, head_dim=8, num_key_value_heads=4)
    settings = {"kv_heads": 2, "servable": servable, "search": 0.5, "fusion": 0.5}
    student = convert(teacher, tmp_path / "student", "dha", settings)
    trained = uptrain(student, tmp_path / "trained", settings_of(text, learning_rate=1e-5))
    handed = Checkpoint.open(trained)
    source = Checkpoint.open(teacher)
    order = queries_since_root(handed)
    for site in source.shape.sites:
        ours, theirs = (each.roles(site).roles["q"].unflatten(0, (8, 8)) for each in (handed, source))
        torch.testing.assert_close(ours, theirs[order[site]], rtol=0, atol=1e-3)
    ids_BT = torch.tensor([hf.load_tokenizer(teacher)(text.read_text()[:1024])["input_ids"]]).view(8, -1)

    def read(folder: Path) -> Tensor:
        with torch.inference_mode():
            found: Tensor = hf.load(folder)(ids_BT).logits
        return found

    lost = [torch.dist(read(trained), read(teacher))]
    for roles in (("o", "down"), ("q", "o", "down")):
        options = ConvertSettings(calibration=str(text), calibration_tokens=2000, repair=roles)
        repaired = convert(trained, tmp_path / "-".join(roles), "identity", options=options)
        assert Checkpoint.open(repaired).shape == handed.shape
        lost.append(torch.dist(read(repaired), read(teacher)))
    assert max(lost[1:]) < lost[0] / 4
