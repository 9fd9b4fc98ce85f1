"""Folders and weights that are not a transformers checkpoint: each kind has an error of its own with the remedy.

A folder without config.json or weights, or with weights of other names, is rarely an incomplete download: it holds an
adapter, quantised weights, or the files of another engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvfold.contracts.family import Family
from kvfold.contracts.site import Shape
from kvfold.disk.output import read_object
from kvfold.errors import CheckpointError, UnsupportedModel

QUANTISED = "convert the unquantised checkpoint, and quantise the student"
MERGE = "peft: PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(OUT), then convert OUT"
_SOURCE = "give the transformers checkpoint that it was made from"
_OLDER = "load it with from_{}=True in transformers 4, and save it with save_pretrained"

_FOLDERS = (  # files (globs) -> the kind of folder, and the remedy
    (("model_index.json",), "is a diffusers pipeline, not a language model", "give the folder of a language model"),
    (("*.gguf",), "holds GGUF weights, llama.cpp's own", "convert the transformers checkpoint that it was made from"),
    (
        ("consolidated*.*",),
        "holds weights in the original format of Meta or Mistral (consolidated.*)",
        "take the transformers version of the model, or write it with transformers' convert_*_weights_to_hf.py",
    ),
    (("zero_to_fp32.py",), "is a DeepSpeed checkpoint", "run its zero_to_fp32.py, which writes pytorch_model.bin"),
    (("*.distcp",), "is a sharded checkpoint of torch.distributed", "merge it: accelerate merge-weights DIR OUT"),
    (("*.onnx", "onnx/*.onnx"), "holds an ONNX export, not weights that can be folded", _SOURCE),
    (("tf_model*",), "holds weights of TensorFlow alone", _OLDER.format("tf")),
    (("flax_model*",), "holds weights of Flax alone", _OLDER.format("flax")),
    (("*.npz",), "holds weights of MLX or numpy alone", _SOURCE),
)
_QUANTISED_NAMES = (  # endings of tensor names -> the tool that writes them
    ((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ((".SCB", ".absmax", ".quant_map", ".weight_format"), "bitsandbytes"),
    ((".weight_scale", ".weight_packed", ".weight_scale_inv", ".input_scale", ".weight_zero_point"), "scaled weights"),
    ((".scales", ".biases", "_blocks", "_scales"), "MLX, or blocks with scales"),
)
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP"}
_OTHER_HEADS = ("score.", "classifier.", "classification_head.", "qa_outputs.", "v_head.")
_ADAPTER = re.compile(r"\.base_layer\.|\.lora_|^base_model\.")


def check_folder(folder: Path) -> None:
    """Explain a folder without config.json or weights, if it holds something else that is known.

    Raises CheckpointError with the kind of folder and the remedy.
    """
    if (folder / "adapter_config.json").is_file() or any(folder.glob("adapter_model.*")):
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        what, remedy = "is a PEFT adapter, not a model", f"merge it first, with {MERGE}"
        raise CheckpointError(what, where=folder, got=base and f"of {base}", next=remedy)
    for patterns, what, remedy in _FOLDERS:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            raise CheckpointError(what, where=folder, next=remedy)
    _check_weights(folder)
    pattern = "snapshots/*/config.json" if (folder / "snapshots").is_dir() else "*/config.json"
    inside = sorted((path.parent for path in folder.glob(pattern)), key=lambda path: path.stat().st_mtime)
    if inside and not (folder / "config.json").exists():
        raise CheckpointError("contains checkpoints, but is not one", where=folder, next=f"did you mean {inside[-1]}?")


def _check_weights(folder: Path) -> None:
    """Refuse weights under names that transformers does not look for."""
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        shards = sorted(path.name for path in folder.glob(f"*-of-*{suffix}"))
        if shards:
            count = int(found[1]) if (found := re.search(r"-of-0*(\d+)", shards[0])) else 0
            what = f"shards lie here without {stem}{suffix}.index.json, which maps each tensor to its shard"
            remedy = "fetch that small file from the source of the shards"
            raise CheckpointError(what, where=folder, got=f"{len(shards)} of {count} shards", next=remedy)
        variants = sorted(path.name for path in folder.glob(f"{stem}.*{suffix}"))
        if variants:
            what, remedy = "holds only a variant of the weights", f"rename it {stem}{suffix}"
            raise CheckpointError(what, where=folder, got=variants[0], next=remedy)


def check_names(folder: Path, names: Sequence[str], family: Family, shape: Shape) -> None:
    """Refuse tensors that are wrapped or quantised, of another head, or of another number of layers than config.json.

    Raises CheckpointError, and UnsupportedModel for quantised weights and for heads of other tasks.
    """
    if heads := [name for name in names if name.startswith(_OTHER_HEADS)]:
        what = f"tensor {heads[0]} belongs to another head than that of a language model"
        raise UnsupportedModel(what, where=folder, next="convert the language model that it was trained from")
    if adapted := [name for name in names if _ADAPTER.search(name)]:
        what, remedy = (
            "the weights still hold a PEFT adapter beside its base layers",
            f"merge the adapter first, with {MERGE}",
        )
        raise CheckpointError(what, where=folder, got=adapted[0], next=remedy)
    expected = {family.tensor(site, role) for site, each in shape.sites.items() for role in each.roles()}
    strange = [name for name in names if name not in expected]
    for ends, tool in _QUANTISED_NAMES:
        if found := [name for name in strange if name.endswith(ends)]:
            what = f"the weights are quantised ({tool}); folding needs the numbers that quantising threw away"
            raise UnsupportedModel(what, where=folder, got=found[0], next=QUANTISED)
    if not expected <= set(names):
        for prefix, tool in _WRAPPERS.items():
            if found := [name for name in names if name.startswith(prefix)]:
                what, remedy = f"tensors are named as {tool} wraps them", "save the model inside, with save_pretrained"
                raise CheckpointError(what, where=folder, got=found[0], next=remedy)
        if (folder / "modules.json").is_file():
            what = "is a sentence-transformers model: it embeds texts and has no language-model head"
            raise CheckpointError(what, where=folder, next="give the language model that it was made from")
    _check_layers(folder, names, family, shape)


def _check_layers(folder: Path, names: Iterable[str], family: Family, shape: Shape) -> None:
    """Refuse weights of more or fewer layers than config.json has, if none is missing in between."""
    for kind, module in family.attention.items():
        expected = {site.layer for site in shape.sites if site.kind == kind}
        pattern = re.compile(re.escape(module).replace(r"\{layer\}", r"(\d+)") + r"\.")
        there = {int(found[1]) for name in names if (found := pattern.match(name))}
        if expected and there and there != expected and there == set(range(len(there))):
            raise CheckpointError(
                f"config.json says {len(expected)} layers, but the weights have {len(there)}",
                where=folder,
                got=f"{kind}-attention of layers 0 to {max(there)}",
                next="does config.json belong to these weights?",
            )
