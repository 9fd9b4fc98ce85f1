"""What fields of config.json may be: the issue's examples, transformers' own refusals, and configs that people have."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import mutations
from kvfold.contracts.config import ACTIVATION, COMMON, RESERVED, check_names
from kvfold.contracts.config import Fields as SchemaFields
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, DataError, UnsupportedModel
from kvfold.families import all_families, family_of
from kvfold.hf import load_tokenizer
from kvfold.predict.plan import plan

BASES = mutations.bases()
LINEAR = BASES["linear"]["linear_attention"]


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config, "here").shape(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("base", "changes", "line"),
    [
        ("llama", {"num_key_value_heads": "4"}, "here: num_key_value_heads must be a positive whole number or null (g"),
        (
            "llama",
            {"num_key_value_heads": True},
            "num_key_value_heads must be a positive whole number or null (got True",
        ),
        ("llama", {"head_dim": []}, "head_dim must be a positive whole number or null (got [])"),
        ("llama", {"head_dim": 7}, "heads of 7 coordinates cannot be rotated in pairs"),
        ("llama", {"head_dim": None, "num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 32"),
        ("llama", {"rope_theta": "abc"}, "rope_theta must be a number (got 'abc'); allowed: above 1"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta must be a number (got inf)"),
        (
            "llama",
            {"num_hidden_layers": 10**7},
            "num_hidden_layers must be a positive whole number (got 10000000); all",
        ),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers must be a positive whole number (got -1)"),
        (
            "llama",
            {"vocab_size": 10**12},
            "vocab_size must be a positive whole number (got 1000000000000); allowed: 1 to",
        ),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number with a decimal point (got nan)"),
        (
            "llama",
            {"dtype": 7},
            "dtype must be one of float64, float32, bfloat16, float16 or float8_e4m3fn or null (got",
        ),
        ("llama", {"architectures": [7]}, "architectures must be a list of words or null (got [7])"),
        ("llama", {"quantization_config": {}}, "quantization_config must be null: transformers reads an empty one"),
        ("llama", {"pad_token_id": 96}, "pad_token_id must be a token id or null (got 96); allowed: -2"),
        ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id must be a token id, a list of them or null (got [1, '2'])"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types must name 4 layers (got ['full_attention'])"),
        ("llama", {"sliding_window": 5}, "sliding_window must be null: this architecture has no windows (got 5)"),
        (
            "llama",
            {"text_config": {"a": 1}},
            "text_config holds a config inside another, and this architecture has non",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor must be a number (got None)"),
        (
            "llama",
            {"rope_scaling": {"type": "foo"}, "rope_parameters": None},
            "rope_scaling.rope_type is not known here",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1: this architecture rotates whole"),
        ("llama", {"to_dict": 1}, "'to_dict' is a part of transformers' config class, not a setting; remove it"),
        ("llama", {"x": "\ud800"}, "holds half of a surrogate pair"),
        ("mistral", {"sliding_window": -1}, "sliding_window must be a positive whole number or null (got -1)"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads must be a positive whole number (got None)"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types must name 4 layers"),
        ("t5", {"num_heads": 0}, "num_heads must be a positive whole number (got 0)"),
        (
            "t5",
            {"hidden_size": 7},
            "hidden_size is another name of d_model and has another value (got 7); allowed: 32",
        ),
        ("t5", {"is_gated_act": False}, "is_gated_act and feed_forward_proj differ (got False)"),
        ("bart", {"decoder_attention_heads": 3}, "decoder_attention_heads 3 does not divide d_model 32"),
        ("t5gemma", {"decoder": []}, "decoder must be a part with settings of its own (got [])"),
        ("t5gemma", {"vocab_size": 97}, "vocab_size is not the decoder's (got 97); allowed: 96"),
        ("t5gemma", {"encoder": {**BASES["t5gemma"]["encoder"], "head_dim": "8"}}, "encoder.head_dim must be a positi"),
        ("shared", {"per_layer_config": {"1": 2}}, "per_layer_config must be a mapping of layers to fields or null"),
        ("shared", {"kv_source_layers": [0, True, 0, 3]}, "kv_source_layers must be a list of whole numbers or null"),
        ("latent", {"rope_chunks": [1, 2, 3, 5]}, "rope_chunks must not be above 4 (got 5)"),
        ("linear", {"linear_attention": {**LINEAR, "window": "x"}}, "linear_attention.window must be a whole number"),
        ("linear", {"linear_attention": {**LINEAR, "sinks": 4}}, "features none and sinks need a window"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(base: str, changes: dict[str, Any], line: str) -> None:
    assert line in refusal(BASES[base] | changes)


def test_a_quantised_model_is_refused_whatever_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASES["llama"] | {"quantization_config": "gptq"}))
    with pytest.raises(UnsupportedModel, match=r"the weights are quantised \(gptq\)"):
        plan(tmp_path, "identity")


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_what_transformers_refuses_is_refused(name: str) -> None:
    """Every field of transformers' own config class, with values of types that it cannot be."""
    config = BASES[name]
    kind = type(transformers.AutoConfig.for_model(**config))
    for field in dataclasses.fields(kind):
        if field.name in ("encoder", "decoder"):
            continue
        for value in ("x", 1.5, 7, [], {}, None, [None]):
            changed = config | {field.name: value}
            try:
                transformers.AutoConfig.for_model(**changed)
            except Exception:
                assert refusal(changed)


