"""Conversion: exact where it must be, the paper's pooling, chains, and what happens when it is stopped or refused."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from examples import CORE
from kvfold import methods
from kvfold.cli.main import run_command
from kvfold.contracts.cache import CacheSpec, grouped_cache
from kvfold.contracts.effort import EFFORTS
from kvfold.contracts.family import MLP
from kvfold.contracts.method import Method, Student
from kvfold.contracts.requests import Answers, CrossGram, InputGram, Request
from kvfold.contracts.site import Roles, Shape, Site, SiteTensors
from kvfold.contracts.stages import Stage
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint, Writer
from kvfold.disk.output import MANIFEST, read_json
from kvfold.errors import CheckpointError, Interrupted, OutputError, SettingError
from kvfold.families import all_families
from kvfold.repair import RepairSettings
from kvfold.settings import MOST

Make = Callable[..., Path]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by safetensors' own loader."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder: Path, **config: Any) -> torch.Tensor:
    """Logits of a checkpoint in stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)
    ids_BT = torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BTV: torch.Tensor = model(ids_BT).logits
    return logits_BTV


class Listener:
    """Records the progress of a stage."""

    def __init__(self) -> None:
        self.total, self.done, self.lines = 0.0, 0.0, list[str]()

    def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount

    def stop(self) -> None:
        pass

    def say(self, line: str) -> None:
        self.lines.append(line)


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("form", [{}, {"shard_size": 30_000}, {"form": "bin"}])
def test_identity_is_bit_exact(tiny_checkpoint: Make, tmp_path: Path, family: str, form: dict[str, Any]) -> None:
    teacher = tiny_checkpoint(family, **form, dtype="bfloat16")
    source = Checkpoint.open(teacher)
    student = convert(teacher, tmp_path / "student", "identity")
    made = state(student)
    assert made.keys() == set(source.names())
    assert all(torch.equal(made[name], source.read(name)) for name in made)
    assert (student / "config.json").read_bytes() == (teacher / "config.json").read_bytes()
    assert Checkpoint.open(student).hash() == source.hash()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (student / name).read_bytes() == (teacher / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*CORE} - {"gpt_neox", "olmo2"}))  # Phi's names; wide norms
@pytest.mark.parametrize("heads", [1, 2])
def test_mean_pooling_against_its_definition(tiny_checkpoint: Make, tmp_path: Path, family: str, heads: int) -> None:
    teacher = tiny_checkpoint(family, shard_size=30_000)
    old, new = state(teacher), state(convert(teacher, tmp_path / "student", "gqa", {"kv_heads": heads}))
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        expected = tensor.numpy()
        if re.search(r"^(?!model\.encoder).*\.[kv]_proj\.|decoder\..*\.[kv]\.", name):
            expected = (
                expected.astype("f8").reshape(heads, 4 // heads, 8, -1).mean(1).reshape(heads * 8, *tensor.shape[1:])
            )
        assert torch.equal(new[name], torch.from_numpy(expected.astype("f4"))), name


def test_biases_are_pooled_too(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("qwen2")
    old, new = state(teacher), state(convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 1}))
    name = "model.layers.0.self_attn.k_proj.bias"
    torch.testing.assert_close(new[name], old[name].view(4, 8).mean(0))
    assert torch.equal(new[name.replace("k_proj", "q_proj")], old[name.replace("k_proj", "q_proj")])


def test_only_the_head_count_changes_in_config(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2})
    before, after = read_json(teacher / "config.json"), read_json(student / "config.json")
    assert list(after) == list(before)
    assert {key: after[key] for key in after if after[key] != before[key]} == {"num_key_value_heads": 2}


def mistral(tiny_checkpoint: Make, **changes: Any) -> Path:
    return tiny_checkpoint(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=8, **changes)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_equal_heads_pool_without_loss(tiny_checkpoint: Make, tmp_path: Path, kind: str) -> None:
    teacher = mistral(tiny_checkpoint) if kind == "mistral" else tiny_checkpoint(kind)
    tensors = state(teacher)
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            first = tensor.view(2, 2, 8, -1)[:, :1].expand(2, 2, 8, -1)
            tensors[name] = first.reshape(tensor.shape).contiguous()
    (teacher / "model.safetensors").unlink()
    torch.save(tensors, teacher / "pytorch_model.bin")
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2})
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


