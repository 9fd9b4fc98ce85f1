"""GGUF: the file holds the checkpoint, and llama.cpp computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import HAS_LLAMA_CPP, HEADS, LLAMA3, MISTRAL, MIXED, QUICK, Heard, Make, found, needs_gguf, needs_llama_cpp
from kvfold.convert.conversion import convert
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export import agreement
from kvfold.export import gguf as ours_gguf
from kvfold.export.exporting import ExportSettings, export
from kvfold.export.gguf import NOT_LOADED, LlamaCpp, byte_level_split, interleave

ENDS = ("weight", "bias")


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
@pytest.mark.parametrize("family", ["phi", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_of_phi_is_of_architecture_phi2(tiny_checkpoint: Make, tmp_path: Path, family: str, tied: bool) -> None:
    import gguf
    from safetensors.numpy import load_file

    teacher = tiny_checkpoint(family, tie_word_embeddings=tied, intermediate_size=96)
    student = convert(teacher, tmp_path / "student", settings={"kv_heads": 2})
    reader = gguf.GGUFReader(export(student, tmp_path / "out", "gguf", QUICK) / "model.gguf")
    assert LlamaCpp().precision(Checkpoint.open(student), "float32") == "float16"
    config = json.loads((student / "config.json").read_text())
    rotated = config["rope_parameters"]["partial_rotary_factor"] * 8
    assert reader.get_field("general.architecture").contents() == "phi2"
    for name, value in {
        "attention.head_count_kv": 2,
        "feed_forward_length": 96,
        "rope.dimension_count": rotated,
    }.items():
        assert reader.get_field(f"phi2.{name}").contents() == value
    assert reader.get_field("phi2.attention.layer_norm_epsilon").contents() == pytest.approx(config["layer_norm_eps"])

    stored = {each.name: np.array(each.data) for each in reader.tensors}
    original = load_file(student / "model.safetensors")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {
        "self_attn.dense": "attn_output",
        "input_layernorm": "attn_norm",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    }
    pairs = {f"model.layers.{n}.{theirs}": f"blk.{n}.{ours}" for n in range(4) for theirs, ours in names.items()}
    pairs |= {"model.final_layernorm": "output_norm", "lm_head": "output"}
    wanted = {f"{ours}.{end}": original.get(f"{theirs}.{end}") for theirs, ours in pairs.items() for end in ENDS}
    embedding = wanted["token_embd.weight"] = original["model.embed_tokens.weight"]
    if tied:
        assert wanted["output.weight"] is None
        wanted["output.weight"] = embedding
    assert stored.keys() == wanted.keys()
    assert all(np.array_equal(stored[name], tensor) for name, tensor in wanted.items())


@needs_gguf
@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("phi", {}, "phi2 has one number of key/value heads for all layers; export to ctranslate2"),
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
        ("phi", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "phi2 has no scaled rotary frequencies"),
        ("phi", {"head_dim": 16}, "phi2 has only heads that are together as wide as the model"),
        ("phi", {"hidden_act": "relu"}, "the engine lacks the activation"),
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
        ("phi", {"tie_word_embeddings": True}),
        ("gpt_neox", {}),
    ],
    ids=["wide-heads-biases-tied", "llama3-rope", "mistral", "qwen2", "qwen3", "phi", "gpt_neox"],
)
def test_llama_cpp_computes_the_logits_of_transformers(
    tiny_checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], kv_heads: int
) -> None:
    student = convert(tiny_checkpoint(family, **changes), tmp_path / "student", settings={"kv_heads": kv_heads})
    check = found(export(student, tmp_path / "out", "gguf", QUICK))
    assert check["loaded"]
    assert check["max_difference"] < (5e-3 if family in ("phi", "gpt_neox") else 1e-3)  # GELU of a float16 table
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
    known = agreement.reference(load(source, attention="sdpa"), agreement.random_prompts(260, 12), new_tokens=8)
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