def test_reserved_names_are_those_of_transformers_and_no_setting() -> None:
    """A method or a property without a setter is no setting; what a config may say has a rule."""
    classes = [type(transformers.AutoConfig.for_model(**config)) for config in BASES.values()]
    known = {field.name for kind in classes for field in dataclasses.fields(kind)}
    settable = {"num_labels", "output_attentions", "rope_scaling", "torch_dtype", "per_layer_config", "model_type"}
    settable |= {"name_or_path", "_attn_implementation", "_experts_implementation", "_auto_class"}
    settable |= {name for kind in classes for name in getattr(kind, "attribute_map", {})}
    for name in {name for kind in classes for name in dir(kind)} - known - settable:
        with pytest.raises(UnsupportedModel, match="is a part of transformers' config class"):
            check_names(SchemaFields({name: 1}))
    assert not RESERVED & (set(COMMON) | known)


def test_activations_are_those_of_transformers_without_parameters() -> None:
    from typing import get_args

    from transformers.activations import ACT2FN

    assert set(get_args(ACTIVATION.kind)) == {
        name for name in ACT2FN if not list(ACT2FN[name].parameters()) and name != "xielu"
    }


# --- configs that people have ---------------------------------------------------------------------------------------

OLD: dict[str, Any] = {"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "float16", "use_cache": True}
SIDES = ("encoder", "decoder")
LLAMA = {
    **OLD,
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    **{"num_hidden_layers": 32, "rms_norm_eps": 1e-6, "vocab_size": 32000},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "LLaMA 7B": (
        6_738_415_616,
        {**LLAMA, "architectures": ["LLaMAForCausalLM"], "pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "Llama 3.1 8B": (
        8_030_261_248,
        {
            **LLAMA,
            **{"eos_token_id": [128001, 128008, 128009], "intermediate_size": 14336, "num_key_value_heads": 8},
            **{"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 500000.0, "vocab_size": 128256},
            **{"attention_dropout": 0.0, "max_position_embeddings": 131072, "pretraining_tp": 1, "mlp_bias": False},
        },
    ),
    "Mistral 7B": (
        7_241_732_096,
        {
            **LLAMA,
            **{"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
            **{"rope_theta": 10000.0, "max_position_embeddings": 32768},
        },
    ),
    "Qwen2.5 0.5B, YaRN": (
        494_032_768,
        {
            **OLD,
            **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
            **{"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 151936},
            **{"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False},
            **{"tie_word_embeddings": True, "rope_theta": 1000000, "max_position_embeddings": 32768},
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
    ),
    "Pythia 70M": (
        70_426_624,
        {
            **{"model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
            **{"num_hidden_layers": 6, "vocab_size": 50304, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048},
            **{"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True, "torch_dtype": "float16"},
            **{"rope_theta": 10000, "partial_rotary_factor": 0.25, "bos_token_id": 0, "eos_token_id": 0},
        },
    ),
    "phi-2": (
        2_779_683_840,
        {
            **{"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32},
            **{"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 51200, "hidden_act": "gelu_new"},
            **{"partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "embd_pdrop": 0.0},
            **{"layer_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"},
        },
    ),
    "flan-t5-small": (
        76_961_152,
        {
            **{"model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "num_heads": 6, "num_layers": 8},
            **{"num_decoder_layers": 8, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu"},
            **{"is_gated_act": True, "tie_word_embeddings": False, "vocab_size": 32128, "n_positions": 512},
            **{"initializer_factor": 1.0, "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0, "output_past": True},
        },
    ),
    "bart-large-cnn": (
        406_290_432,
        {
            **{"model_type": "bart", "d_model": 1024, "vocab_size": 50264, "max_position_embeddings": 1024},
            **{f"{part}_attention_heads": 16 for part in SIDES},
            **{
                f"{part}_{name}": n
                for part in ("encoder", "decoder")
                for name, n in (("layers", 12), ("ffn_dim", 4096))
            },
            **{
                "num_hidden_layers": 12,
                "id2label": {"0": "a", "1": "b", "2": "c"},
                "label2id": {"a": 0},
                "num_beams": 4,
            },
            **{"forced_bos_token_id": 0, "forced_eos_token_id": 2, "gradient_checkpointing": False, "_num_labels": 3},
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_models_are_taken(name: str) -> None:
    """The numbers of parameters are the published ones."""
    parameters, config = PUBLISHED[name]
    assert family_of(config).shape(config).parameters == parameters


def test_a_mistral_that_does_not_say_has_the_window_that_transformers_gives_it() -> None:
    config = {key: value for key, value in BASES["mistral"].items() if key != "sliding_window"}
    made = transformers.AutoConfig.for_model(**config)
    (window,) = {each.window for each in family_of(config).shape(config).sites.values()}
    assert window == made.sliding_window
    biased = config | {"attention_bias": True}  # a field of llama's alone
    assert family_of(biased).shape(biased) == family_of(config).shape(config)


# --- files that are no files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "kvfold.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_files_that_are_no_files_are_refused_at_once(
    tiny_checkpoint: Callable[..., Path], name: str, kind: str
) -> None:
    folder = tiny_checkpoint()
    path = folder / name
    path.unlink(missing_ok=True)
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
    }
    make[kind]()
    with pytest.raises(CheckpointError, match=r"is not a regular file|cannot be read|no weights"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_tokenizers_that_are_no_files_are_refused_at_once(tiny_checkpoint: Callable[..., Path], name: str) -> None:
    folder = tiny_checkpoint()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match="is not a regular file"):
        load_tokenizer(folder)


def test_a_panic_of_the_tokenizer_is_one_line(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    fast = json.loads((folder / "tokenizer.json").read_text())
    fast["model"] |= {"continuing_subword_prefix": "x" * 20, "merges": [["a", "b"]]}
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)
    assert capfd.readouterr().err == ""


def test_a_place_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "loop", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(CheckpointError, match=r"cannot be read|no such directory"):
            Checkpoint.open(place)


def test_every_family_checks_its_fields() -> None:
    for family in all_families().values():
        config = family.tiny()
        for name, value in config.items():
            if isinstance(value, int) and not isinstance(value, bool):
                assert f"{name} must be" in refusal(config | {name: "nonsense"})