def test_chain_of_conversions(tiny_checkpoint: Make, tmp_path: Path) -> None:
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    teacher = tiny_checkpoint(**shape)
    four = convert(teacher, tmp_path / "four", "gqa", {"kv_heads": 4})
    two = convert(four, tmp_path / "two", "gqa", {"kv_heads": 2})
    direct = convert(teacher, tmp_path / "direct", "gqa", {"kv_heads": 2})
    straight = state(direct)
    for name, tensor in state(two).items():
        torch.testing.assert_close(tensor, straight[name], rtol=1e-6, atol=1e-7)

    lineage = Checkpoint.open(two).lineage
    assert lineage is not None
    assert [step["settings"]["kv_heads"] for step in lineage["steps"]] == [4, 2]
    assert [step["source"] for step in lineage["steps"]] == [
        Checkpoint.open(teacher).hash(),
        Checkpoint.open(four).hash(),
    ]
    assert lineage["root"]["hash"] == Checkpoint.open(teacher).hash() == Checkpoint.open(two).root_hash()
    assert lineage["root"]["config"]["num_key_value_heads"] == 8
    assert lineage["hash"] == Checkpoint.open(two).hash()
    assert lineage["tokenizer"] == Checkpoint.open(teacher).tokenizer_hash


def test_grouped_source_names_what_it_can_become(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="kv_heads 4 does not divide the 2 key/value heads of layer 0; choose 1 or 2"
    ):
        convert(tiny_checkpoint(num_key_value_heads=2), tmp_path / "out", "gqa", {"kv_heads": 4})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_two_conversions_are_equal_and_the_teacher_is_untouched(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(shard_size=30_000)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in teacher.iterdir()}
    made = [
        convert(teacher, tmp_path / str(size), "gqa", {"kv_heads": 2}, options=ConvertSettings(shard_size=size))
        for size in (10**9, 20_000)
    ]
    assert len(list(made[0].glob("*.safetensors"))) == 1
    assert len(list(made[1].glob("*.safetensors"))) > 3
    assert len({Checkpoint.open(folder).hash() for folder in made}) == 1
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in teacher.iterdir()} == before


def test_dtype_of_the_student(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2}, options=ConvertSettings(dtype="bfloat16"))
    made, old = state(student), state(teacher)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert torch.equal(made["lm_head.weight"], old["lm_head.weight"].bfloat16())
    assert read_json(student / "config.json")["dtype"] == "bfloat16"
    lineage = read_json(student / MANIFEST)
    assert lineage["root"]["hash"] == Checkpoint.open(teacher).hash()
    assert lineage["hash"] == Checkpoint.open(student).hash()


def test_progress_counts_every_byte(tiny_checkpoint: Make, tmp_path: Path) -> None:
    listener = Listener()
    student = convert(tiny_checkpoint(), tmp_path / "student", "gqa", {"kv_heads": 2}, progress=listener)
    assert listener.done == listener.total == sum(tensor.nbytes for tensor in state(student).values())


