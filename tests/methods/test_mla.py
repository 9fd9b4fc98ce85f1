"""mla: what it refuses, what it chooses within a ratio, and a student that stock transformers loads alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvfold import hf
from kvfold.contracts.requests import AttentionGram, Computed, InputGram, QueryGram
from kvfold.contracts.site import REPAIRABLE, Shape, Site
from kvfold.convert.conversion import ConvertSettings, convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import read_json
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.families import all_families
from kvfold.methods import mla
from kvfold.predict.plan import plan
from kvfold.solve.rope import frequencies

TEXT = "Whan that Aprille with his shoures soote, the droghte of March hath perced to the roote. " * 7
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
IDS = torch.arange(34).view(2, 17) + 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


def shape_of(family: str = "llama", **changes: Any) -> Shape:
    found = all_families()[family]
    return found.shape({**found.tiny(), **changes})


def read(tmp_path: Path) -> ConvertSettings:
    (tmp_path / "text.txt").write_text(TEXT)
    return ConvertSettings(calibration=str(tmp_path / "text.txt"))


# --- what it asks and refuses ---------------------------------------------------------------------------------------


def test_it_asks_for_what_it_reads() -> None:
    shape, sizes, site = shape_of(), {"rope_dim": 4, "latent_dim": 12}, Site(0)

    def asked(**settings: Any) -> set[Any]:
        return {each for each in mla.METHOD.needs(mla.Config(**settings), shape) if each.site == site}  # type: ignore[union-attr]

    moments = {InputGram(site), QueryGram(site), AttentionGram(site)}
    assert asked(**sizes) == moments | {Computed(site)}
    assert asked(**sizes, planes="even") == moments
    assert asked(ratio=0.5, planes="even") == moments | {Computed(site)}
    assert asked(**sizes, planes="folded", metric="inputs") == {InputGram(site)}
    assert asked(**sizes, planes="even", metric="weights") == set()


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("qwen3", {}, "model_type is not one whose layers are those of stock deepseek_v3 (got qwen3)"),
        (
            "llama",
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16},
            "layer 0: it has a sliding window",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "layer 0: its RoPE scaling changes with the length of the text",
        ),
    ],
)
def test_what_deepseek_v3_cannot_be_is_refused(family: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingError) as told:
        mla.Config(rope_dim=4, latent_dim=12).check(shape_of(family, **changes))
    assert line in str(told.value)


@pytest.mark.parametrize(("family", "field"), [("llama", "mlp_bias"), ("ernie4_5", "use_bias")])
def test_biases_of_the_mlp_are_refused_by_field(family: str, field: str, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match=f"{field}: stock deepseek_v3 has no biases in its MLP"):
        plan(tiny_checkpoint(family, **{field: True}), "mla", {"rope_dim": 4, "latent_dim": 12})


@pytest.mark.parametrize("source", mla.SOURCES)
def test_fields_that_a_source_leaves_out_mean_the_same_in_its_student(
    source: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The values that transformers' config classes have for them."""
    names = ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "tie_word_embeddings")
    family = next(each for each in all_families().values() if source in each.architectures)
    config = {name: value for name, value in family.tiny().items() if name not in names} | {"model_type": source}
    adopt = all_families()["deepseek_v3"].adopt
    assert adopt is not None
    theirs, ours = CONFIG_MAPPING[source](**config), CONFIG_MAPPING["deepseek_v3"](**adopt(config))
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_a_student_is_no_source(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"rope_dim": 4, "latent_dim": 12}
    student = convert(tiny_checkpoint("llama", tokenizer=False), tmp_path / "student", "mla", sizes)
    for method, settings in (("mla", sizes), ("gqa", {"kv_heads": 2})):
        with pytest.raises(SettingError):
            convert(student, tmp_path / "again", method, settings)


def test_a_plan_names_the_sizes_that_have_kernels(tiny_checkpoint: Callable[..., Path]) -> None:
    wide = tiny_checkpoint("llama", tokenizer=False, hidden_size=512, head_dim=128)
    known, other = (plan(wide, "mla", {"rope_dim": 64, "latent_dim": width, "planes": "even"}) for width in (512, 500))
    assert not any("kernels" in line for line in known.warnings)
    assert any("kernels for 512 + 64 and 256 + 64, not for 500 + 64" in line for line in other.warnings)
    loads, without = ({engine.name: engine.loads for engine in each.engines} for each in (known, other))
    assert without == loads | {"vLLM": False}
    assert loads == {"transformers": True, "vLLM": True, "llama.cpp": False, "CTranslate2": False, "SGLang": False}
    assert known.after.model_type == "deepseek_v3"
    assert known.after.cache_bytes_per_token == 4 * 4 * (512 + 64)


