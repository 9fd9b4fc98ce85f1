"""What a plan says that engines load is what the exports write, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from examples import SOURCES, paired
from kvfold.contracts.site import Rope
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import UnsupportedModel
from kvfold.export.exporting import ENGINES, ExportSettings, export
from kvfold.families import all_families
from kvfold.predict.engines import DECODERS, EXPORTED, refusal
from kvfold.predict.plan import plan

Make = Callable[..., Path]

QUICK = ExportSettings("float32", 12, 4)
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
OF = {"llama.cpp": "gguf", "CTranslate2": "ctranslate2"}


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


STRETCHED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = rope("llama3", **STRETCHED)
TWO = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
BOTH, NEITHER, CT2 = {"llama.cpp", "CTranslate2"}, set[str](), {"CTranslate2"}

MATRIX: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, BOTH),
    "default-rope": ("llama", rope("default"), BOTH),
    "linear": ("llama", rope("linear", factor=2.0), BOTH),
    "llama3": ("llama", LLAMA3, BOTH),
    "yarn": ("llama", rope("yarn", factor=2.0, original_max_position_embeddings=64), NEITHER),
    "dynamic": ("llama", rope("dynamic", factor=2.0), NEITHER),
    "longrope": ("llama", rope("longrope", factor=2.0, **FACTORS), NEITHER),
    "gelu": ("llama", {"hidden_act": "gelu"}, CT2),
    "gelu_new": ("qwen3", {"hidden_act": "gelu_new"}, CT2),
    "relu2": ("llama", {"hidden_act": "relu2"}, NEITHER),
    "swish": ("llama", {"hidden_act": "swish"}, BOTH),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, BOTH),
    "wide-biases": ("llama", {"head_dim": 16, "attention_bias": True}, BOTH),
    "tied": ("llama", {"tie_word_embeddings": True}, BOTH),
    "window": ("llama", {**MISTRAL, "sliding_window": 64}, BOTH),
    "mistral-yarn": (
        "llama",
        {**MISTRAL, **rope("yarn", factor=2.0, original_max_position_embeddings=64)},
        NEITHER,
    ),
    "qwen2": ("qwen2", {}, BOTH),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, BOTH),
    "qwen2-linear": ("qwen2", rope("linear", factor=2.0), CT2),
    "qwen2-llama3": ("qwen2", LLAMA3, CT2),
    "qwen2-yarn": ("qwen2", rope("yarn", factor=2.0, original_max_position_embeddings=64), NEITHER),
    "qwen2-wide": ("qwen2", {"head_dim": 16}, BOTH),
    "qwen3": ("qwen3", {}, BOTH),
    "qwen3-biases": ("qwen3", {"attention_bias": True}, CT2),
    "qwen3-llama3": ("qwen3", LLAMA3, CT2),
    "t5": ("t5", {}, CT2),
    "t5-relu": ("t5", {"feed_forward_proj": "relu"}, CT2),
    "t5-silu": ("t5", {"feed_forward_proj": "gated-silu"}, CT2),
    "t5-tanh": ("t5", {"feed_forward_proj": "gated-tanh"}, NEITHER),
    "mt5": ("t5", {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}, CT2),
    "bart": ("bart", {}, CT2),
    **{name: (*paired()[name], CT2) for name in ("mbart", "plbart", "m2m_100", "marian", "pegasus", "blenderbot")},
    "umt5": (*paired()["umt5"], CT2),
    "blenderbot-small": (*paired()["blenderbot-small"], NEITHER),
    "bart-uneven": ("bart", {"encoder_attention_heads": 2}, NEITHER),
    "bart-tanh": ("bart", {"activation_function": "tanh"}, NEITHER),
    "whisper": ("whisper", {}, NEITHER),
    "t5gemma": ("t5gemma", {}, NEITHER),
    **{name: (name, {}, CT2) for name in sorted(DECODERS["CTranslate2"] - DECODERS["llama.cpp"])},
    **{name: (name, {}, CT2) for name in ("gpt2", "opt")},  # as gpt_bigcode
    **{name: (name, {}, BOTH) for name in ("phi", "gpt_neox", "gptj", "codegen", "falcon")},  # as phi
    "phi-tied": ("phi", {"tie_word_embeddings": True}, BOTH),
    "phi-relu": ("phi", {"hidden_act": "relu"}, CT2),
    "phi-wide": ("phi", {"head_dim": 16}, CT2),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}, CT2),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}, CT2),
    "glm-biases": ("glm", {"attention_bias": False}, CT2),
    "olmo-clipped": ("olmo", {"clip_qkv": 2.0}, NEITHER),
    "phi-llama3": ("phi", rope("llama3", **STRETCHED, partial_rotary_factor=0.5), CT2),
    "gemma3_text-scaled": ("gemma3_text", {"rope_parameters": TWO, "final_logit_softcapping": 3.0}, CT2),
}
MATRIX |= {name: (name, {}, NEITHER) for name in SOURCES if all(name != case[0] for case in MATRIX.values())}
METHODS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "mixed": ("llama", "gqa", {"kv_heads": "4/2/1/2"}, BOTH),
    "mla": ("llama", "mla", {"rope_dim": 4, "latent_dim": 12}, NEITHER),
    "mla-qwen2": ("qwen2", "mla", {"rope_dim": 4, "latent_dim": 12}, NEITHER),
    "mixed-qwen2": ("qwen2", "gqa", {"kv_heads": "4/2/1/2"}, BOTH),
    "mixed-qwen3": ("qwen3", "gqa", {"kv_heads": "4/2/1/2"}, CT2),
    "mixed-phi": ("phi", "gqa", {"kv_heads": "4/2/1/2"}, CT2),
    "mixed-gemma3_text": ("gemma3_text", "gqa", {"kv_heads": "4/2/1/2"}, CT2),
    "mixed-gpt_bigcode": ("gpt_bigcode", "gqa", {"kv_heads": "4/2/1/2"}, CT2),
    "gpt_bigcode-mqa": ("gpt_bigcode", "gqa", {"kv_heads": 1}, CT2),
    "shared": ("llama", "cla", {"share": 2}, NEITHER),
    "latent": ("llama", "elitekv", {"rope_chunks": 2, "latent_dim": 8}, NEITHER),
    "hybrid": ("qwen3", "supra", {"preset": "hybrid", "window": 4, "sinks": 2}, NEITHER),
    "mixed-t5": ("t5", "gqa", {"kv_heads": "self=4/2/1/2,cross=1"}, CT2),
    "crosslatent": ("t5", "crosslatent", {}, NEITHER),
}
CASES = [
    pytest.param(family, changes, "gqa", {"kv_heads": 2}, loads, id=name)
    for name, (family, changes, loads) in MATRIX.items()
]
CASES += [
    pytest.param(family, {}, method, settings, loads, id=name)
    for name, (family, method, settings, loads) in METHODS.items()
]


def promised(source: Path, method: str, settings: dict[str, Any]) -> set[str]:
    return {each.name for each in plan(source, method, settings).engines if each.loads and each.name in EXPORTED}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes", "method", "settings", "loads"), CASES)
def test_what_a_plan_promises_is_written_and_agrees_and_the_rest_is_refused(
    family: str,
    changes: dict[str, Any],
    method: str,
    settings: dict[str, Any],
    loads: set[str],
    tiny_checkpoint: Make,
    tmp_path: Path,
) -> None:
    teacher = tiny_checkpoint(family, **changes)
    student = convert(teacher, tmp_path / "student", method, settings)
    assert promised(teacher, method, settings) == loads
    if method == "gqa":  # the student itself, planned as a source
        assert promised(student, "identity", {}) == loads
    for name in EXPORTED:
        refused = name not in loads
        with pytest.raises(UnsupportedModel, match=f"cannot be exported to {name}: ") if refused else nullcontext():
            ENGINES[OF[name]].check(Checkpoint.open(student))
        if not refused and find_spec(OF[name]) is not None:
            made = export(student, tmp_path / OF[name], OF[name], QUICK)
            assert json.loads((made / "kvfold.json").read_text())["steps"][-1]["check"]["engine"]


LACKED = "the activation"


@pytest.mark.parametrize(
    ("scaling", "activation", "why"),
    [
        ({"rope_type": "linear"}, "silu", "RoPE scaling 'linear' needs a positive factor"),
        ({"rope_type": "linear", "factor": "2"}, "silu", "needs a positive factor (got 2)"),
        ({"rope_type": "linear", "factor": 0}, "silu", "needs a positive factor (got 0)"),
        ({"type": "llama3", "factor": 2.0}, "silu", "needs a positive low_freq_factor"),
        ({**LLAMA3["rope_parameters"], "high_freq_factor": 1.0}, "silu", "two different frequency factors"),
        ({"type": "su"}, "silu", "RoPE scaling 'su' cannot be exported"),
        (None, "\x1b[31mred" * 40, LACKED),
        (None, ["silu"], LACKED),
        (None, None, LACKED),
    ],
)
@pytest.mark.parametrize("engine", EXPORTED)
def test_a_refusal_is_one_line(engine: str, scaling: dict[str, Any] | None, activation: object, why: str) -> None:
    family = all_families()["llama"]
    shape = family.shape(family.tiny())
    sites = {site: replace(each, rope=Rope(8, 1e4, scaling=scaling)) for site, each in shape.sites.items()}
    found = refusal(engine, {"hidden_act": activation}, shape.with_sites(sites))
    assert found is not None
    assert why in found.line
    assert found.line.isprintable()
    assert len(found.line) < 200


def test_engines_whose_mlp_knows_silu_alone_do_not_load_another(tiny_checkpoint: Make) -> None:
    made = plan(tiny_checkpoint("llama", hidden_act="gelu"), "gqa", {"kv_heads": 2})
    assert [each.name for each in made.engines if each.loads] == ["transformers", "CTranslate2"]
    assert ("loads in", "", "transformers, CTranslate2") in made.rows()


def test_the_check_of_exports_is_light() -> None:
    code = "import sys, kvfold.predict.engines; print({'torch', 'numpy', 'transformers', 'gguf'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "set()\n"


@pytest.mark.parametrize("clip", [None, 2.0])
def test_vllm_does_not_clip_in_an_olmoe(clip: float | None, tiny_checkpoint: Callable[..., Path]) -> None:
    planned = plan(tiny_checkpoint("olmoe", clip_qkv=clip), "gqa", {"kv_heads": 2})
    found = {each.name: each for each in planned.engines}
    assert found["transformers"].loads
    assert found["vLLM"].loads == (clip is None)
    assert clip is None or found["vLLM"].how == "its class does not clip q, k and v (got clip_qkv 2)"