@pytest.mark.slow
def test_stock_transformers_loads_the_student_without_kvfold(tiny_checkpoint: Make, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("qwen2"), tmp_path / "student", "gqa", {"kv_heads": 1})
    script = """
import sys
sys.modules["kvfold"] = None  # importing it would raise
from transformers import AutoModelForCausalLM, AutoTokenizer
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
ids = AutoTokenizer.from_pretrained(sys.argv[1])("fold", return_tensors="pt").input_ids
assert model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
print(model.config.num_key_value_heads, model.model.layers[0].self_attn.k_proj.weight.shape)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(student)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "1 torch.Size([8, 32])"


# --- a method that uses all of the contract -------------------------------------------------------------------------


class Toy(Method[Any]):
    """Two layers share the mean of their keys, weighted by how large their calibrated inputs are; biases appear."""

    asked: ClassVar[list[Answers]] = []

    @dataclass(frozen=True)
    class Config:
        weight: float | None = None

        def check(self, shape: Shape) -> None:
            if shape.num_layers % 2:
                raise SettingError("toy takes layers in pairs")

    def groups(self, config: Any, shape: Shape) -> Sequence[tuple[Site, ...]]:
        return [(Site(layer), Site(layer + 1)) for layer in range(0, shape.num_layers, 2)]

    def needs(self, config: Any, shape: Shape) -> Sequence[Request]:
        pairs = self.groups(config, shape)
        return [*(InputGram(first) for first, _ in pairs), *(CrossGram(*pair) for pair in pairs)]

    def resolve(self, config: Any, shape: Shape, answers: Answers) -> Any:
        gram_DD = answers[InputGram(Site(0))]["gram_DD"]
        return replace(config, weight=float(gram_DD.trace() / (1 + gram_DD.trace())))

    def student(self, config: Any, shape: Shape) -> Student:
        biased = {site: replace(attention, biases=frozenset("qkv")) for site, attention in shape.sites.items()}
        return Student(shape.with_sites(biased), fields={"attention_bias": True})

    def cache_spec(self, config: Any, shape: Shape) -> CacheSpec:
        return grouped_cache(shape)

    def convert(self, group: Mapping[Site, SiteTensors], answers: Answers, config: Any) -> Mapping[Site, Roles]:
        self.asked.append(answers)
        first, second = group
        mixed = (
            config.weight * group[first].roles["k"].double() + (1 - config.weight) * group[second].roles["k"].double()
        )
        return {
            site: {
                **tensors.roles,
                "k": mixed,
                **{f"{role}_bias": torch.zeros(len(tensors.roles[role])) for role in "qkv"},
            }
            for site, tensors in group.items()
        }

    def stages(self, config: Any) -> Sequence[Stage]:
        return (
            Stage("heads", 0.25, {"attention": 1.0}, trainable=("q", "k")),
            Stage("all", 0.75, {"kl": 1.0}, finish="merge"),
        )

    def end(self, finish: str, student: Any, config: Any) -> None:
        raise NotImplementedError(finish)

    def lossless(self, shape: Shape) -> Any:
        return self.Config()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy()
    monkeypatch.setattr(methods, "_PLUGINS", {"toy": made})
    monkeypatch.setattr(Toy, "asked", [])
    return made


def test_a_method_with_calibration_and_groups_of_layers(
    tiny_checkpoint: Make, tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    teacher = tiny_checkpoint("qwen2", hidden_size=32)
    with pytest.raises(SettingError, match="toy needs calibration text, and none is given"):
        convert(teacher, tmp_path / "student", "toy")
    (tmp_path / "text.txt").write_text("Whan that Aprille with his shoures soote. " * 20)
    options = ConvertSettings(calibration=str(tmp_path / "text.txt"), calibration_tokens=200)
    student = convert(teacher, tmp_path / "student", "toy", options=options)
    assert len(toy.asked) == 2
    assert set(toy.asked[0]) == set(toy.needs(None, Checkpoint.open(teacher).shape))

    lineage = read_json(student / MANIFEST)
    (step,) = lineage["steps"]
    weight = step["settings"]["weight"]
    assert 0 < weight < 1
    assert step["calibration"]
    old, new = state(teacher), state(student)
    for layer in range(4):
        name = "model.layers.{}.self_attn.k_proj.weight"
        first, second = (old[name.format(layer // 2 * 2 + number)].double() for number in (0, 1))
        torch.testing.assert_close(new[name.format(layer)], (weight * first + (1 - weight) * second).float())
        assert torch.equal(
            new[f"model.layers.{layer}.self_attn.q_proj.weight"], old[f"model.layers.{layer}.self_attn.q_proj.weight"]
        )
    assert Checkpoint.open(student).hash() == lineage["hash"]

    listener = Listener()
    convert(teacher, tmp_path / "student", "toy", options=options, progress=listener)
    assert any("is complete" in line for line in listener.lines)
    (tmp_path / "text.txt").write_text("Another text altogether, as long as the first. " * 20)
    with pytest.raises(OutputError, match="exists, made from"):
        convert(teacher, tmp_path / "student", "toy", options=options)


# --- repaired -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(tmp_path: Path) -> Callable[..., ConvertSettings]:
    """Settings with a little text, of which a repair makes two rows."""
    path = tmp_path / "text" / "text.txt"
    path.parent.mkdir()
    path.write_text("Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 12)
    return lambda **changes: ConvertSettings(calibration=str(path), calibration_tokens=600, **changes)


def fold(teacher: Path, out: Path, options: ConvertSettings, **more: Any) -> Path:
    return convert(teacher, out, "gqa", {"kv_heads": 2}, options=options, **more)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in CORE if not all_families()[name].encoder_decoder])
@pytest.mark.parametrize("form", [{}, {"dtype": "bfloat16", "shard_size": 20_000}])
def test_a_repaired_student_is_stock_and_has_its_lineage(
    tiny_checkpoint: Make, tmp_path: Path, calibrated: Callable[..., ConvertSettings], family: str, form: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    teacher = tiny_checkpoint(family, num_hidden_layers=2, dtype=form.get("dtype", "float32"))
    size = {"shard_size": form["shard_size"]} if form else {}
    plain = fold(teacher, tmp_path / "plain", calibrated(repair=("none",)))
    student = fold(teacher, tmp_path / "student", calibrated(**size))
    model, loading = AutoModelForCausalLM.from_pretrained(student, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_key_value_heads == 2

    old, new = state(plain), state(student)
    assert old.keys() == new.keys()
    assert all(new[name].dtype == tensor.dtype for name, tensor in old.items())
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    made = Checkpoint.open(student)
    roles = [role for role in EFFORTS["standard"].roles if role not in MLP or role in made.family.body.mlp]
    assert changed == {made.family.tensor(site, role) for site in made.shape.sites for role in roles}
    assert len(list(student.glob("*.safetensors"))) > 3 if form else (student / "model.safetensors").exists()
    files = {path.name for path in student.iterdir() if path.suffix != ".safetensors"}
    assert files == {path.name for path in teacher.iterdir()} - {"model.safetensors"} | {MANIFEST} | (
        {"model.safetensors.index.json"} if form else set()
    )

    lineage = read_json(student / MANIFEST)
    (step,) = lineage["steps"]
    assert (step["settings"]["init"], step["settings"]["repair"]) == ("fit", roles)
    assert step["settings"]["repaired_by"]["q_tokens"] == EFFORTS["standard"].repair.q_tokens
    assert step["calibration"] == read_json(plain / MANIFEST)["steps"][0]["calibration"]
    assert read_json(plain / MANIFEST)["steps"][0]["settings"]["repair"] == []
    assert lineage["hash"] == Checkpoint.open(student).hash() != Checkpoint.open(plain).hash()


def test_shards_of_a_repaired_student_hold_the_same(
    tiny_checkpoint: Make, tmp_path: Path, calibrated: Callable[..., ConvertSettings]
) -> None:
    teacher = tiny_checkpoint("qwen2", num_hidden_layers=2)
    whole = fold(teacher, tmp_path / "whole", calibrated())
    split = fold(teacher, tmp_path / "split", calibrated(shard_size=20_000))
    assert len(list(split.glob("*.safetensors"))) > 3
    assert Checkpoint.open(split).hash() == Checkpoint.open(whole).hash()
    one, other = state(whole), state(split)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    listener = Listener()
    assert fold(teacher, split, calibrated(shard_size=20_000), progress=listener) == split
    assert any("is complete" in line for line in listener.lines)
    with pytest.raises(OutputError, match="exists, made from"):
        fold(teacher, split, calibrated(shard_size=20_000, repair=("o",)))


@pytest.mark.parametrize(("method", "repair"), [("identity", ("o",)), ("gqa", ("q", "down"))])
def test_any_method_can_be_repaired(
    tiny_checkpoint: Make,
    tmp_path: Path,
    calibrated: Callable[..., ConvertSettings],
    method: str,
    repair: tuple[str, ...],
) -> None:
    """Also after the paper's own pooling, which needs no calibration."""
    teacher = tiny_checkpoint(num_hidden_layers=2)
    settings = {"kv_heads": 2, "init": "mean"} if method == "gqa" else {}
    plain = state(convert(teacher, tmp_path / "plain", method, settings, options=calibrated()))
    student = convert(teacher, tmp_path / "student", method, settings, options=calibrated(repair=repair))
    made = state(student)
    allowed = {name for name in plain if name.rsplit(".", 2)[1].removesuffix("_proj") in repair}
    changed = {name for name in plain if not torch.equal(plain[name], made[name])}
    assert changed <= allowed
    if method == "gqa":
        assert changed == allowed
    else:
        # its heads are small: what float32 products leave, over the damping
        assert all(torch.allclose(plain[name], made[name], rtol=0, atol=5e-4) for name in allowed)
    assert read_json(student / MANIFEST)["steps"][0]["settings"]["repair"] == list(repair)
    assert read_json(student / MANIFEST)["steps"][0]["calibration"]


