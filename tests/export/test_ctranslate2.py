"""CTranslate2: it decodes what transformers decodes, or nothing is put in place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import paired
from exports import HAS_GGUF, LLAMA3, MISTRAL, MIXED, QUICK, Make, found, greedy, needs_ct2
from kvfold import machine
from kvfold.convert.conversion import convert
from kvfold.errors import UnsupportedModel
from kvfold.export import agreement, ct2_decoder
from kvfold.export import ctranslate2 as ours_ctranslate2
from kvfold.export.exporting import ENGINES, ExportSettings, export
from kvfold.families import all_families

_LIKE_BART = ("mbart", "plbart", "m2m_100", "marian", "pegasus", "blenderbot")


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
    monkeypatch.setattr(ct2_decoder, "kv_heads", lambda source: [2, 2, 2, 2])
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
        *(
            ({"model_type": name.lower(), "architectures": [f"{name}ForConditionalGeneration"]}, "self=2,cross=1")
            for name in ("MT5", "UMT5")
        ),
        *(({**paired()[name][1], "decoder_start_token_id": 5}, "self=2,cross=1") for name in _LIKE_BART),
    ],
    ids=["t5", "mqa", "mixed", "wide", "unscaled", "mt5", "umt5", *_LIKE_BART],
)
def test_ctranslate2_decodes_the_tokens_of_an_encoder_decoder(
    changes: dict[str, Any], kv_heads: str | int, tiny_checkpoint: Make, tmp_path: Path
) -> None:
    import torch

    from kvfold import hf

    family = "bart" if changes.get("model_type") in all_families()["bart"].model_types else "t5"
    student = convert(tiny_checkpoint(family, **changes), tmp_path / "student", "gqa", {"kv_heads": kv_heads})
    model: Any = hf.load(student, attention="sdpa")
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.linspace(-1, 1, 300))
    if family == "t5":  # a head of its own, as T5.1.1 has one: a tied one says the last token again and again
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


@needs_ct2
def test_an_activation_that_ctranslate2_lacks_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    teacher = tiny_checkpoint("t5", feed_forward_proj="gated-tanh")
    with pytest.raises(
        UnsupportedModel,
        match=r"the engine lacks the activation \(got tanh\); allowed: relu, gelu, gelu_new, gelu_pytorch_tanh, silu",
    ):
        export(teacher, tmp_path / "out", "ctranslate2", QUICK)
    if HAS_GGUF:
        with pytest.raises(UnsupportedModel, match="its architecture is not supported"):
            export(teacher, tmp_path / "gguf", "gguf", QUICK)


@pytest.mark.slow
@needs_ct2
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # narrow weights `1 + w` would be too far off
def test_narrow_weights_are_smaller_and_close(tiny_checkpoint: Make, tmp_path: Path, dtype: Any, family: str) -> None:
    teacher = tiny_checkpoint(family)
    if dtype == "int8" and not machine.multiplies_int8():  # short rows saturate: a user is to hear of it
        with pytest.raises(UnsupportedModel, match=r"no VNNI.*saturate at 16 bits.*--dtype float32"):
            export(teacher, tmp_path / "small", "ctranslate2", ExportSettings(dtype, 12, 8))
        return
    small = export(teacher, tmp_path / "small", "ctranslate2", ExportSettings(dtype, 12, 8))
    assert (small / "model.bin").stat().st_size < 0.6 * (teacher / "model.safetensors").stat().st_size
    assert 1e-6 < found(small)["relative_difference"] < agreement.TOLERANCE[dtype]


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
