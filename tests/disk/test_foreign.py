"""What people point kvfold at instead of a checkpoint: each is one line that says what it is and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.source import read_config
from kvfold.errors import CheckpointError, UnsupportedModel

Make = Callable[..., Path]


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _renamed(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert "download it again" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "without"])
@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["adapter_config.json"], "is a PEFT adapter, not a model (got of org/base); merge it first, with peft: Peft"),
        (["adapter_model.safetensors"], "is a PEFT adapter, not a model; merge it first"),
        (["model_index.json"], "is a diffusers pipeline"),
        (["weights-q4_k_m.gguf"], "holds GGUF weights, llama.cpp's own; convert the transformers checkpoint"),
        (["consolidated.00.pth", "params.json"], "the original format of Meta or Mistral (consolidated.*); take the"),
        (["consolidated.safetensors"], "the original format of Meta or Mistral"),
        (["onnx/model.onnx"], "holds an ONNX export"),
        (["model.onnx"], "holds an ONNX export"),
        (["tf_model.h5"], "holds weights of TensorFlow alone"),
        (["flax_model.msgpack"], "holds weights of Flax alone"),
        (["zero_to_fp32.py", "latest"], "is a DeepSpeed checkpoint; run its zero_to_fp32.py"),
        (["__0_0.distcp"], "is a sharded checkpoint of torch.distributed"),
        (["weights.npz"], "holds weights of MLX or numpy"),
        (
            ["model.fp16.safetensors"],
            "only a variant of the weights (got model.fp16.safetensors); rename it",
        ),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            "shards lie here without model.safetensors.index.json, which maps each tensor to its shard (got 2 of 3",
        ),
        (["pytorch_model-00001-of-00001.bin"], "shards lie here without pytorch_model.bin.index.json"),
    ],
)
def test_a_folder_that_is_something_else(files: list[str], what: str, config: bool, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llama")
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"base_model_name_or_path": "org/base"}' if name == "adapter_config.json" else "x")
    assert what in _refusal(folder)


def test_an_adapter_beside_a_whole_model_is_no_trouble(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llama")
    (folder / "adapter_config.json").write_text("{}")
    assert Checkpoint.open(folder).names()


def test_a_folder_of_checkpoints_names_the_last(tiny_checkpoint: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tiny_checkpoint("llama").rename(run / "checkpoint-20")
    with pytest.raises(CheckpointError, match=r"contains checkpoints, but is not one; did you mean .*checkpoint-20\?"):
        read_config(run)
    hub = tmp_path / "models--a--b"
    (hub / "snapshots").mkdir(parents=True)
    (run / "checkpoint-20").rename(hub / "snapshots" / "0123")
    with pytest.raises(CheckpointError, match=r"did you mean .*snapshots/0123\?"):
        read_config(hub)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (
            "q_proj.",
            "q_proj.base_layer.",
            "still hold a PEFT adapter beside its base layers .*; merge the adapter",
        ),
        ("model.layers", "base_model.model.model.layers", "still hold a PEFT adapter"),
        ("down_proj.weight", "down_proj.qweight", r"quantised \(GPTQ or AWQ\)"),
        ("down_proj.weight", "down_proj.SCB", r"quantised \(bitsandbytes\)"),
        ("down_proj.weight", "down_proj.weight_scale", r"quantised \(scaled weights\)"),
        ("down_proj.weight", "down_proj.scales", r"quantised \(MLX"),
        ("model.", "module.model.", "named as DistributedDataParallel wraps them"),
        ("model.", "_orig_mod.model.", "named as torch.compile wraps them"),
    ],
)
def test_names_that_tell_what_happened(old: str, new: str, what: str, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llama")
    _renamed(folder, lambda name: name.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=what):
        Checkpoint.open(folder)
    assert _refusal(folder)


def test_a_sentence_transformer_has_no_language_model(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("qwen3")
    (folder / "modules.json").write_text("[]")
    assert Checkpoint.open(folder).names(), "a whole language model may lie in it"
    _renamed(folder, lambda name: name.removeprefix("model."))
    assert "is a sentence-transformers model" in _refusal(folder)


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_another_number_of_layers_than_config_says(family: str, layers: int, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(family)
    count = "num_hidden_layers" if family == "llama" else "num_layers"
    have = json.loads((folder / "config.json").read_text())[count]
    _config(folder, **{count: have + layers - 4, **({"num_decoder_layers": have} if family == "t5" else {})})
    assert f"config.json says {have + layers - 4} layers, but the weights have {have} (got " in _refusal(folder)


@pytest.mark.parametrize(
    "said",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": "gptq"},
        {"quantization_config": ["gptq"]},
        {"quantization_config": {"bits": 4}},
        {"compression_config": {"format": "float-quantized", "quant_method": "compressed-tensors"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"quant_config": {"zero_point": True}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
    ids=str,
)
def test_quantised_weights_in_every_shape_of_config(said: dict[str, Any], tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llama")
    _config(folder, **said)
    with pytest.raises(UnsupportedModel, match=r"the weights are quantised \(.*; convert the unquantised checkpoint"):
        Checkpoint.open(folder)
    _config(folder, **dict.fromkeys(said))  # an empty one is refused where transformers cannot read it
    assert Checkpoint.open(folder).names()


# --- .bin -----------------------------------------------------------------------------------------------------------


def test_bin_files_from_before_zip_and_views_of_one_storage(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llama")
    expected = Checkpoint.open(folder).hash()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "model.layers.0.self_attn.q_proj.weight"
    for zipped in (True, False):
        both = torch.stack([tensors[name], tensors[name] + 1])  # a view of a larger storage, and one that is turned
        stored = {**tensors, name: both[0], "lm_head.weight": tensors["lm_head.weight"].T.contiguous().T}
        torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert Checkpoint.open(folder).hash() == expected


def test_bin_files_that_are_no_mapping_of_tensors(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("llama", form="bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "pytorch_model.bin")
    assert "is not a mapping of names to tensors (got state_dict, epoch); save the state_dict" in _refusal(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a git-lfs pointer" in _refusal(folder)
