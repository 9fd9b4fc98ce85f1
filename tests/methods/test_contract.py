"""The contract of a method, held over every method and family that is discovered, and by a toy that needs all of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from examples import CORE, example, read
from kvfold import hf, methods
from kvfold.calibrate.decoder import calibrate
from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.method import Method, Student
from kvfold.contracts.per_layer import PerSite, spelled
from kvfold.contracts.requests import Answers, AttentionGram, CrossGram, HeadKL, InputGram, QueryGram, Request
from kvfold.contracts.site import REPAIRABLE, Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import Learner, Stage
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.methods import gqa
from kvfold.predict.plan import PlanSettings, plan
from kvfold.text.tokens import token_file
from kvfold.train.uptrain import UptrainSettings, uptrain

METHODS = methods.all_methods()
AUTO = {
    name: AutoModelForSpeechSeq2Seq
    if family.audio
    else AutoModelForSeq2SeqLM
    if family.encoder_decoder
    else AutoModelForCausalLM
    for name, family in all_families().items()
}
SIMPLE = (str, int, float, bool, type(None), PerSite)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


def shape_of(family: str) -> Shape:
    found = all_families()[family]
    return found.shape(found.tiny())


def takes(method: str, family: str) -> bool:
    """Does the method take this family? What it refuses is told in its own tests."""
    shape = shape_of(family)
    try:
        for settings in (METHODS[method].lossless, METHODS[method].example):
            methods.check(method, settings(shape), shape)
    except (SettingError, UnsupportedModel):
        return False
    return True


def met(first: int, whole: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Pairs of every family of `whole` with every method, and of each other family with one, from `first` on."""
    found = [pair for pair in PAIRS if pair[1] in whole]
    for n, family in enumerate(name for name in all_families() if name not in whole):
        taken = [pair for pair in PAIRS if pair[1] == family]
        found.append(taken[(first + n) % len(taken)])
    return found


PAIRS = [(method, family) for method in METHODS for family in all_families() if takes(method, family)]