@pytest.mark.parametrize(
    ("heads", "hidden", "found"),
    [
        (32, 4096, {"rope_dim": 64, "latent_dim": 512}),  # Llama-2-7B: 8,192 numbers a layer
        (8, 4096, {"rope_dim": 64, "latent_dim": 512}),  # Llama-3-8B: 2,048
        (3, 1536, {"rope_dim": 64, "latent_dim": 256}),  # 768: 576 are more than half of it, 320 are not
        (2, 512, {"ratio": 0.25}),  # 512: 320 are more than half of it
        (8, 384, {"rope_dim": 64, "latent_dim": 256}),  # 2,048, and a latent of 512 is wider than its input
    ],
)
def test_sizes_that_are_left_out_are_those_with_kernels(heads: int, hidden: int, found: dict[str, Any]) -> None:
    config = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": hidden, "head_dim": 128}
    shape = shape_of(**config)
    filled = mla.METHOD.filled(mla.Config(), shape)
    assert {name: value for name in ("ratio", "rope_dim", "latent_dim") if (value := getattr(filled, name))} == found
    filled.check(shape)
    for given in ({"ratio": 0.5}, {"rope_dim": 4}, {"latent_dim": 4}, {"planes": "/".join(["1"] * 64)}):
        assert mla.METHOD.filled(mla.Config(**given), shape) == mla.Config(**given)


