"""transformers without kvfold: a student of an architecture of ours, with the code of that architecture beside it.

The modules that the student's class stands on are written flat, one file each, as transformers wants them
(`kvfold.attention.latent` becomes `kvfold_attention_latent.py`), their imports of one another made relative, and
`auto_map` in config.json names the classes. `trust_remote_code=True` then loads the student anywhere; where kvfold is
installed its own classes come first. Families look themselves up by the modules of their package, which a flat folder
has not, so the copy is told the one family that the student is of.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kvfold.contracts.runtimes import stock_type
from kvfold.disk.checkpoint import Checkpoint, content_hash
from kvfold.disk.output import read_json, write_json
from kvfold.disk.sidecar import AUTO_MAP, without_code
from kvfold.errors import SettingError, UnsupportedModel
from kvfold.export.agreement import Logits, Reference

NAME = "transformers without kvfold"
ATTENTION = "kvfold"  # that transformers is asked with: no other computes every student
TOLD_OF_WINDOWS = True
_OURS = re.compile(r"^(\s*from )kvfold\.(\S+)( import )", re.M)
_FAMILIES = "kvfold.families"
_HEADER = "# Written by kvfold (Apache-2.0): the code that this checkpoint needs.\n"


def available() -> None:
    """Do nothing: transformers is there."""


def content(source: Checkpoint, folder: Path) -> str:
    """The checkpoint's content hash: the source's tensors under another config.json."""
    specs = {name: source.spec(name) for name in source.names()}
    return content_hash(read_json(folder / "config.json"), specs, source.digests)


def version() -> str:
    """The version of transformers."""
    from importlib.metadata import version as installed

    return installed("transformers")


def check(source: Checkpoint) -> None:
    """Raise UnsupportedModel for a model that transformers knows by itself."""
    if source.config["model_type"] == stock_type(source.config):
        raise UnsupportedModel(
            f"{source.path}: is a {source.config['model_type']}, which transformers knows by itself",
            next="it needs no code: copy it",
        )


def write(source: Checkpoint, model: Any, folder: Path, weights: str) -> dict[str, Any]:
    """Copy the weights, and write the code and a config.json that names it.

    Raises SettingError for another precision than the source's.
    """
    stored = source.spec(source.family.tensor(next(iter(source.shape.sites)), "q")).dtype
    if weights != stored:
        raise SettingError(f"the weights stay {stored}", where="dtype", got=weights, next="leave it out")
    for path in source.files():
        if path.suffix != ".safetensors":
            raise UnsupportedModel(
                "the weights are not safetensors",
                where=path,
                next="kvfold convert SRC OUT --method identity makes them so",
            )
        copied = folder / path.relative_to(source.path)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    index = source.path / "model.safetensors.index.json"
    if index.exists() and not (source.path / "model.safetensors").exists():
        shutil.copyfile(index, folder / index.name)
    entry = type(model).__module__
    modules = _closure(entry, {f"{_FAMILIES}.{source.family.name}"})
    for module in modules:
        code = _OURS.sub(lambda found: f"{found[1]}.{_flat(found[2])}{found[3]}", _path(module).read_text("utf-8"))
        if module == _FAMILIES:
            code += _one_family(source.family.name)
        (folder / f"{_flat(module.removeprefix('kvfold.'))}.py").write_text(_HEADER + code, encoding="utf-8")
    whole, place = type(model).__name__, _flat(entry.removeprefix("kvfold."))
    alone = re.sub(r"For[A-Z]\w+$", "Model", whole)
    names = {"AutoConfig": type(model.config).__name__, "AutoModel": alone, _auto(source): whole}
    auto_map = {auto: f"{place}.{name}" for auto, name in names.items()}
    write_json(folder / "config.json", {**without_code(source.config), AUTO_MAP: auto_map})
    return {"modules": len(modules)}


def _auto(source: Checkpoint) -> str:
    return "AutoModelForSeq2SeqLM" if source.family.encoder_decoder else "AutoModelForCausalLM"


def _closure(entry: str, others: set[str]) -> list[str]:
    """The modules of kvfold that one imports, itself among them, and those that these import, by name."""
    found: set[str] = set()
    left = [entry, *sorted(others)]
    while left:
        module = left.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_path(module).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvfold."):
                left.append(str(node.module))
    return sorted(found)


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _flat(module: str) -> str:
    """`attention.latent` -> `kvfold_attention_latent`."""
    return f"kvfold_{module.replace('.', '_')}"


def _one_family(name: str) -> str:
    """What stands at the end of the copy of `families`: imported when it is asked for, since families import this."""
    return (
        "\n\ndef all_families() -> dict[str, Family]:  # the one that this checkpoint is of\n"
        f"    from .{_flat(f'families.{name}')} import FAMILY\n\n"
        "    return {FAMILY.name: FAMILY}\n"
    )


def answer(folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
    """Load the checkpoint in a process without kvfold: logits by text, and greedy answers.

    Raises UnsupportedModel when that process fails.
    """
    auto = next(name for name in read_json(folder / "config.json")[AUTO_MAP] if name.startswith("AutoModelFor"))
    with tempfile.TemporaryDirectory() as place:
        question, answered = Path(place) / "question.json", Path(place) / "answer.npz"
        asked = {"folder": str(folder.resolve()), "auto": auto, "paired": known.paired, "prompts": known.prompts}
        question.write_text(json.dumps({**asked, "texts": known.texts(), "new_tokens": len(known.answers[0])}))
        script = _path("kvfold.hf.without_kvfold")
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(question), str(answered)],
            env={**os.environ, "HF_MODULES_CACHE": str(Path(place) / "modules")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UnsupportedModel(f"{NAME} cannot run the model: {last[:200]}", next="nothing was exported")
        with np.load(answered) as said:
            logits = [said[f"logits{row}"] for row in range(len(known.prompts))]
            return logits, said["answers"].tolist()