def test_a_copy_of_a_student_is_repaired_towards_its_root_teacher(
    tiny_checkpoint: Make, tmp_path: Path, calibrated: Callable[..., ConvertSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    teacher = tiny_checkpoint(num_hidden_layers=2)
    student = convert(teacher, tmp_path / "student", "gqa", {"kv_heads": 2, "init": "mean"})
    options = calibrated(repair=("o", "down"))
    repaired = convert(student, tmp_path / "repaired", "identity", options=options)
    at_once = convert(teacher, tmp_path / "at once", "gqa", {"kv_heads": 2, "init": "mean"}, options=options)
    assert Checkpoint.open(repaired).hash() == Checkpoint.open(at_once).hash()
    teacher.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="its teacher 'teacher' is not found; put it where it was"):
        convert(student, tmp_path / "again", "identity", options=options)
    assert not (tmp_path / "again").exists()


def test_invalid_repairs(tiny_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_checkpoint()
    with pytest.raises(SettingError, match="convert: 'v' cannot be repaired; allowed: q, o, gate, up or down, or none"):
        ConvertSettings(repair=("q", "v"))
    with pytest.raises(SettingError, match="repair needs calibration text, and none is given"):
        convert(teacher, tmp_path / "out", "identity", options=ConvertSettings(repair=("o",)))
    capsys.readouterr()
    command = ["convert", str(teacher), str(tmp_path / "out"), "--kv-heads", "2"]
    for flags, says in ((["--repair", "x"], "'x' cannot be repaired"), (["--repair", "o"], "add --calibration TEXT")):
        assert run_command([*command, *flags]) == 2
        events = capsys.readouterr()
        assert events.out == ""
        assert events.err.count("\n") == 1
        assert says in events.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]
    assert run_command([*command, "--repair", "none"]) == 0
    assert read_json(tmp_path / "out" / MANIFEST)["steps"][0]["settings"]["repair"] == []


class CtrlC(Listener):
    """Presses it at one moment of a repair: when it starts, after so many layers, or when it ends."""

    def __init__(self, moment: str | int) -> None:
        super().__init__()
        self.moment, self.repairing, self.layers = moment, False, 0

    def start(self, what: str, total: float, unit: str, done: int = 0) -> None:
        super().start(what, total, unit, done)
        self.repairing = what == "repairing"
        self._press("start")

    def advance(self, amount: float, note: str = "") -> None:
        super().advance(amount, note)
        if self.repairing:
            self.layers += 1
            self._press(self.layers)

    def stop(self) -> None:
        if self.layers == 2:
            self._press("stop")

    def _press(self, moment: str | int) -> None:
        if self.repairing and moment == self.moment:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "kept"), [("start", 0), (1, 1), (2, 2), ("stop", 2)])