def test_a_conversion_needs_no_sizes(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """`convert SRC DST --method mla --calibration TEXT` writes what transformers loads, a quarter of the cache here."""
    teacher = tiny_checkpoint("llama")
    student = convert(teacher, tmp_path / "student", "mla", {}, options=replace(read(tmp_path), repair=()))
    model = AutoModelForCausalLM.from_pretrained(student)
    assert type(model).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    assert model.config.qk_rope_head_dim + model.config.kv_lora_rank == 16 == 64 // 4
    named = plan(teacher, "mla", {}).after
    assert named.cache_bytes_per_token == plan(teacher, "mla", {"ratio": 0.25}).after.cache_bytes_per_token


# --- its rotation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [{"rope_type": "default", "rope_theta": 1e4}, LLAMA3])
@pytest.mark.parametrize("planes", ["even", "2/0/1/1"])
def test_transformers_rotates_by_the_planes_of_the_source(scaling: dict[str, Any], planes: str) -> None:
    """The frequencies that stock deepseek_v3 computes of the written config.json."""
    shape = shape_of(rope_parameters=scaling)
    rotated = 4 if planes == "even" else 8
    config = mla.Config(rope_dim=rotated, latent_dim=12, planes=planes, metric="weights")
    student = mla.METHOD.student(config, shape).shape
    home = all_families()["deepseek_v3"]
    model: Any = hf.build({**home.tiny(), **home.fields(student)}, seed=0)
    rope = shape.sites[Site(0)].rope
    assert rope is not None
    theta_P = frequencies(rope)[0]
    kept = [0, 2] if planes == "even" else [0, 0, 2, 3]
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), theta_P[kept], rtol=1e-6, atol=0)
    assert model.model.rotary_emb.attention_scaling == 1


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_ratio_is_spent_and_explained(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("llama")
    student = Checkpoint.open(
        convert(teacher, tmp_path / "student", "mla", {"ratio": 0.5}, options=replace(read(tmp_path), repair=()))
    )
    step = read_json(student.path / "kvfold.json")["steps"][-1]  # type: ignore[call-overload, index]
    chosen = step["settings"]
    assert chosen["rope_dim"] + chosen["latent_dim"] <= 32 == 64 // 2
    assert 2 * sum(map(int, chosen["planes"].split("/"))) == chosen["rope_dim"]
    assert set(step["found"]["sites"]) == {f"layer {layer}" for layer in range(4)}
    assert all(0 <= site["lost"] < 1 for site in step["found"]["sites"].values())


@pytest.mark.slow
def test_a_repair_of_the_whole_changes_nothing(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Where nothing is lost, no refit gains: also that of q, which must know the student's rotation."""
    teacher = tiny_checkpoint("llama", num_key_value_heads=2, initializer_range=0.2)
    lossless = mla.METHOD.lossless(Checkpoint.open(teacher).shape)
    settings = {"rope_dim": lossless.rope_dim, "latent_dim": lossless.latent_dim, "planes": lossless.planes}
    student = convert(teacher, tmp_path / "s", "mla", settings, options=replace(read(tmp_path), repair=REPAIRABLE))
    with torch.inference_mode():
        expected, found = (hf.load(each)(IDS).logits for each in (teacher, student))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_queries_with_a_bias_are_not_refitted(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """They come from a latent, which changes nothing: the absorbed attention reads it as the stock class does."""
    teacher = tiny_checkpoint("qwen2", initializer_range=0.2)
    sizes = {"rope_dim": 4, "latent_dim": 12}
    bare, repaired = (
        Checkpoint.open(convert(teacher, tmp_path / name, "mla", sizes, options=replace(read(tmp_path), repair=roles)))
        for name, roles in (("bare", ()), ("repaired", REPAIRABLE))
    )
    same = {name for name in bare.names() if torch.equal(bare.read(name), repaired.read(name))}
    changed = {name.split(".", 3)[-1] for name in bare.names() if name not in same}
    assert changed == {"self_attn.o_proj.weight", *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))}
    assert repaired.config["q_lora_rank"] == 33
    with torch.inference_mode():
        stock = AutoModelForCausalLM.from_pretrained(repaired.path, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(hf.load(repaired.path)(IDS).logits, stock, rtol=1e-4, atol=1e-4)


def test_text_is_repaired_after_it_was_weighed_by_outputs_alone() -> None:
    assert mla.METHOD.repairs(mla.Config(ratio=0.5)) == REPAIRABLE
    assert not mla.METHOD.repairs(mla.Config(ratio=0.5, metric="inputs"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_whole_is_the_teacher_in_every_format(
    dtype: str, family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Stock classes on both sides. Formats of half the width differ by as much as the teacher does from itself."""
    teacher = tiny_checkpoint(family, tokenizer=False, num_key_value_heads=2, initializer_range=0.2)
    lossless = mla.METHOD.lossless(Checkpoint.open(teacher).shape)
    settings = {"rope_dim": lossless.rope_dim, "latent_dim": lossless.latent_dim, "planes": lossless.planes}
    student = convert(teacher, tmp_path / "student", "mla", settings, options=ConvertSettings(dtype=dtype))
    with torch.inference_mode():
        found, rounded, expected = (
            AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, kind))(IDS).logits.float()
            for path, kind in ((student, dtype), (teacher, dtype), (teacher, "float32"))
        )
    own = float((rounded - expected).abs().max())
    assert float((found - expected).abs().max()) <= (1e-4 if dtype == "float32" else 3 * own)


def test_the_norm_left_to_training_has_no_constant(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    teacher = tiny_checkpoint("llama")
    settings = {"rope_dim": 8, "latent_dim": 20, "norm": "trained", "planes": "even"}
    student = Checkpoint.open(convert(teacher, tmp_path / "student", "mla", settings, options=read(tmp_path)))
    assert student.config["attention_bias"] is False
    assert not [name for name in student.names() if name.endswith("bias")]
    with torch.inference_mode():
        assert hf.load(student.path)(IDS).logits.isfinite().all()


ALONE = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kvfold":
            raise ImportError("kvfold is not here")
sys.meta_path.insert(0, Absent())
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
model, found = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
problems = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
with torch.inference_mode():
    written = model.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=6, do_sample=False)
print(json.dumps([type(model).__name__, problems, written.tolist()]))
"""


@pytest.mark.slow
def test_stock_transformers_loads_it_without_kvfold(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    student = convert(
        tiny_checkpoint("llama", tokenizer=False), tmp_path / "s", "mla", {"rope_dim": 4, "latent_dim": 12}
    )
    ids = IDS[:1, :8]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(student), json.dumps(ids.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    name, problems, written = json.loads(done.stdout.splitlines()[-1])
    assert (name, problems) == ("DeepseekV3ForCausalLM", [])
    ours: Any = hf.load(student)
    assert type(ours).__name__ == "KvfoldDeepseekV3ForCausalLM"
    assert ours.generate(ids, max_new_tokens=6, do_sample=False).tolist() == written