def drawn(shape: Shape, group: Sequence[Site], seed: int = 0) -> dict[Site, SiteTensors]:
    """A group of sites with random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: SiteTensors(
            shape.sites[site],
            {role: torch.randn(form, generator=generator) for role, form in shape.sites[site].roles().items()},
        )
        for site in group
    }


# --- every method, every family -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_settings_become_flags(name: str) -> None:
    method = METHODS[name]
    assert dataclasses.is_dataclass(method.Config)
    assert method.Config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    hints = get_type_hints(method.Config)
    for each in dataclasses.fields(method.Config):
        assert each.metadata.get("help"), f"{name}.{each.name} has no help"
        plain = [hints[each.name], *get_args(hints[each.name])]
        assert any(kind in SIMPLE for kind in plain) or get_origin(hints[each.name]) is Literal, each.name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name: str) -> None:
    text = sys.modules[f"kvfold.methods.{name}"].__doc__ or ""
    assert text.startswith(f"{name}: "), "the first line becomes the line of `kvfold methods`"
    for word in ("cache", "lossless"):
        assert word in text.lower(), f"the docstring of {name} says nothing of {word}"


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_the_words_of_a_method_agree_with_each_other(name: str, family: str) -> None:
    method, shape = METHODS[name], shape_of(family)
    config = method.lossless(shape)
    config.check(shape)
    assert all(request.bytes(shape) > 0 for request in method.needs(config, shape))
    assert method.resolve(config, shape, {}) == method.resolve(method.resolve(config, shape, {}), shape, {})
    json.dumps(spelled(method.resolve(config, shape, {})))
    grouped = [site for group in method.groups(config, shape) for site in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= set(shape.sites)
    student = method.student(config, shape)
    assert set(student.shape.sites) == set(shape.sites)
    assert all(student.shape.sites[site] == attention for site, attention in shape.sites.items() if site not in grouped)
    assert method.cache_spec(config, shape).bytes_per_token() > 0
    stages = method.stages(config)
    assert not stages or sum(stage.share for stage in stages) == pytest.approx(1)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_convert_is_pure_deterministic_and_keeps_its_promise_of_shapes(name: str, family: str) -> None:
    method, shape = METHODS[name], shape_of(family)
    config = method.resolve(method.lossless(shape), shape, {})
    student = method.student(config, shape).shape
    for group in method.groups(config, shape):
        given = drawn(shape, group)
        before = {site: {role: tensor.clone() for role, tensor in given[site].roles.items()} for site in group}
        once, twice = (method.convert(given, {}, config) for _ in range(2))
        for site in group:
            assert {role: tuple(tensor.shape) for role, tensor in once[site].items()} == student.sites[site].roles()
            for role, tensor in once[site].items():
                assert torch.equal(tensor, twice[site][role])
                if role in before[site] and student.family == shape.family:  # lossless
                    assert torch.equal(tensor.to(before[site][role].dtype), before[site][role])
            assert all(torch.equal(given[site].roles[role], before[site][role]) for role in before[site])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), met(0, CORE))
def test_the_lossless_student_is_the_teacher(
    name: str, family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = Checkpoint.open(tiny_checkpoint(family, tokenizer=False))
    lossless = METHODS[name].lossless(teacher.shape)
    student = convert(teacher.path, tmp_path / "student", name, spelled(lossless))
    ids_BT = torch.arange(14).view(2, 7)
    with torch.inference_mode():
        expected, found = (
            model(**inputs(model, ids_BT)).logits
            for model in map(AUTO[family].from_pretrained, (teacher.path, student))
        )
    if METHODS[name].student(lossless, teacher.shape).shape.family == family:
        assert torch.equal(expected, found)
    else:  # another architecture multiplies in another order
        torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)


def inputs(model: Any, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ids as a model takes them; an encoder-decoder is given them twice."""
    return {**read(model, ids_BT), **({"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {})}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), met(1))
def test_what_is_planned_is_what_a_student_caches(
    name: str, family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family, tokenizer=False)
    settings = example(METHODS[name], shape_of(family))
    planned = plan(teacher, name, settings, options=PlanSettings(context=9, batch=2))
    student = convert(teacher, tmp_path / "student", name, settings)
    model: Any = hf.load(student)
    given, kept = inputs(model, torch.arange(2 * 9).view(2, 9)), None
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    written = given.pop(name)
    with torch.inference_mode():
        for ids_BT in written.split(8, dim=1):  # a window lets go of what lies before it in the step after the prompt
            kept = model(**given, **{name: ids_BT}, past_key_values=kept, use_cache=True).past_key_values
    assert hf.live_cache_bytes(kept) == planned.after.cache_bytes
    assert sum(parameter.numel() for parameter in model.parameters()) == planned.after.parameters
    folder = sum(file.stat().st_size for file in student.glob("*.safetensors"))
    assert 0 <= folder - planned.disk.student < 20_000  # headers


def test_a_folded_mistral_keeps_its_window(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    teacher = tiny_checkpoint("llama", tokenizer=False, **mistral)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 1})
    planned = plan(teacher, "gqa", {"kv_heads": 1}, options=PlanSettings(context=24, batch=2))
    model = AutoModelForCausalLM.from_pretrained(student)
    assert (model.config.num_key_value_heads, model.config.sliding_window) == (1, 16)
    ids_BT = torch.arange(2 * 24).view(2, 24)
    with torch.inference_mode():
        kept = model(ids_BT[:, :23], use_cache=True).past_key_values
        model(ids_BT[:, 23:], past_key_values=kept, use_cache=True)
    assert hf.live_cache_bytes(kept) == planned.after.cache_bytes == 4 * 2 * 8 * 4 * 16 * 2


def test_an_unknown_method_is_told_with_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"method 'gqq' is not known.*allowed: .*gqa, identity.*did you mean 'gqa'"):
        methods.get("gqq")


# --- gqa ------------------------------------------------------------------------------------------------------------


def pool(config: gqa.Config, family: str = "qwen2", **changes: Any) -> tuple[SiteTensors, Roles]:
    """Tensors of a site of 4 heads of 8 wide, and what gqa makes of them."""
    shape = shape_of(family)
    site = Site(1)
    given = drawn(shape, [site])
    return given[site], dict(gqa.METHOD.convert(given, {}, config)[site])


def test_gqa_pools_the_mean_of_neighbours() -> None:
    given, found = pool(gqa.Config(kv_heads=2, init="mean"))
    for role in ("k", "v", "k_bias", "v_bias"):
        heads = given.roles[role].double().numpy().reshape(4, 8, -1)
        expected = np.stack([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
        np.testing.assert_allclose(found[role].numpy().reshape(2, 8, -1), expected, rtol=1e-15)
        assert found[role].dtype == torch.float64
    for role in ("q", "o", "q_bias"):
        assert torch.equal(found[role], given.roles[role])


def test_gqa_keeps_the_first_of_neighbours() -> None:
    given, found = pool(gqa.Config(kv_heads=2, init="first"))
    for role in ("k", "v", "k_bias", "v_bias"):
        heads = given.roles[role].view(4, 8, -1)
        assert torch.equal(found[role].float().view(2, 8, -1), heads[[0, 2]])


def test_gqa_draws_noise_of_the_spread_that_was_there() -> None:
    given, found = pool(gqa.Config(kv_heads=1, init="random"))
    again, other = (pool(gqa.Config(kv_heads=1, init="random", init_seed=seed))[1] for seed in (0, 1))
    for role in ("k", "v"):
        assert torch.equal(found[role], again[role])
        assert not torch.equal(found[role], other[role])
        assert float(found[role].std()) == pytest.approx(float(given.roles[role].std()), rel=0.2)
    assert not torch.equal(found["k"], found["v"])
    assert not torch.equal(found["k"], given.roles["k"][:8].double())


def test_gqa_in_two_steps_is_gqa_in_one() -> None:
    site = Site(1)
    given, halved = pool(gqa.Config(kv_heads=2, init="mean"))
    halfway = {site: SiteTensors(replace(given.attention, num_key_value_heads=2), halved)}
    _, direct = pool(gqa.Config(kv_heads=1, init="mean"))
    for role, tensor in gqa.METHOD.convert(halfway, {}, gqa.Config(kv_heads=1, init="mean"))[site].items():
        torch.testing.assert_close(tensor, direct[role], rtol=1e-14, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["first", "align"])  # the others: tests/families/test_fold_exactly.py
@pytest.mark.parametrize("family", [name for name in CORE if not all_families()[name].encoder_decoder])
def test_gqa_of_equal_heads_loses_nothing(
    family: str, init: str, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Each pair of heads is made the same, so making pairs one head must not change a logit."""
    teacher, ids_BT = tiny_checkpoint(family), torch.arange(34).view(2, 17) + 40
    source = Checkpoint.open(teacher)
    tensors = load_file(teacher / "model.safetensors")
    for site, attention in source.shape.sites.items():
        roles = {role: tensor.clone() for role, tensor in source.roles(site).roles.items()}
        for role, tensor in roles.items():
            if role[0] in "kv" and len(tensor) == 4 * attention.head_dim:
                heads = tensor.view(2, 2, attention.head_dim, -1)
                heads[:, 1] = heads[:, 0]
        for name, held in source.family.stored(site, attention).items():
            tensors[name] = source.family.joined(attention, {role: roles[role] for role in held})
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=())
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2, "init": init}, options=options)
    assert {each.num_key_value_heads for each in Checkpoint.open(student).shape.sites.values()} == {2}
    with torch.inference_mode():
        found, expected = (hf.load(each)(ids_BT).logits for each in (student, teacher))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["fit", "align", "align-norm"])
def test_gqa_asks_for_moments_of_what_it_merges(init: Any) -> None:
    shape = shape_of("qwen2")
    mixed = shape.with_sites({Site(1): replace(shape.sites[Site(1)], num_key_value_heads=2)})
    asked = gqa.METHOD.needs(gqa.Config(kv_heads=2, init=init), mixed)
    assert len(asked) == len(set(asked)) == 3 * 3  # layer 1 keeps its two heads
    assert set(asked) == {kind(Site(n)) for n in (0, 2, 3) for kind in (InputGram, QueryGram, AttentionGram)}
    assert not gqa.METHOD.needs(gqa.METHOD.lossless(shape), shape)
    for pooled in ("mean", "first", "random"):
        assert not gqa.METHOD.needs(gqa.Config(kv_heads=2, init=pooled), shape)  # type: ignore[arg-type]


def test_gqa_ablates_heads_that_it_merges_and_weighs() -> None:
    shape = shape_of("qwen2")
    mixed = shape.with_sites({Site(1): replace(shape.sites[Site(1)], num_key_value_heads=2)})
    asked = gqa.METHOD.needs(gqa.Config(kv_heads=2, weigh="ablation"), mixed)
    ablated = {each for each in asked if isinstance(each, HeadKL)}
    assert ablated == {HeadKL(Site(layer), head) for layer in (0, 2, 3) for head in range(4)}
    for other in (replace(gqa.METHOD.example(shape), init="align"), gqa.METHOD.lossless(shape)):
        assert not any(isinstance(each, HeadKL) for each in gqa.METHOD.needs(replace(other, weigh="ablation"), shape))
    pairs = gqa.Config(PerSite.parse("self=1,cross=1"), weigh="ablation")  # of encoder-decoders, no head is ablated
    assert not any(isinstance(each, HeadKL) for each in gqa.METHOD.needs(pairs, shape_of("t5")))


def test_gqa_asks_for_repair_of_what_it_fitted_alone() -> None:
    """What the paper and others publish is left as they publish it."""
    assert gqa.Config(kv_heads=2).init == "fit"
    for init in get_args(gqa.Init):
        assert set(gqa.METHOD.repairs(gqa.Config(kv_heads=2, init=init))) == (
            set(REPAIRABLE) if init == "fit" else set()
        )


def test_without_text_the_default_is_the_papers(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("llama")
    plain = Checkpoint.open(convert(teacher, tmp_path / "plain", "gqa", {"kv_heads": 2}))
    mean = Checkpoint.open(convert(teacher, tmp_path / "mean", "gqa", {"kv_heads": 2, "init": "mean"}))
    assert plain.hash() == mean.hash()
    assert plain.lineage is not None
    (step,) = plain.lineage["steps"]
    assert (step["settings"]["init"], step["settings"]["repair"], step["calibration"]) == ("mean", [], None)
    with pytest.raises(SettingError, match="gqa needs calibration text, and none is given"):
        convert(teacher, tmp_path / "fit", "gqa", {"kv_heads": 2, "init": "fit"})


HEADS = [("llama", 4), ("qwen2", 4), ("qwen2", 2)]  # of 4 query heads; the last is grouped already


def planes(first: torch.Tensor, second: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates `p` and `p + 4` of heads of 8, times a complex number for each `p`."""
    real, imaginary = factor.real[:, None], factor.imag[:, None]
    return first * real - second * imaginary, first * imaginary + second * real


def regauged(source: Path, heads: int, *, equal: bool = False) -> Any:
    """Change the gauge of every key and value head of a checkpoint in place, `equal` heads of pairs made one before.

    Keys of a plane by a complex factor, which the queries that meet them lose; values by a matrix, which `o` loses.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.model.layers:
            part = layer.self_attn
            parts = {role: getattr(part, f"{role}_proj") for role in "qkv"}
            rows = {
                role: [each.weight.view(-1, 8, 32), *([] if each.bias is None else [each.bias.view(-1, 8, 1)])]
                for role, each in parts.items()
            }
            output_DHE = part.o_proj.weight.view(32, 4, 8)
            for head in range(heads):
                if equal and head % 2:
                    for tensor_HEX in (*rows["k"], *rows["v"]):
                        tensor_HEX[head] = tensor_HEX[head - 1]
            for head in range(heads):
                readers = range(head * 4 // heads, (head + 1) * 4 // heads)
                length = 0.5 + torch.rand(4, generator=generator)
                factor = torch.polar(length, 6 * torch.rand(4, generator=generator))
                turn_EE = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q * (1 + torch.arange(8) / 8)
                for tensor_HEX in rows["k"]:
                    new = torch.cat(planes(tensor_HEX[head, :4], tensor_HEX[head, 4:], factor))
                    tensor_HEX[head] = new
                for tensor_HEX in rows["v"]:
                    tensor_HEX[head] = turn_EE @ tensor_HEX[head]
                for reader in readers:
                    for tensor_HEX in rows["q"]:
                        new = torch.cat(planes(tensor_HEX[reader, :4], tensor_HEX[reader, 4:], 1 / factor.conj()))
                        tensor_HEX[reader] = new
                    output_DHE[:, reader] = output_DHE[:, reader] @ torch.linalg.inv(turn_EE)
    model.save_pretrained(source)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "heads"), HEADS)
def test_gqa_fits_linear_images_without_loss(
    family: str, heads: int, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint(family, num_key_value_heads=heads)
    model, ids_BT = regauged(teacher, heads, equal=True), torch.arange(34).view(2, 17) + 40
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=())
    off = {}
    for init in ("fit", "mean"):
        student = convert(teacher, tmp_path / init, "gqa", {"kv_heads": heads // 2, "init": init}, options=options)
        folded = AutoModelForCausalLM.from_pretrained(student)
        assert folded.config.num_key_value_heads == heads // 2
        with torch.inference_mode():
            off[init] = float((folded(ids_BT).logits - model(ids_BT).logits).abs().max())
        old, new = Checkpoint.open(teacher), Checkpoint.open(student)
        same = {name for name in old.names() if torch.equal(old.read(name), new.read(name))}
        assert {name for name in old.names() if "self_attn" not in name} <= same
    assert off["fit"] < 1e-4
    assert off["mean"] > 1e-2  # which the gauge was made to spoil


@pytest.mark.slow
@pytest.mark.parametrize(("family", "heads"), HEADS)
def test_gqa_fits_the_function_and_not_the_gauge(
    family: str, heads: int, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    options = ConvertSettings(calibration=str(text), calibration_tokens=600, repair=())
    teachers = [tiny_checkpoint(family, name=name, num_key_value_heads=heads) for name in ("one", "other")]
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(teachers[0]), regauged(teachers[1], heads)]
    students = [
        AutoModelForCausalLM.from_pretrained(
            convert(each, tmp_path / f"{each.name}-fit", "gqa", {"kv_heads": heads // 2}, options=options)
        )
        for each in teachers
    ]
    with torch.inference_mode():
        (one, other), (taught, again) = (
            [model(torch.arange(34).view(2, 17) + 40).logits for model in each] for each in (students, models)
        )
    torch.testing.assert_close(again, taught, rtol=0, atol=1e-5)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    assert float((one - taught).abs().max()) > 5e-3


# --- a method that needs the whole contract -------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyConfig:
    """Heads to keep, and how much each layer's pools lean on their first head."""

    kv_heads: int = field(default=2, metadata={"help": "Key/value heads to keep."})
    lean: str = field(default="auto", metadata={"help": "Weight of a pool's first head by layer, or auto."})

    def check(self, shape: Shape) -> None:
        """Take an even number of layers."""
        if len(shape.sites) % 2:
            raise SettingError("toy: layers are taken in pairs", got=len(shape.sites))

    def leans(self) -> dict[int, float]:
        """Layer -> weight, after `auto` was resolved."""
        return {int(layer): float(lean) for layer, lean in (pair.split(":") for pair in self.lean.split(","))}


class Toy(Method[ToyConfig]):
    """Pools pairs of heads, unevenly by layer: what leans on what, two layers decide together from calibration."""

    def __init__(self) -> None:
        self.ended: dict[str, dict[str, torch.Tensor]] = {}  # finish -> the student when its stage was over
        self.converted: list[tuple[Site, ...]] = []

    def needs(self, config: ToyConfig, shape: Shape) -> Sequence[Request]:
        return [
            request
            for first, second in self.groups(config, shape)
            for request in (InputGram(first), InputGram(second), CrossGram(first, second))
        ]

    def resolve(self, config: ToyConfig, shape: Shape, answers: Answers) -> ToyConfig:
        if config.lean != "auto":
            return config
        leans = {}
        for first, second in self.groups(config, shape):
            cross = answers[CrossGram(first, second)]["gram_DD"].trace()
            own = [answers[InputGram(site)]["gram_DD"].trace() for site in (first, second)]
            leans |= dict.fromkeys(
                (first.layer, second.layer), float(0.5 + 0.5 * cross.abs() / (own[0] * own[1]).sqrt())
            )
        return replace(config, lean=",".join(f"{layer}:{lean:.6f}" for layer, lean in leans.items()))

    def groups(self, config: ToyConfig, shape: Shape) -> Sequence[tuple[Site, ...]]:
        return [(Site(layer), Site(layer + 1)) for layer in range(0, len(shape.sites), 2)]

    def student(self, config: ToyConfig, shape: Shape) -> Student:
        return Student(
            shape.with_sites(
                {site: replace(kept, num_key_value_heads=config.kv_heads) for site, kept in shape.sites.items()}
            )
        )

    def cache_spec(self, config: ToyConfig, shape: Shape) -> CacheSpec:
        return grouped_cache(self.student(config, shape).shape)

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: ToyConfig) -> Mapping[Site, Roles]:
        """Pool, and scale by how much louder the pair's other layer is heard."""
        self.converted.append(tuple(group))
        loud = {site: answers[InputGram(site)]["gram_DD"].trace() for site in group}
        first, second = group
        scale = {first: loud[second] / loud[first], second: loud[first] / loud[second]}
        found = {}
        for site, tensors in group.items():
            roles, lean = dict(tensors.roles), config.leans()[site.layer]
            for role in ("k", "v"):
                heads = roles[role].double().view(config.kv_heads, 2, -1, tensors.attention.hidden_size)
                pooled = lean * heads[:, 0] + (1 - lean) * heads[:, 1]
                roles[role] = (scale[site] * pooled).flatten(0, 1)
            found[site] = roles
        return found

    def stages(self, config: ToyConfig) -> Sequence[Stage]:
        return (
            Stage("match", 0.5, {"attention": 1.0}, trainable=("k", "v"), rates={"v": 0.5}, finish="fuse"),
            Stage("mend", 0.5, {"ce": 0.5, "kl": 0.5}, finish="merge"),
        )

    def end(self, finish: str, student: Learner, config: ToyConfig) -> None:
        """Leave a mark that no training would: the last norm's first weight."""
        assert config.lean != "auto"
        self.ended[finish] = {name: tensor.detach().clone() for name, tensor in student.model.named_parameters()}
        with torch.no_grad():
            student.model.get_parameter("model.norm.weight")[0] = 7.0 if finish == "fuse" else 9.0

    def lossless(self, shape: Shape) -> ToyConfig:
        return ToyConfig(kv_heads=4)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(methods, "_PLUGINS", {})
    made = Toy()
    methods.register("toy", made)
    return made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = "the quick brown fox jumps over the lazy dog and then it sleeps until the sun is up again. "
    path = tmp_path / "text.txt"
    path.write_text(words * 40)
    return path


def test_a_method_from_elsewhere_is_planned_like_any_other(toy: Toy, tiny_checkpoint: Callable[..., Path]) -> None:
    made = plan(tiny_checkpoint("llama"), "toy", {"kv_heads": 2})
    assert made.cache_ratio == 0.5
    # per pair of layers two second moments with their means, and one between the two: width 32, float64
    assert made.calibration_bytes == 2 * 8 * (3 * 32 * 32 + 2 * 32)
    assert ("calibration answers", "", "49 KiB") in made.rows()
    with pytest.raises(SettingError, match=r"toy: layers are taken in pairs \(got 3\)"):
        plan(tiny_checkpoint("llama", name="odd", num_hidden_layers=3), "toy")


def test_calibration_groups_and_resolving(
    toy: Toy, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = Checkpoint.open(tiny_checkpoint("llama"))
    options = ConvertSettings(calibration=str(text), calibration_tokens=900)
    student = Checkpoint.open(convert(teacher.path, tmp_path / "student", "toy", options=options))
    assert toy.converted == [(Site(0), Site(1)), (Site(2), Site(3))]
    assert student.lineage is not None
    step = student.lineage["steps"][-1]
    assert step["settings"]["method"] == "toy"
    leans = ToyConfig(lean=step["settings"]["lean"]).leans()
    assert sorted(leans) == [0, 1, 2, 3]
    assert leans[0] == leans[1] != leans[2] == leans[3]
    assert all(0.5 < lean <= 1 for lean in leans.values())
    assert step["calibration"]
    # the tensors are those that the saved settings and an independent calibration give
    packed = token_file(text, teacher.path, max_tokens=900)
    answers = calibrate(teacher, toy.needs(ToyConfig(), teacher.shape), packed)
    loud = [float(answers[InputGram(Site(layer))]["gram_DD"].trace()) for layer in range(4)]
    for layer, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        heads = teacher.read(name).double().view(2, 2, 8, 32)
        expected = loud[other] / loud[layer] * (leans[layer] * heads[:, 0] + (1 - leans[layer]) * heads[:, 1])
        torch.testing.assert_close(student.read(name).double(), expected.flatten(0, 1), rtol=1e-6, atol=1e-7)
    again = convert(teacher.path, tmp_path / "again", "toy", options=options)
    assert Checkpoint.open(again).hash() == student.hash()


def test_calibration_needs_a_text(toy: Toy, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="toy needs calibration text, and none is given"):
        convert(tiny_checkpoint("llama"), tmp_path / "student", "toy")
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_stages_run_in_order_on_their_own_roles_and_end(
    toy: Toy, tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    teacher = tiny_checkpoint("llama")
    options = ConvertSettings(calibration=str(text), calibration_tokens=900)
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "toy", options=options))
    settings = UptrainSettings(
        data=str(text), tokens=6 * 2 * 32, batch_size=2, sequence_length=32, warmup=0.0, schedule="wsd", log_every=1
    )
    trained = Checkpoint.open(uptrain(student.path, tmp_path / "trained", settings, teacher=teacher))

    assert list(toy.ended) == ["fuse", "merge"]
    start = {name: student.read(name).float() for name in student.names()}
    fused, merged = toy.ended["fuse"], toy.ended["merge"]
    moved = {name for name in start if not torch.equal(start[name], fused[name])}
    assert moved == {name for name in start if "k_proj" in name or "v_proj" in name}, "only k and v train in `match`"
    assert {name for name in start if torch.equal(fused[name], merged[name])} == set(), "everything trains in `mend`"

    step = {role: max(float((fused[n] - start[n]).abs().max()) for n in moved if role in n) for role in ("k_", "v_")}
    assert step["v_"] == pytest.approx(step["k_"] / 2, rel=0.2), "v trains at half the rate of k"

    lines = [json.loads(line) for line in (trained.path / "train.jsonl").read_text().splitlines()]
    logged = [(line["stage"], {"ce", "kl", "attention"} & set(line)) for line in lines if "stage" in line]
    assert logged == [("match", {"attention"})] * 3 + [("mend", {"ce", "kl"})] * 3

    norm = trained.read("model.norm.weight")
    assert float(norm[0]) == 9.0, "what `end` did last is what was saved"
    assert torch.equal(norm[1:], merged["model.norm.weight"][1:])
    assert trained.lineage is not None
    assert [step["stage"] for step in trained.lineage["steps"]] == ["convert", "uptrain"]
    assert trained.lineage["steps"][0]["settings"]["lean"] != "auto"