@pytest.mark.parametrize("size", [5 * 10**9, 20_000])
def test_ctrl_c_in_a_repair_and_the_same_command_again(
    tiny_checkpoint: Make,
    tmp_path: Path,
    calibrated: Callable[..., ConvertSettings],
    monkeypatch: pytest.MonkeyPatch,
    moment: str | int,
    kept: int,
    size: int,
) -> None:
    from kvfold.repair import layers as repair

    teacher, out, options = tiny_checkpoint(num_hidden_layers=2), tmp_path / "out", calibrated(shard_size=size)
    with pytest.raises(Interrupted, match="the same command continues"):
        fold(teacher, out, options, progress=CtrlC(moment))
    assert not out.exists()
    with pytest.raises(CheckpointError, match="is not finished"):
        Checkpoint.open(out)
    assert len(list((tmp_path / "out.partial" / "repaired").glob("*.safetensors"))) == kept
    solved, ridge = [0], repair.ridge
    monkeypatch.setattr(repair, "ridge", lambda *given: (solved.__setitem__(0, solved[0] + 1), ridge(*given))[1])
    _same_as_never_stopped(teacher, out, options, lambda: solved[0] == 2 * (2 - kept))


def _same_as_never_stopped(
    teacher: Path, out: Path, options: ConvertSettings, after: Callable[[], bool] = lambda: True
) -> None:
    """Continue, and compare with the same conversion in one go."""
    fold(teacher, out, options)
    assert after()
    whole = fold(teacher, out.with_name("whole"), options)
    assert Checkpoint.open(out).hash() == Checkpoint.open(whole).hash() == read_json(out / MANIFEST)["hash"]
    one, other = state(out), state(whole)
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "teacher", "text", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["second tensor", "tidying", "between", "closing", "lineage", "commit"])
def test_ctrl_c_after_a_repair_and_the_same_command_again(
    tiny_checkpoint: Make,
    tmp_path: Path,
    calibrated: Callable[..., ConvertSettings],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """While tensors are put in place, while what they came from is deleted, and before the output is whole."""
    teacher, out, options = tiny_checkpoint(num_hidden_layers=2), tmp_path / "out", calibrated(shard_size=20_000)
    replace_, close, rmtree, calls = Writer.replace, Writer.close, shutil.rmtree, [0]

    def replaced(self: Writer, name: str, tensor: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        replace_(self, name, tensor)

    def pressed(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    def half_deleted(folder: Path, *given: Any, **named: Any) -> None:
        if Path(folder).name == "repaired":
            sorted(Path(folder).iterdir())[0].unlink()
            raise KeyboardInterrupt
        rmtree(folder, *given, **named)

    def closed(self: Writer) -> str:
        close(self)
        raise KeyboardInterrupt

    module = sys.modules["kvfold.convert.conversion"]
    with monkeypatch.context() as patch:
        if where == "second tensor":
            patch.setattr(Writer, "replace", replaced)
        elif where == "tidying":
            patch.setattr(shutil, "rmtree", half_deleted)
        elif where == "between":
            patch.setattr(Writer, "close", pressed)
        elif where == "closing":
            patch.setattr(Writer, "close", closed)
        elif where == "lineage":
            patch.setattr(module, "descend", pressed)
        else:
            patch.setattr("kvfold.disk.output.flush", pressed)
        with pytest.raises(Interrupted, match="the same command continues"):
            fold(teacher, out, options)
    assert not out.exists()
    _same_as_never_stopped(teacher, out, options)


# --- outputs that exist, and places that refuse ---------------------------------------------------------------------


def test_complete_other_and_overwritten(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher, out = tiny_checkpoint(), tmp_path / "out"
    convert(teacher, out, "gqa", {"kv_heads": 2})
    before = (out / "model.safetensors").stat().st_mtime_ns
    listener = Listener()
    assert convert(teacher, out, "gqa", {"kv_heads": "self=2"}, progress=listener) == out
    assert listener.lines == [f"{out} is complete: it was made from this source with these settings"]
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="exists, made from other inputs or settings"):
        convert(teacher, out, "gqa", {"kv_heads": 1})
    with pytest.raises(OutputError, match="exists, made from other inputs or settings"):
        convert(tiny_checkpoint(name="other", seed=1), out, "gqa", {"kv_heads": 2})
    convert(teacher, out, "gqa", {"kv_heads": 1}, overwrite=True)
    assert Checkpoint.open(out).shape.sites[Site(0)].num_key_value_heads == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "teacher"]


@pytest.mark.parametrize("where", ["", "."])
def test_the_teacher_is_never_the_output(tiny_checkpoint: Make, where: str) -> None:
    teacher = tiny_checkpoint()
    for dst in (teacher, teacher.parent):
        with pytest.raises(OutputError, match="what is read is never changed"):
            convert(teacher, dst / where, "gqa", {"kv_heads": 2}, overwrite=True)
    assert Checkpoint.open(teacher).shape.sites[Site(0)].num_key_value_heads == 4


def test_unknown_settings(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    with pytest.raises(SettingError, match=r"unknown setting 'kv_head'; did you mean 'kv_heads'\?"):
        convert(teacher, tmp_path / "out", "gqa", {"kv_head": 2})
    with pytest.raises(SettingError, match="method 'gqqa' is not known"):
        convert(teacher, tmp_path / "out", "gqqa", {"kv_heads": 2})
    with pytest.raises(SettingError, match="shard_size must be at least 1"):
        ConvertSettings(shard_size=0)
    with pytest.raises(SettingError, match=r"convert: calibration_length must be at least 1 \(got 0\)"):
        ConvertSettings(calibration_length=0)


def test_settings_change_an_identity_only_where_they_differ_from_those_of_the_first_students() -> None:
    before = {"dtype": "source", "shard_size": 5_000_000_000, "repair": []}  # as the first students were identified
    assert ConvertSettings().identity() == before  # nothing is repaired, at any effort
    assert ConvertSettings(repair_length=256, sensitivity_tokens=8192).identity() == before
    assert ConvertSettings(repair_length=128).identity() == {**before, "repair_length": 128}
    assert ConvertSettings(repair_q_tokens=1).identity() == {**before, "repair_q_tokens": 1}
    assert ConvertSettings(calibration_memory=1).identity() == before
    assert ConvertSettings(calibration="text", effort="thorough").identity() == before
    assert ConvertSettings(calibration="text", moment_tokens=5).identity() == {**before, "moment_tokens": 5}


def test_the_effort_of_the_first_students_is_thorough() -> None:
    """An effort is what it stands for: written out, it is the same student."""
    roles = ("q", "o", "gate", "up", "down")
    first = {"dtype": "source", "shard_size": 5_000_000_000, "repair": list(roles)}
    thorough = ConvertSettings(repair=roles, effort="thorough")
    assert thorough.identity() == first
    assert thorough.repairing == RepairSettings(256, 49_152, MOST, 0.0)
    standard = ConvertSettings(repair=roles)
    usual = EFFORTS["standard"].repair
    assert standard.identity() == {
        **first,
        "repair_q_tokens": usual.q_tokens,
        "repair_inner_tokens": usual.inner_tokens,
        "repair_tolerance": usual.tolerance,
    }
    given = {"repair_q_tokens": 49_152, "repair_inner_tokens": MOST, "repair_tolerance": 0.0}
    assert ConvertSettings(repair=roles, **given).identity() == first
    assert replace(thorough, repair_q_tokens=usual.q_tokens).repairing.q_tokens == usual.q_tokens


@pytest.mark.slow
def test_effort_decides_what_is_read_and_repaired_unless_flags_do(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher, text = tiny_checkpoint(num_hidden_layers=2), tmp_path / "text.txt"
    text.write_text("Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 400)
    wide = Checkpoint.open(teacher).spec("model.layers.0.mlp.down_proj.weight").shape[1]

    def said(name: str, **changes: Any) -> tuple[list[str], int]:
        """The roles that a conversion repaired, and the tokens that it says it reads."""
        listener, out = Listener(), tmp_path / name
        fold(teacher, out, ConvertSettings(str(text), **changes), progress=listener)
        (line,) = [line for line in listener.lines if "forward passes of the teacher" in line]
        return read_json(out / MANIFEST)["steps"][0]["settings"]["repair"], int(line.split()[0].replace(",", ""))

    assert said("quick", effort="quick") == (["o", "down"], EFFORTS["quick"].tokens(wide))
    every = ["q", "o", "gate", "up", "down"]
    assert said("standard", calibration_tokens=1024) == (every, 1024)
    assert said("flags", effort="quick", repair=("q",), calibration_tokens=512) == (["q"], 512)
    assert said("thorough", effort="thorough", calibration_tokens=1024) == (every, 1024)


def test_too_little_room_is_an_error_before_anything_is_written(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OutputError, match=r"not enough space on the disk \(got 0.00 GB free\)"):
        convert(tiny_checkpoint(), tmp_path / "out", "gqa", {"kv_heads": 2})
    assert not list(tmp_path.rglob("*.partial/*.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission to write")]
)
def test_a_disk_that_refuses_half_way_and_then_does_not(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    teacher, out = tiny_checkpoint(), tmp_path / "out"
    options = ConvertSettings(shard_size=20_000)
    pwrite, left = os.pwrite, [20]

    def refuse(*given: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return pwrite(*given)

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OutputError, match=message):
        convert(teacher, out, "gqa", {"kv_heads": 2}, options=options)
    assert not out.exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    convert(teacher, out, "gqa", {"kv_heads": 2}, options=options)
    whole = convert(teacher, tmp_path / "whole", "gqa", {"kv_heads": 2})
    assert Checkpoint.open(out).hash() == Checkpoint.open(whole).hash()


# --- stopped and continued ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 9, 20, 35])  # of 39 tensors
def test_ctrl_c_and_the_same_command_again(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    teacher, out = tiny_checkpoint(shard_size=30_000), tmp_path / "out"
    options = ConvertSettings(shard_size=20_000)
    write, left = Writer.write, [after]

    def interrupted(self: Writer, name: str, tensor: torch.Tensor) -> str:
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, whichever thread writes this tensor
            time.sleep(0.05)
        return write(self, name, tensor)

    monkeypatch.setattr(Writer, "write", interrupted)
    with pytest.raises(Interrupted, match="the same command continues"):
        convert(teacher, out, "gqa", {"kv_heads": 2}, options=options)
    assert not out.exists()
    monkeypatch.setattr(Writer, "write", write)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    listener = Listener()
    convert(teacher, out, "gqa", {"kv_heads": 2}, options=options, progress=listener)
    whole = convert(teacher, tmp_path / "whole", "gqa", {"kv_heads": 2})
    assert Checkpoint.open(out).hash() == Checkpoint.open(whole).hash() == read_json(out / MANIFEST)["hash"]
    assert read_json(out / MANIFEST)["steps"][0]["source"] == Checkpoint.open(teacher).hash()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "teacher", "whole"]
    if after == 35:  # whole shards were not written again
        assert any((out / name).stat().st_mtime_ns == written for name, written in kept.items())
        assert listener.total < sum(tensor.nbytes for tensor in state(out).values())


@pytest.mark.slow
def test_kill_and_the_same_command_again(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher, out = tiny_checkpoint(), tmp_path / "out"
    script = """
import os, signal, sys
from kvfold.disk.checkpoint import Writer
from kvfold.convert.conversion import ConvertSettings, convert
write, left = Writer.write, [24]
def killed(self, name, tensor):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, name, tensor)
Writer.write = killed
convert(sys.argv[1], sys.argv[2], "gqa", {"kv_heads": 2}, options=ConvertSettings(shard_size=20_000))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(teacher), str(out)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert not out.exists()
    with pytest.raises(CheckpointError, match="is not finished"):
        Checkpoint.open(out)
    convert(teacher, out, "gqa", {"kv_heads": 2}, options=ConvertSettings(shard_size=20_000))
    whole = convert(teacher, tmp_path / "whole", "gqa", {"kv_heads": 2})
    assert Checkpoint.open(out).hash() == Checkpoint.open(whole).hash()


def test_unfinished_work_of_a_source_that_changed_is_not_continued(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = tiny_checkpoint(), tmp_path / "out"
    write = Writer.write

    def interrupted(self: Writer, name: str, tensor: torch.Tensor) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", interrupted)
    with pytest.raises(Interrupted):
        convert(teacher, out, "gqa", {"kv_heads": 2})
    monkeypatch.setattr(Writer, "write", write)
    os.utime(teacher / "model.safetensors", (1, 1))
    with pytest.raises(OutputError, match="unfinished work of other inputs"):
        convert(teacher, out, "gqa", {"kv_heads": 2})
    convert(teacher, out, "gqa", {"kv_heads": 2}, overwrite=True)
    assert Checkpoint.open(out).lineage is not None


def test_a_truncated_source_writes_nothing(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint()
    os.truncate(teacher / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="is truncated"):
        convert(teacher, tmp_path / "out", "gqa", {"kv_heads": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
