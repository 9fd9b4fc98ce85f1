"""What a folder holds that is no checkpoint of transformers, and what to do about it.

A folder without config.json or weights, and weights whose names are not those of the architecture, are rarely a
download that failed: they are adapters, quantised weights, the files of another engine. Each is said by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvfold.contracts.family import Family
from kvfold.contracts.site import Shape
from kvfold.disk.output import read_json
from kvfold.errors import CheckpointError, UnsupportedModel

QUANTISED = "convert the unquantised checkpoint, and quantise the student"
MERGE = "peft: PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(OUT), then convert OUT"

# what lies in a folder (a glob) -> what it is, and what to do
_FOLDERS = (
    ("model_index.json", "is a diffusers pipeline, not a language model", "give the folder of a language model"),
    ("*.gguf", "holds GGUF weights, llama.cpp's own", "convert the transformers checkpoint that they were made from"),
    (
        "consolidated*.*",
        "holds weights in the original format of Meta or Mistral (consolidated.*)",
        "take the transformers version of the model, or write it with transformers' convert_*_weights_to_hf.py",
    ),
    ("zero_to_fp32.py", "is a DeepSpeed checkpoint", "run its zero_to_fp32.py, which writes pytorch_model.bin"),
    ("*.distcp", "is a sharded checkpoint of torch.distributed", "merge it: accelerate merge-weights DIR OUT"),
    ("*.onnx", "holds an ONNX export, not weights that can be folded", "give the checkpoint that it was made from"),
    (
        "onnx/*.onnx",
        "holds an ONNX export, not weights that can be folded",
        "give the checkpoint that it was made from",
    ),
    (
        "tf_model*",
        "holds weights of TensorFlow alone",
        "load them with from_tf=True in transformers 4, and save them with save_pretrained",
    ),
    (
        "flax_model*",
        "holds weights of Flax alone",
        "load them with from_flax=True in transformers 4, and save them with save_pretrained",
    ),
    ("*.npz", "holds weights of MLX or numpy alone", "give the transformers checkpoint that they were made from"),
)

_QUANTISED_NAMES = (  # ends of tensor names -> who writes them
    ((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ((".SCB", ".absmax", ".quant_map", ".weight_format"), "bitsandbytes"),
    ((".weight_scale", ".weight_packed", ".weight_scale_inv", ".input_scale", ".weight_zero_point"), "scaled weights"),
    ((".scales", ".biases", "_blocks", "_scales"), "MLX, or blocks with scales"),
)
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP"}


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a checkpoint, for one in which config or weights are missing.

    Raises CheckpointError that says what it is and what to do.
    """
    if (folder / "adapter_config.json").is_file() or any(folder.glob("adapter_model.*")):
        adapter = read_json(folder / "adapter_config.json")
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        raise CheckpointError(
            "is a PEFT adapter, not a model",
            where=folder,
            got=base and f"of {base}",
            next=f"merge it first, with {MERGE}",
        )
    for pattern, what, remedy in _FOLDERS:
        if any(folder.glob(pattern)):
            raise CheckpointError(what, where=folder, next=remedy)
    _check_weights(folder)
    if (folder / "snapshots").is_dir():
        inside = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    else:
        inside = sorted((path.parent for path in folder.glob("*/config.json")), key=lambda path: path.stat().st_mtime)
    if inside and not (folder / "config.json").exists():
        raise CheckpointError("holds checkpoints, and is none itself", where=folder, next=f"did you mean {inside[-1]}?")


def _check_weights(folder: Path) -> None:
    """Refuse weights under names that transformers does not look for."""
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        shards = sorted(path.name for path in folder.glob(f"*-of-*{suffix}"))
        if shards:
            whole = int(found[1]) if (found := re.search(r"-of-0*(\d+)", shards[0])) else 0
            raise CheckpointError(
                f"shards lie here without {stem}{suffix}.index.json, which says where each tensor lies",
                where=folder,
                got=f"{len(shards)} of {whole} shards",
                next="fetch that small file too, from where the shards are from",
            )
        variants = sorted(path.name for path in folder.glob(f"{stem}.*{suffix}"))
        if variants:
            raise CheckpointError(
                "holds a variant of the weights alone", where=folder, got=variants[0], next=f"rename it {stem}{suffix}"
            )


def check_names(folder: Path, names: Sequence[str], family: Family, shape: Shape) -> None:
    """Refuse tensors that are wrapped or quantised, or of another number of layers than config.json says.

    Raises CheckpointError, UnsupportedModel for quantised weights.
    """
    wrapped = [name for name in names if ".base_layer." in name or ".lora_" in name or name.startswith("base_model.")]
    if wrapped:
        raise CheckpointError(
            "the weights still hold a PEFT adapter beside its base layers",
            where=folder,
            got=wrapped[0],
            next=f"merge the adapter first, with {MERGE}",
        )
    expected = {family.tensor(site, role) for site, each in shape.sites.items() for role in each.roles()}
    strange = [name for name in names if name not in expected]
    for ends, kind in _QUANTISED_NAMES:
        if found := [name for name in strange if name.endswith(ends)]:
            raise UnsupportedModel(
                f"the weights are quantised ({kind}); folding needs the numbers that quantising threw away",
                where=folder,
                got=found[0],
                next=QUANTISED,
            )
    missing = not expected <= set(names)
    for prefix, who in _WRAPPERS.items():
        if missing and any(name.startswith(prefix) for name in names):
            raise CheckpointError(
                f"tensors are named as {who} wraps them",
                where=folder,
                got=next(name for name in names if name.startswith(prefix)),
                next="save the state_dict of the model inside, with save_pretrained",
            )
    if missing and (folder / "modules.json").is_file():
        raise CheckpointError(
            "is a sentence-transformers model: it embeds texts, and has no language model around its layers",
            where=folder,
            next="give the language model that it was made from",
        )
    _check_layers(folder, names, family, shape)


def _check_layers(folder: Path, names: Iterable[str], family: Family, shape: Shape) -> None:
    """Refuse weights of more or fewer layers than config.json says, where none is missing in between."""
    for kind, module in family.attention.items():
        said = {site.layer for site in shape.sites if site.kind == kind}
        pattern = re.compile(re.escape(module).replace(r"\{layer\}", r"(\d+)") + r"\.")
        there = {int(found[1]) for name in names if (found := pattern.match(name))}
        if said and there and there != said and there == set(range(len(there))):
            raise CheckpointError(
                f"config.json says {len(said)} layers, and the weights have {len(there)}",
                where=folder,
                got=f"{kind}-attention of layers 0 to {max(there)}",
                next="is config.json that of these weights? Take both from one place",
            )
