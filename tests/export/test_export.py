"""Exports: what the engine computes is what transformers computes, or nothing is put in place."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvfold import machine
from kvfold.contracts.site import Rope
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import DataError, Interrupted, OutputError, SettingError, UnsupportedModel
from kvfold.export import ENGINES, ExportSettings, agreement, export, limits
from kvfold.export import ctranslate2 as ours_ctranslate2
from kvfold.export import gguf as ours_gguf
from kvfold.export.gguf import NOT_LOADED, LlamaCpp, byte_level_split, interleave
from kvfold.families import all_families
from kvfold.progress import Silent

Make = Callable[..., Path]
HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_LLAMA_CPP = HAS_GGUF and importlib.util.find_spec("llama_cpp") is not None
needs_ct2 = pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="gguf is not installed")
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python is not installed")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QUICK = ExportSettings(prompt_tokens=12, new_tokens=8)


class Heard(Silent):
    """Keeps the lines that were said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def found(folder: Path) -> dict[str, Any]:
    """What the export's lineage says of its comparison."""
    step = json.loads((folder / "kvfold.json").read_text())["steps"][-1]
    assert step["stage"] == "export"
    return dict(step["check"])


HEADS = (4, 2, 1, 2)


@pytest.fixture
def mixed_checkpoint(byte_tokenizer: Path, tmp_path: Path) -> Make:
    """Make a tiny random checkpoint with 4, 2, 1 and 2 key/value heads in its layers."""

    def make(family: str, **changes: Any) -> Path:
        import torch

        from kvfold import hf

        config = {**all_families()[family].tiny(), "vocab_size": 260, **changes}
        shape = all_families()[family].shape(config)
        sites = {site: replace(kept, num_key_value_heads=HEADS[site.layer]) for site, kept in shape.sites.items()}
        model: Any = hf.build(config | all_families()[family].fields(shape.with_sites(sites)), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
        model.save_pretrained(tmp_path / "mixed")
        shutil.copytree(byte_tokenizer, tmp_path / "mixed", dirs_exist_ok=True)
        return tmp_path / "mixed"

    return make


def greedy(path: Path, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
    """Greedy continuations by stock transformers without a cache, and the smallest margin of a choice."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers, margin = [], float("inf")
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                best = model(torch.tensor([ids])).logits[0, -1].topk(2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                ids.append(int(best.indices[0]))
        answers.append(ids[len(prompt) :])
    return answers, margin


# --- CTranslate2 ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_ct2
@pytest.mark.parametrize(
    ("family", "changes", "kv_heads"),
    [
        ("llama", {}, 2),
        ("llama", {}, 1),
        ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, 1),
        ("llama", {"rope_parameters": LLAMA3}, 2),
        ("llama", {**MISTRAL, "sliding_window": 64}, 2),
        ("llama", {**MISTRAL, "sliding_window": 64}, 1),
        ("qwen2", {}, 2),
        ("qwen2", {}, 1),
        ("qwen3", {}, 2),
        ("qwen3", {"head_dim": 16, "attention_bias": True}, 1),
    ],
    ids=[
        "gqa",
        "mqa",
        "wide-heads-biases-tied",
        "llama3-rope",
        "mistral-gqa",
        "mistral-mqa",
        "qwen2-gqa",
        "qwen2-mqa",
        "qwen3-gqa",
        "qwen3-wide-heads-biases",
    ],
)
def test_ctranslate2_decodes_the_tokens_of_transformers(
    tiny_checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], kv_heads: int
) -> None:
    import ctranslate2

    student = convert(tiny_checkpoint(family, **changes), tmp_path / "student", settings={"kv_heads": kv_heads})
    out = export(student, tmp_path / "out", "ctranslate2", QUICK)

    rng = np.random.default_rng(5)
    prompts = [rng.integers(4, 260, length).tolist() for length in (1, 7, 30)]
    expected, margin = greedy(student, prompts, 12)
    check = found(out)
    assert check["loaded"]
    assert check["max_difference"] < 1e-4
    assert check["same_tokens"] == check["tokens"] > 0
    assert margin > 10 * check["max_difference"], "a near tie would make this test say nothing: choose other prompts"

    engine = ctranslate2.Generator(str(out), compute_type="float32", intra_threads=1)
    words = json.loads((out / "vocabulary.json").read_text())
    said = [  # one by one: of prompts of several lengths, it returns the rest of the longer ones too
        engine.generate_batch(
            [[words[number] for number in prompt]],
            max_length=12,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
        )[0]
        for prompt in prompts
    ]
    assert [answer.sequences_ids[0] for answer in said] == expected
    logits = np.array(engine.forward_batch([prompts[2]]))[0]
    assert len(np.unique(logits.argmax(-1))) > 3  # the model does not repeat one token everywhere


MIXED = {
    "llama": ("llama", {}),
    "biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("llama", {**MISTRAL, "sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.slow
@needs_ct2
@pytest.mark.parametrize(("source", "dtype"), [*((source, "float32") for source in MIXED), ("llama", "int8")])
def test_ctranslate2_takes_a_number_of_heads_for_each_layer(
    mixed_checkpoint: Make, tmp_path: Path, source: str, dtype: Any
) -> None:
    family, changes = MIXED[source]
    if dtype == "int8" and not machine.multiplies_int8():
        pytest.skip("without VNNI, int8 saturates: test_narrow_weights_are_smaller_and_close")
    check = found(export(mixed_checkpoint(family, **changes), tmp_path / "out", "ctranslate2", ExportSettings(dtype)))
    assert check["loaded"]
    if dtype == "float32":
        assert check["max_difference"] < 1e-4
        assert check["same_tokens"] == check["tokens"] == 3 * 16


@pytest.mark.slow
@needs_ct2
def test_heads_given_to_the_wrong_layers_are_found_out(
    mixed_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours_ctranslate2, "kv_heads", lambda source: [2, 2, 2, 2])
    source = mixed_checkpoint("llama")
    refusal = "^CTranslate2 cannot run the model: .*has dimension.*; nothing was exported$"  # keys and heads do not fit
    with pytest.raises(UnsupportedModel, match=refusal):
        export(source, tmp_path / "out", "ctranslate2", QUICK)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@needs_ct2
@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [
        ({}, "self=2,cross=1"),
        ({}, 1),
        ({}, "self=4/2/1/2,cross=1/1/4/2"),
        ({"d_kv": 16, "feed_forward_proj": "relu", "num_layers": 5, "num_decoder_layers": 3}, 2),
        ({"scale_decoder_outputs": False}, 2),
        ({"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}, "self=2,cross=1"),
    ],
    ids=["t5", "mqa", "mixed", "wide", "unscaled", "mt5"],
)
def test_ctranslate2_decodes_the_tokens_of_an_encoder_decoder(
    changes: dict[str, Any], kv_heads: str | int, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    import torch

    from kvfold import hf

    student = convert(tiny_checkpoint("t5", **changes), tmp_path / "student", "gqa", {"kv_heads": kv_heads})
    model: Any = hf.load(student, attention="sdpa")
    # a head of its own, as T5.1.1 has one: a tied one says the last token again and again
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(head)
    model.all_tied_weights_keys.pop("lm_head.weight")
    model.save_pretrained(tmp_path / "loud")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(student / name, tmp_path / "loud" / name)
    out = export(tmp_path / "loud", tmp_path / "out", "ctranslate2", QUICK)
    assert found(out)["max_difference"] < 1e-4
    assert found(out)["same_tokens"] == found(out)["tokens"] >= 16

    import ctranslate2

    words = [word for word, _ in sorted(hf.load_tokenizer(student).get_vocab().items(), key=lambda each: each[1])]
    prompts = [[int(n) for n in np.random.default_rng(seed).integers(4, 260, 9)] for seed in range(4)]
    engine = ctranslate2.Translator(str(out), device="cpu")
    said = engine.translate_batch(
        [[words[n] for n in prompt] for prompt in prompts], beam_size=1, max_decoding_length=8
    )
    for prompt, each in zip(prompts, said, strict=True):
        expected = hf.generate(model, torch.tensor([prompt]), max_new_tokens=8)[0, 1:].tolist()
        end = expected.index(2) if 2 in expected else len(expected)  # the tokenizer's end, which is not the config's
        assert [words.index(word) for word in each.hypotheses[0]] == expected[:end]


@needs_ct2
def test_ctranslate2_takes_a_tokenizer_without_an_unknown_word(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """As `kvfold pretrain` trains one: every byte is a word."""
    student = convert(tiny_checkpoint("t5"), tmp_path / "student", "gqa", {"kv_heads": 2})
    said = json.loads((student / "tokenizer_config.json").read_text())
    for name in ("unk_token", "bos_token"):
        said.pop(name)
    (student / "tokenizer_config.json").write_text(json.dumps(said))
    out = export(student, tmp_path / "out", "ctranslate2", QUICK)
    assert found(out)["same_tokens"] == found(out)["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("t5", "gqa", {"kv_heads": "self=2,cross=1"}),
        ("t5gemma", "crosslatent", {}),
        ("bart", "gqa", {"kv_heads": "self=4/2/1/2,cross=2"}),
        ("qwen3", "supra", {"preset": "hybrid", "window": 4, "sinks": 2}),
        ("llama", "elitekv", {"rope_chunks": 1, "latent_dim": 16, "search": "uniform", "metric": "weights"}),
        ("qwen2", "cla", {"share": 2}),
    ],
    ids=["t5", "latent", "bart", "sums", "elitekv", "cla"],
)
def test_a_student_takes_its_code_along(
    family: str, method: str, settings: dict[str, Any], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    """The export itself compares with a process that cannot import kvfold."""
    import torch

    from kvfold import hf

    student = convert(tiny_checkpoint(family), tmp_path / "student", method, settings)
    out = export(student, tmp_path / "out", "transformers", QUICK)
    assert found(out)["same_tokens"] == found(out)["tokens"] > 0
    assert found(out)["max_difference"] < 1e-3
    assert not any("from kvfold." in path.read_text() for path in out.glob("*.py"))
    ours, theirs = (hf.load(each).state_dict() for each in (student, out))  # kvfold reads it as it reads the student
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert Checkpoint.open(out).hash() != Checkpoint.open(student).hash()  # of another config.json


def test_a_student_that_needs_no_code_is_not_given_any(tiny_checkpoint: Make, tmp_path: Path) -> None:
    student = convert(tiny_checkpoint("llama"), tmp_path / "student", "gqa", {"kv_heads": 2})
    with pytest.raises(UnsupportedModel, match="which transformers loads without kvfold; it needs no code: copy it"):
        export(student, tmp_path / "out", "transformers", QUICK)
    mixed = convert(tiny_checkpoint("llama", name="other"), tmp_path / "mixed", "gqa", {"kv_heads": "4/2/1/2"})
    with pytest.raises(SettingError, match="the weights stay float32"):
        export(mixed, tmp_path / "out", "transformers", replace(QUICK, dtype="float16"))
    assert not (tmp_path / "out").exists()


@needs_ct2
def test_an_activation_that_ctranslate2_lacks_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5", feed_forward_proj="gated-tanh")
    with pytest.raises(
        UnsupportedModel, match=r"the engine lacks the activation \(got tanh\); allowed: relu, gelu, gelu_new, silu"
    ):
        export(teacher, tmp_path / "out", "ctranslate2", QUICK)
    if HAS_GGUF:
        with pytest.raises(UnsupportedModel, match="its architecture is not supported"):
            export(teacher, tmp_path / "gguf", "gguf", QUICK)


@pytest.mark.slow
@needs_ct2
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_narrow_weights_are_smaller_and_close(tiny_checkpoint: Make, tmp_path: Path, dtype: Any) -> None:
    teacher = tiny_checkpoint("llama")
    if dtype == "int8" and not machine.multiplies_int8():  # short rows saturate: a user is to hear of it
        with pytest.raises(UnsupportedModel, match=r"no VNNI.*saturate at 16 bits.*--dtype float32"):
            export(teacher, tmp_path / "small", "ctranslate2", ExportSettings(dtype, 12, 8))
        return
    small = export(teacher, tmp_path / "small", "ctranslate2", ExportSettings(dtype, 12, 8))
    assert (small / "model.bin").stat().st_size < 0.6 * (teacher / "model.safetensors").stat().st_size
    assert 1e-6 < found(small)["relative_difference"] < agreement.TOLERANCE[dtype]


@pytest.mark.slow
@needs_ct2
def test_the_export_says_its_lineage_and_the_window_and_repeating_does_nothing(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    teacher, heard = tiny_checkpoint("llama", **MISTRAL, sliding_window=16), Heard()
    out = export(teacher, tmp_path / "out", "ctranslate2", progress=heard)
    assert any("exact for contexts of 16 tokens" in line for line in heard.lines)
    assert found(out)["exact_up_to"] == 16
    assert found(out)["positions"] == 3 * 15  # the comparison stays inside the window
    assert (out / "tokenizer.json").is_file()
    lineage = json.loads((out / "kvfold.json").read_text())
    assert lineage["root"]["name"] == "teacher"

    before = (out / "model.bin").stat().st_mtime_ns
    export(teacher, out, "ctranslate2", progress=heard)
    assert "is complete" in heard.lines[-1]
    assert (out / "model.bin").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="--overwrite"):
        export(teacher, out, "ctranslate2", QUICK)
    export(teacher, out, "ctranslate2", QUICK, overwrite=True)
    assert (out / "model.bin").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("engine", "weights", "vnni", "told"),
    [
        ("ctranslate2", "int8", False, True),
        ("ctranslate2", "int8", True, False),
        ("ctranslate2", "float32", False, False),
        ("gguf", "int8", False, False),
    ],
)
def test_a_refusal_names_the_saturation_where_it_may_be_the_cause(
    monkeypatch: pytest.MonkeyPatch, engine: str, weights: str, vnni: bool, told: bool
) -> None:
    monkeypatch.setattr(ours_ctranslate2, "multiplies_int8", lambda: vnni)
    measured = {"relative_difference": 0.167, "near_ties": 0, "differing_answers": 0}
    with pytest.raises(UnsupportedModel, match="differ by 0.167 of their spread.*nothing was exported") as caught:
        agreement.require(measured, ENGINES[engine].name, weights, ENGINES[engine].advice(weights))
    assert ("no VNNI" in str(caught.value)) is told


@pytest.mark.slow
@needs_ct2
def test_an_engine_that_computes_something_else_leaves_nothing(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_checkpoint("llama", rope_parameters=LLAMA3)
    monkeypatch.setattr(ours_ctranslate2, "frequency_factors", lambda rope: None)
    with pytest.raises(UnsupportedModel, match="disagrees with transformers: logits differ"):
        export(teacher, tmp_path / "out", "ctranslate2", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.slow
@needs_ct2
def test_after_ctrl_c_the_same_export_starts_again(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = tiny_checkpoint("llama"), tmp_path / "out"

    def stop(*_: Any) -> None:
        (tmp_path / "out.partial" / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ENGINES["ctranslate2"], "write", stop)
        with pytest.raises(Interrupted, match="the same command starts it again"):
            export(teacher, out, "ctranslate2", QUICK)
    assert not out.exists()
    assert found(export(teacher, out, "ctranslate2", QUICK))["loaded"]
    assert not (tmp_path / "out.partial").exists()


@needs_ct2
def test_a_checkpoint_without_tokenizer_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        export(tiny_checkpoint("llama", tokenizer=False), tmp_path / "out", "ctranslate2", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_interleave_pairs_the_halves_of_each_head() -> None:
    rows = np.arange(12)[:, None]  # 2 heads of width 6
    assert interleave(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleave(np.arange(6), 1).tolist() == [0, 3, 1, 4, 2, 5]


@needs_gguf
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_holds_the_checkpoint(tiny_checkpoint: Make, tmp_path: Path, family: str) -> None:
    import gguf
    from safetensors.numpy import load_file

    student = convert(tiny_checkpoint(family), tmp_path / "student", settings={"kv_heads": 2})
    heard = Heard()
    out = export(student, tmp_path / "out", "gguf", QUICK, progress=heard)
    reader = gguf.GGUFReader(out / "model.gguf")
    assert reader.get_field(f"{family}.attention.head_count_kv").contents() == 2
    assert reader.get_field("tokenizer.ggml.model").contents() == "none"  # the tests' tokenizer has no merges
    assert any("vocabulary: none" in line for line in heard.lines)
    assert any(NOT_LOADED in line for line in heard.lines) is not HAS_LLAMA_CPP

    stored = {each.name: np.array(each.data) for each in reader.tensors}
    original = load_file(student / "model.safetensors")
    assert len(stored) == len(original)
    for layer in range(4):
        k = original[f"model.layers.{layer}.self_attn.k_proj.weight"]
        if family == "llama":
            k = k.reshape(2, 2, 4, 32).swapaxes(1, 2).reshape(16, 32)  # by the two KV heads, not the four query heads
        assert np.array_equal(stored[f"blk.{layer}.attn_k.weight"], k)
        v = original[f"model.layers.{layer}.self_attn.v_proj.weight"]
        assert np.array_equal(stored[f"blk.{layer}.attn_v.weight"], v)
    assert np.array_equal(stored["token_embd.weight"], original["model.embed_tokens.weight"])


@needs_gguf
@pytest.mark.parametrize("source", ["llama", "biases-tied", "llama3-rope", "mistral", "qwen2"])
def test_a_gguf_of_mixed_heads_is_of_architecture_deci(mixed_checkpoint: Make, tmp_path: Path, source: str) -> None:
    import gguf
    from safetensors.numpy import load_file

    family, changes = MIXED[source]
    teacher, heard = mixed_checkpoint(family, **changes), Heard()
    reader = gguf.GGUFReader(export(teacher, tmp_path / "out", "gguf", QUICK, progress=heard) / "model.gguf")
    assert any("serve it with flash attention" in line for line in heard.lines)
    assert reader.get_field("general.architecture").contents() == "deci"
    assert reader.get_field("deci.attention.head_count_kv").contents() == list(HEADS)
    assert reader.get_field("deci.attention.head_count").contents() == 4
    stored = {each.name: np.array(each.data) for each in reader.tensors}
    original = load_file(teacher / "model.safetensors")
    for layer, heads in enumerate(HEADS):
        for role, count in (("q", 4), ("k", heads)):
            for kind in ("weight", "bias"):
                rows = original.get(f"model.layers.{layer}.self_attn.{role}_proj.{kind}")
                if rows is not None:
                    neighbours = [head * 8 + half * 4 + n for head in range(count) for n in range(4) for half in (0, 1)]
                    assert np.array_equal(stored[f"blk.{layer}.attn_{role}.{kind}"], rows[neighbours])
        v = original[f"model.layers.{layer}.self_attn.v_proj.weight"]
        assert np.array_equal(stored[f"blk.{layer}.attn_v.weight"], v)
        assert v.shape[0] == heads * 8
    assert ("rope_freqs.weight" in stored) == (source == "llama3-rope")
    assert len(stored) == len(original) + ("rope_freqs.weight" in stored)


@needs_gguf
def test_a_gguf_of_qwen3_has_its_norms_and_keeps_its_rows(tiny_checkpoint: Make, tmp_path: Path) -> None:
    import gguf
    from safetensors.numpy import load_file

    teacher = tiny_checkpoint("qwen3")
    reader = gguf.GGUFReader(export(teacher, tmp_path / "out", "gguf", QUICK) / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "qwen3"
    stored = {each.name: np.array(each.data) for each in reader.tensors}
    original = load_file(teacher / "model.safetensors")
    assert len(stored) == len(original)
    for theirs, ours in {"q": "q_proj", "k": "k_proj", "q_norm": "q_norm", "k_norm": "k_norm"}.items():
        tensor = original[f"model.layers.1.self_attn.{ours}.weight"]
        assert np.array_equal(stored[f"blk.1.attn_{theirs}.weight"], tensor)


@needs_gguf
@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3", {}, "deci.*has no norms of q and k; export to ctranslate2"),
        ("qwen2", {"head_dim": 16}, "deci.*has only biases as wide as the model; export to ctranslate2"),
    ],
)
def test_what_deci_cannot_hold_is_refused(
    mixed_checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"cannot be exported to llama.cpp: {said}"):
        export(mixed_checkpoint(family, **changes), tmp_path / "out", "gguf", QUICK)
    assert not (tmp_path / "out").exists()


@needs_gguf
@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3", {"attention_bias": True}, "qwen3 has no biases"),
        ("qwen2", {"rope_parameters": LLAMA3}, "qwen2 has no scaled rotary frequencies"),
    ],
)
def test_what_an_architecture_of_llama_cpp_cannot_hold_is_refused(
    tiny_checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        export(tiny_checkpoint(family, **changes), tmp_path / "out", "gguf", QUICK)


@needs_gguf
def test_a_window_is_the_context_length_of_a_gguf(tiny_checkpoint: Make, tmp_path: Path) -> None:
    import gguf

    teacher = tiny_checkpoint("llama", **MISTRAL, sliding_window=32)
    out = export(teacher, tmp_path / "out", "gguf", QUICK)
    assert gguf.GGUFReader(out / "model.gguf").get_field("llama.context_length").contents() == 32


@needs_gguf
def test_float16_that_overflows_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    teacher = tiny_checkpoint("llama")
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"][3, 5] = 1e6
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match="float16 cannot hold"):
        export(teacher, tmp_path / "out", "gguf", ExportSettings("float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@needs_llama_cpp
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {**MISTRAL, "sliding_window": 64}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=["wide-heads-biases-tied", "llama3-rope", "mistral", "qwen2", "qwen3"],
)
def test_llama_cpp_computes_the_logits_of_transformers(
    tiny_checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], kv_heads: int
) -> None:
    student = convert(tiny_checkpoint(family, **changes), tmp_path / "student", settings={"kv_heads": kv_heads})
    check = found(export(student, tmp_path / "out", "gguf", QUICK))
    assert check["loaded"]
    assert check["max_difference"] < 1e-3
    assert check["same_tokens"] == check["tokens"] == 3 * 8


@needs_llama_cpp
@pytest.mark.parametrize("source", ["llama", "biases-tied", "llama3-rope", "mistral", "qwen2"])
def test_llama_cpp_computes_mixed_heads(mixed_checkpoint: Make, tmp_path: Path, source: str) -> None:
    family, changes = MIXED[source]
    check = found(export(mixed_checkpoint(family, **changes), tmp_path / "out", "gguf", QUICK))
    assert check["loaded"]
    assert check["max_difference"] < 1e-3
    assert check["same_tokens"] == check["tokens"] == 3 * 8


@needs_llama_cpp
def test_llama_cpp_computes_mixed_heads_with_flash_attention(mixed_checkpoint: Make, tmp_path: Path) -> None:
    from kvfold.hf import load

    source = mixed_checkpoint("llama")
    known = agreement.reference(load(source, attention="sdpa"), vocab_size=260, prompt_tokens=12, new_tokens=8)
    out = export(source, tmp_path / "out", "gguf", QUICK)
    check = agreement.compare(known, *LlamaCpp(flash_attention=True).answer(out, known, "float32"))
    assert 0 < check["relative_difference"] < agreement.TOLERANCE["float16"]
    assert check["max_difference"] != found(out)["max_difference"]  # it is another attention that answered


@needs_llama_cpp
def test_rows_ordered_by_another_layers_heads_are_found_out(
    mixed_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours_gguf, "interleave", lambda rows, heads: interleave(rows, 1 if heads == 2 else heads))
    source = mixed_checkpoint("llama")
    with pytest.raises(UnsupportedModel, match="disagrees with transformers: logits differ"):
        export(source, tmp_path / "out", "gguf", QUICK)
    assert not list(tmp_path.glob("out*"))


@needs_llama_cpp
def test_a_gguf_that_llama_cpp_refuses_is_not_put_in_place(
    mixed_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours_gguf, "kv_heads", lambda source: [2, 2, 1, 4])  # not those of the tensors
    source = mixed_checkpoint("llama")
    refusal = "^llama.cpp cannot run the model: .*model.gguf; nothing was exported$"
    with pytest.raises(UnsupportedModel, match=refusal):
        export(source, tmp_path / "out", "gguf", QUICK)
    assert not list(tmp_path.glob("out*"))


@needs_llama_cpp
def test_a_gguf_with_rows_in_the_wrong_order_is_found_out(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours_gguf, "interleave", lambda values, heads: values)
    with pytest.raises(UnsupportedModel, match="disagrees with transformers"):
        export(tiny_checkpoint("llama"), tmp_path / "out", "gguf", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "split"),
    [
        (BYTES, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}, None),
        ({"type": "Metaspace"}, None),
        (None, None),
    ],
)
def test_a_vocabulary_is_written_where_llama_cpp_splits_as_it_does(pre_tokenizer: Any, split: str | None) -> None:
    tokenizer = {"model": {"type": "BPE", "merges": [["a", "b"]]}, "pre_tokenizer": pre_tokenizer}
    assert byte_level_split(tokenizer) == split
    assert byte_level_split({**tokenizer, "model": {"type": "Unigram"}}) is None


# --- what both share ------------------------------------------------------------------------------------------------


def test_frequency_factors_are_those_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = limits.frequency_factors(Rope(64, 10000.0, scaling=LLAMA3))
    assert factors is not None
    assert factors.min() == 1
    assert factors.max() == 8
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    assert limits.frequency_factors(Rope(64, 10000.0)) is None
    linear = limits.frequency_factors(Rope(8, 10000.0, scaling={"rope_type": "linear", "factor": 4.0}))
    assert linear is not None
    assert linear.tolist() == [4, 4, 4, 4]


def _reference() -> agreement.Reference:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 9)).astype(np.float32)
    return agreement.Reference([[1, 2, 3]], [rows[2:].argmax(-1).tolist()], [rows])


def test_agreement_counts_tokens_and_excuses_only_near_ties() -> None:
    known = _reference()
    same = agreement.compare(known, known.logits, known.answers)
    agreement.require(same, "engine", "float32")
    assert (same["positions"], same["tokens"], same["same_tokens"], same["max_difference"]) == (5, 3, 3, 0)

    other = [known.answers[0][0], (known.answers[0][1] + 1) % 9, 0]
    parted = agreement.compare(known, known.logits, [other])
    assert (parted["same_tokens"], parted["differing_answers"], parted["near_ties"]) == (1, 1, 0)
    with pytest.raises(UnsupportedModel, match="no near tie"):
        agreement.require(parted, "engine", "float32")

    tie = known.logits[0].copy()
    tie[3, other[1]] = tie[3].max() - 1e-6
    known = agreement.Reference(known.prompts, known.answers, [tie])
    noisy = agreement.compare(known, [tie + np.float32(1e-5)], [other])
    assert (noisy["differing_answers"], noisy["near_ties"]) == (1, 1)
    agreement.require(noisy, "engine", "float32")


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_logits_that_are_off_are_refused(wrong: float) -> None:
    known = _reference()
    found = agreement.compare(known, [known.logits[0] + np.float32(wrong)], known.answers)
    with pytest.raises(UnsupportedModel, match="logits differ"):
        agreement.require(found, "engine", "bfloat16")


def test_an_unknown_engine_is_named_with_the_nearest(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no engine is called 'ctranslate'.*did you mean 'ctranslate2'\?"):
        export(tiny_checkpoint("llama"), tmp_path / "out", "ctranslate")


@pytest.mark.parametrize(
    ("engine", "package", "extra"), [("ctranslate2", "ctranslate2", "ct2"), ("gguf", "gguf", "gguf")]
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=rf"not installed; pip install 'kvfold\[{extra}\]'"):
        export(tmp_path / "missing", tmp_path / "out", engine)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "gates its MLP with silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic' cannot be exported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotates whole heads",
        ),
    ],
)
@needs_ct2
def test_what_the_engine_has_no_place_for_is_refused(
    tiny_checkpoint: Make, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    teacher = tiny_checkpoint("llama")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedModel, match=said):
        export(teacher, tmp_path / "out", "ctranslate2", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens"])
def test_lengths_below_one_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} must be at least 1"):
        ExportSettings(**{name: 0})
