"""supra: its students against textbooks written from the papers, its cache layer, its plan, its stages, LoRA."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvfold import hf
from kvfold.calibrate.recall import copies, measure_recall
from kvfold.contracts.requests import RecallDrop
from kvfold.contracts.site import Shape, Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.evaluate.evaluation import EvaluateSettings, evaluate
from kvfold.families import all_families
from kvfold.hf.linear_cache import LinearLayer
from kvfold.methods import supra
from kvfold.predict.plan import plan
from kvfold.report import report
from kvfold.text.copies import SPAN
from kvfold.text.tokens import token_file
from kvfold.train.uptrain import UptrainSettings, uptrain
from tolerance import assert_same

HYBRID: dict[str, Any] = {"preset": "hybrid", "window": 4, "sinks": 2}


pytestmark = pytest.mark.usefixtures("alone")


def shape_of(family: str, **changes: Any) -> Shape:
    found = all_families()[family]
    return found.shape({**found.tiny(), **changes})


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, 90, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def randomised(model: Any) -> Any:
    """Maps, biases and gates that are no identity, other ones in each layer."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "phi" in name or "window_gate" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


# --- what a student computes ---------------------------------------------------------------------------------------


def rotated(heads_BHTE: Tensor, theta: float = 10000.0) -> Tensor:
    """Half-split planes turned by their position."""
    half = heads_BHTE.shape[-1] // 2
    angle_TP = torch.arange(heads_BHTE.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = heads_BHTE[..., :half], heads_BHTE[..., half:]
    return torch.cat(
        [first * angle_TP.cos() - second * angle_TP.sin(), first * angle_TP.sin() + second * angle_TP.cos()], dim=-1
    )


@torch.inference_mode()
def test_the_published_layer_from_its_formula(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """SUPRA, eq. 3-5, as its code has it: maps, ReLU, rotation, decay, GroupNorm; two query heads a key head."""
    teacher = tiny_checkpoint("llama", tokenizer=False, num_key_value_heads=2)
    model = randomised(hf.load(convert(teacher, tmp_path / "student", "supra")))
    layer, tokens = model.model.layers[1].self_attn, 19
    hidden_BTD = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(0))
    rotation = model.model.rotary_emb(hidden_BTD, torch.arange(tokens)[None])
    found = layer(hidden_BTD, position_embeddings=rotation)[0]

    def heads(linear: nn.Linear) -> Tensor:
        return linear(hidden_BTD).view(2, tokens, -1, 8).transpose(1, 2)

    maps_GFE, bias_GF = layer.phi.weight.view(2, 8, 8), layer.phi.bias.view(2, 8)
    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    outputs = []
    for head in range(4):
        group = head // 2
        phi_q, phi_k = (
            rotated(torch.relu(rows @ maps_GFE[group].T + bias_GF[group])[:, None])[:, 0]
            for rows in (q[:, head], k[:, group])
        )
        gamma = math.exp(-(2 ** (-8 * (group + 1) / 2)))
        state, rows = torch.zeros(2, 8, 8), []
        for token in range(tokens):
            state = gamma * state + phi_k[:, token, :, None] * v[:, group, token, None, :]
            rows.append((phi_q[:, token, None] @ state)[:, 0])
        outputs.append(torch.stack(rows, dim=1))
    merged = torch.cat(outputs, dim=-1)
    normed = nn.GroupNorm(4, 32, affine=False)(merged.flatten(0, 1)).view(2, tokens, 32)
    assert_same(found, layer.o_proj(normed))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_without_features_it_is_the_teacher_behind_a_mask(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family, tokenizer=False)
    student: Any = hf.load(convert(teacher, tmp_path / "student", "supra", {**HYBRID, "features": "none"}))
    step_TT = torch.arange(21)[:, None] - torch.arange(21)
    seen_TT = (step_TT >= 0) & ((step_TT < 4) | (torch.arange(21) < 2))
    whole: Any = hf.load(teacher, attention="eager")
    mask_11TT = torch.zeros(21, 21).masked_fill(~seen_TT, -torch.inf)[None, None]
    given = mask_11TT if family != "qwen3" else {"full_attention": mask_11TT}
    expected = whole(ids(1, 21), attention_mask=given).logits
    assert_same(student(ids(1, 21)).logits, expected)
    assert not any("phi" in name or "window_gate" in name for name in student.state_dict())


@pytest.mark.slow
@torch.inference_mode()
def test_without_its_sums_it_is_the_student_that_never_had_them(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False)
    load: Any = hf.load
    hybrid, window, published = (
        load(convert(teacher, tmp_path / name, "supra", settings))
        for name, settings in (
            ("hybrid", {**HYBRID, "gate": 0.1}),
            ("window", {**HYBRID, "features": "none"}),
            ("supra", {}),
        )
    )
    assert [hf.removable(each) for each in (hybrid, window, published)] == [["sums"], [], []]
    before = hybrid(ids(2, 21)).logits
    with hf.without(hybrid, "sums"):
        found, written = hybrid(ids(2, 21)).logits, hf.generate(hybrid, ids(2, 9), max_new_tokens=6)
    assert_same(found, window(ids(2, 21)).logits)
    assert torch.equal(written, hf.generate(window, ids(2, 9), max_new_tokens=6))
    assert float((found - before).abs().max()) > 1e-3
    assert torch.equal(hybrid(ids(2, 21)).logits, before)


@pytest.mark.slow
def test_an_evaluation_says_what_the_sums_bring(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama")
    settings = EvaluateSettings(
        data=str(text), tokens=200, sequence_length=40, copy_distances=(8,), copy_trials=4, samples=0, fp8=False
    )
    made = {}
    for name, said in (("hybrid", {**HYBRID, "gate": 0.1}), ("window", {**HYBRID, "features": "none"})):
        student = convert(teacher, tmp_path / name, "supra", said)
        made[name] = evaluate(student, settings, teacher=teacher, records=tmp_path).metrics
    left = made["hybrid"]["without"]["sums"]
    assert left["loss"] == pytest.approx(made["window"]["loss"], rel=1e-6)
    assert left["copy_loss"]["8"] == pytest.approx(made["window"]["copy_loss"]["8"], rel=1e-6)
    assert left["loss"] != pytest.approx(made["hybrid"]["loss"], rel=1e-6)
    assert "without" not in made["window"]
    page = report(tmp_path).read_text(encoding="utf-8")
    assert "without its sums" in page


@torch.inference_mode()
def test_a_window_is_the_teacher_until_something_leaves_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False)
    student: Any = hf.load(convert(teacher, tmp_path / "student", "supra", {"preset": "hybrid", "window": 9}))
    whole: Any = hf.load(teacher)
    assert torch.equal(student(ids(2, 9)).logits, whole(ids(2, 9)).logits)
    found, expected = student(ids(2, 14)).logits, whole(ids(2, 14)).logits
    assert_same(found[:, :9], expected[:, :9])
    assert float((found[:, 13] - expected[:, 13]).abs().max()) > 1e-3


@pytest.mark.slow
@torch.inference_mode()
def test_every_combination_of_parts_decodes_what_it_read(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("qwen2", tokenizer=False, num_key_value_heads=2)
    combinations: list[dict[str, Any]] = [
        {"decay": "retnet"},
        {"rope": "before", "norm": "denominator", "feature_dim": 6},
        {"preset": "hybrid", "window": 0, "sinks": 0, "feature_dim": 4},
        {**HYBRID, "features": "relu", "decay": "slopes", "keep_layers": "0,3"},
    ]
    for number, settings in enumerate(combinations):
        model = randomised(hf.load(convert(teacher, tmp_path / f"student-{number}", "supra", settings)))
        cache = hf.new_cache(model, "growing", 20)
        parts = [model(part, past_key_values=cache).logits for part in ids(2, 17).split([7, 1, 1, 5, 1, 1, 1], dim=1)]
        assert_same(torch.cat(parts, dim=1), model(ids(2, 17)).logits)


# --- the cache layer -----------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{}, HYBRID, {**HYBRID, "features": "none"}], ids=["supra", "hybrid", "window"])
def test_tokens_are_taken_back_as_if_never_read(
    settings: dict[str, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False)
    model: Any = hf.load(convert(teacher, tmp_path / "student", "supra", settings))
    text, other = ids(2, 20), ids(2, 8)
    for before in (1, 10):  # also while sinks are not all there
        cache = hf.new_cache(model, "growing", 20)
        model(text[:, :before], past_key_values=cache)
        cache.activate_past_recording()
        model(other[:, :3], past_key_values=cache)
        model(other[:, 3:4], past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == before
        model(torch.cat([text[:, before : before + 6], other], dim=1), past_key_values=cache)
        cache.crop(-8)
        found = model(text[:, before + 6 :], past_key_values=cache).logits
        assert_same(found, model(text).logits[:, before + 6 :])


@torch.inference_mode()
def test_what_is_in_the_sums_cannot_be_taken_back(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = hf.load(convert(tiny_checkpoint("llama", tokenizer=False), tmp_path / "student", "supra", HYBRID))
    cache = hf.new_cache(model, "growing", 20)
    model(ids(1, 12), past_key_values=cache)
    with pytest.raises(SettingError, match=r"cannot remove 2 tokens.*activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(SettingError, match="cannot be filled from outside"):
        LinearLayer().update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(ids(1, 12), past_key_values=cache).logits
    assert_same(again, model(ids(1, 12)).logits)


@torch.inference_mode()
def test_a_cache_does_not_grow_and_its_sums_are_wide(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("llama", tokenizer=False, num_key_value_heads=2)
    for name, settings, elements in (
        ("supra", {}, (0, 2 * 8 * 8)),
        ("hybrid", HYBRID, (2 * 2 * 8 * (4 + 2), 2 * 16 * (8 + 1))),
    ):
        student = convert(teacher, tmp_path / name, "supra", settings)
        model: Any = hf.load(student, dtype="bfloat16")
        cache = hf.new_cache(model, "growing", 200)
        model(ids(3, 12), past_key_values=cache)
        held = hf.live_cache_bytes(cache)
        assert held == 4 * 3 * (2 * elements[0] + 4 * elements[1])  # 4 layers, 3 rows, bfloat16 and float32
        model(ids(3, 40), past_key_values=cache)
        model(ids(3, 1), past_key_values=cache)
        assert hf.live_cache_bytes(cache) == held
        shape = Checkpoint.open(teacher).shape
        assert supra.METHOD.cache_spec(supra.Config(**settings), shape).bytes(60, batch=3, itemsize=2) == held


def test_a_mask_that_is_more_than_padding_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model: Any = hf.load(convert(tiny_checkpoint("llama", tokenizer=False), tmp_path / "student", "supra"))
    with pytest.raises(SettingError, match="supports only padding masks"):
        model(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_says_below_which_length_the_state_is_larger(tiny_checkpoint: Callable[..., Path]) -> None:
    """Per layer of 4 heads of 8 in float32: 64 numbers a token, against 256 of SUPRA's sums."""
    teacher = tiny_checkpoint("llama", tokenizer=False)
    (said,) = plan(teacher, "supra").warnings[-1:]
    assert "below 4 tokens the cache is larger" in said
    assert "sums take 4,096 bytes a sequence" in said
    hybrid = plan(teacher, "supra", {"preset": "hybrid", "window": 64, "sinks": 4})
    # 4 heads x 16 x 9 numbers, and a window and sinks of 64 a token: (576 + 64 * 68) / 64
    assert any("below 77 tokens" in line for line in hybrid.warnings)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("t5", {}, "only causal self-attention with RoPE"),
        ("llama", {"model_type": "mistral", "sliding_window": 16}, "a sliding window bounds its cache"),
        (
            "llama",
            {"model_type": "kvfold_llama", "kv_source_layers": [0, 0, 2, 2]},
            "layer 1: it reads the keys and values of another layer",
        ),
    ],
)
def test_attention_that_bounds_itself_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        supra.Config().check(shape_of(family, **changes))


def test_layers_that_copying_needs_most_stay() -> None:
    shape = shape_of("llama")
    config = supra.Config(preset="hybrid", window=8, keep_layers="auto:2")
    asked = supra.METHOD.needs(config, shape)
    assert {(each.window, each.sinks) for each in asked if isinstance(each, RecallDrop)} == {(8, 4)}
    answers: Any = {each: {"drop": torch.tensor(drop)} for each, drop in zip(asked, (0.1, 0.9, -0.2, 0.3), strict=True)}
    resolved = supra.METHOD.resolve(config, shape, answers)
    assert resolved.keep_layers == "1,3"
    assert supra.METHOD.found(config, shape, answers)["recall_drops"]["layer 1"] == pytest.approx(0.9)
    assert supra.METHOD.groups(resolved, shape) == [(Site(0),), (Site(2),)]
    assert supra.METHOD.cache_spec(config, shape).bytes(99) == supra.METHOD.cache_spec(resolved, shape).bytes(99)


def test_recall_is_measured_on_copies(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint("llama"))
    tokens = token_file(text, source.path, max_tokens=3000)
    rows_BT = copies(tokens, 64, 256)
    assert rows_BT.shape == (4, 64)
    assert torch.equal(rows_BT[:, :SPAN], rows_BT[:, -SPAN:])
    near, far = RecallDrop(Site(1), 3, 1, 256), RecallDrop(Site(1), 256, 0, 256)
    found = measure_recall(source, [near, far], tokens)
    assert float(found[far]["drop"]) == pytest.approx(0, abs=1e-5)  # it sees everything, through a mask
    assert abs(float(found[near]["drop"])) > 1e-4
    options = ConvertSettings(calibration=str(text), calibration_tokens=3000)
    settings = {**HYBRID, "keep_layers": "auto:3", "recall_tokens": 256}
    student = Checkpoint.open(convert(source.path, tmp_path / "student", "supra", settings, options=options))
    linear = [site.layer for site, attention in student.shape.sites.items() if attention.linear is not None]
    assert student.lineage is not None
    drops = student.lineage["steps"][-1]["found"]["recall_drops"]
    assert linear == [min(range(4), key=lambda layer: drops[f"layer {layer}"])]


# --- training ------------------------------------------------------------------------------------------------------


def test_stages_follow_the_settings() -> None:
    assert supra.METHOD.stages(supra.Config()) == ()
    transfer, distil = supra.METHOD.stages(supra.Config(preset="hybrid"))
    assert transfer.trainable == ("phi_q", "phi_k", "window_gate")
    assert (transfer.taught, distil.taught, distil.trainable) == (True, False, ())
    assert transfer.share + distil.share == pytest.approx(1)
    assert supra.METHOD.stages(supra.Config(preset="hybrid", features="relu", window=0, sinks=0))[0].trainable == (
        "phi",
        "phi_bias",
    )
    assert [stage.name for stage in supra.METHOD.stages(supra.Config(preset="hybrid", features="none"))] == ["distil"]


def trained(student: Path, out: Path, text: Path, **settings: Any) -> Checkpoint:
    told = {"sequence_length": 16, "batch_size": 4, "tokens": 8 * 64, "log_every": 1, "precision": "fp32", **settings}
    return Checkpoint.open(uptrain(student, out, UptrainSettings(data=str(text), **told)))


@pytest.mark.slow
def test_attention_is_handed_over_first_by_maps_and_gates_alone(
    tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "supra", {**HYBRID, "gate": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        first = dataclasses.replace(supra.METHOD.stages(supra.Config(preset="hybrid"))[0], share=1.0)
        patch.setattr(supra.METHOD, "stages", lambda config: (first,))
        handed = trained(student, tmp_path / "handed", text, tokens=16 * 64)
    before = Checkpoint.open(student)
    moved = {name.rsplit("self_attn.")[-1] for name in before.names() if not before.read(name).equal(handed.read(name))}
    assert moved == {"phi_q.weight", "phi_k.weight", "window_gate"}
    lines = [json.loads(line) for line in (handed.path / "train.jsonl").read_text().splitlines()]
    losses = [line["attention"] for line in lines if "attention" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    whole = trained(student, tmp_path / "whole", text)
    assert all(not before.read(name).equal(whole.read(name)) for name in before.names())


@pytest.mark.slow
def test_lora_is_merged_into_what_is_saved(tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("llama", num_key_value_heads=2), tmp_path / "student", "supra", HYBRID)
    before = Checkpoint.open(student)
    after = trained(student, tmp_path / "trained", text, lora=2, learning_rate=1e-2)
    assert sorted(after.names()) == sorted(before.names())
    for name in before.names():
        change = after.read(name) - before.read(name)
        if any(f"{role}_proj" in name for role in "qkvo"):
            assert 0 < int(torch.linalg.matrix_rank(change.double(), rtol=1e-4)) <= 2
        else:
            assert bool(change.any()) == ("phi" in name or "window_gate" in name), name
    again = trained(student, tmp_path / "again", text, lora=2, learning_rate=1e-2)
    assert again.hash() == after.hash()


def test_lora_has_no_roles_of_its_own() -> None:
    with pytest.raises(SettingError, match=r"lora trains factors.*rank 2, and trainable q"):
        UptrainSettings(data="stdlib", tokens=1, lora=2, trainable=("q",))
    with pytest.raises(SettingError, match=r"lora must be at least 1 \(got 0\)"):
        UptrainSettings(data="stdlib", tokens=1, lora=0)
