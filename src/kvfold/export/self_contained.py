"""transformers without kvfold: a student of one of kvfold's architectures, with the code of the architecture beside it.

The modules that the student's class needs are written flat, one file each, as transformers requires
(`kvfold.attention.latent` becomes `kvfold_attention_latent.py`), with relative imports, and `auto_map` in config.json
names the classes. `trust_remote_code=True` then loads the student anywhere; where kvfold is installed, its own classes
are used. Families are found by the modules of their package, which a flat folder lacks, so the copy names one module.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
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
from typing_extensions import override

from kvfold.contracts.family import AUTO_MAP, without_code
from kvfold.contracts.runtimes import stock_type
from kvfold.disk.checkpoint import Checkpoint, content_hash
from kvfold.disk.output import read_json, write_json
from kvfold.errors import UnsupportedModel
from kvfold.export.agreement import Logits, Reference
from kvfold.export.engine import Engine
from kvfold.families import module_of

_OURS = re.compile(r"^(\s*from )kvfold\.(\S+)( import )", re.M)
_FAMILIES = "kvfold.families"
_HEADER = "# Written by kvfold (Apache-2.0): the code that this checkpoint needs.\n"


class SelfContained(Engine):
    """transformers without kvfold: the weights, and the code and a config.json that names it."""

    name = "transformers without kvfold"
    attention = "kvfold"  # no other computes every student
    knows_windows = True
    keeps_dtype = True

    @override
    def version(self) -> str:
        return importlib.metadata.version("transformers")

    @override
    def check(self, source: Checkpoint) -> None:
        """Raise UnsupportedModel for a model that transformers knows itself, and for files other than safetensors."""
        if source.config["model_type"] == stock_type(source.config):
            raise UnsupportedModel(
                f"{source.path}: is a {source.config['model_type']}, which transformers loads without kvfold",
                next="it needs no code: copy it",
            )
        if source.family.audio:
            raise UnsupportedModel("its check reads texts, and this model sound", where=source.path)
        other = next((path for path in source.files if path.suffix != ".safetensors"), None)
        if other is not None:
            raise UnsupportedModel(
                "the weights are not safetensors",
                where=other,
                next="convert them with kvfold convert SRC OUT --method identity",
            )

    @override
    def write(self, source: Checkpoint, model: Any, folder: Path, weights: str) -> dict[str, Any]:
        for path in source.files:
            copied = folder / path.relative_to(source.path)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        index = source.path / "model.safetensors.index.json"
        if index.exists() and not (source.path / "model.safetensors").exists():
            shutil.copyfile(index, folder / index.name)
        entry = type(model).__module__
        home = module_of(source.family.name)
        modules = _closure(entry, f"{_FAMILIES}.{home}")
        for module in modules:
            code = _OURS.sub(lambda found: f"{found[1]}.{_flat(found[2])}{found[3]}", _path(module).read_text("utf-8"))
            if module == _FAMILIES:
                code += _families_of(home)
            (folder / f"{_flat(module.removeprefix('kvfold.'))}.py").write_text(_HEADER + code, encoding="utf-8")
        whole, place = type(model).__name__, _flat(entry.removeprefix("kvfold."))
        alone = re.sub(r"For[A-Z]\w+$", "Model", whole)
        auto = "AutoModelForSeq2SeqLM" if source.family.encoder_decoder else "AutoModelForCausalLM"
        names = {"AutoConfig": type(model.config).__name__, "AutoModel": alone, auto: whole}
        auto_map = {auto: f"{place}.{name}" for auto, name in names.items()}
        write_json(folder / "config.json", {**without_code(source.config), AUTO_MAP: auto_map})
        return {"modules": len(modules)}

    @override
    def _answer(self, folder: Path, known: Reference, weights: str) -> tuple[list[Logits], list[list[int]]]:
        """Answer in a process that cannot import kvfold."""
        auto = next(name for name in read_json(folder / "config.json")[AUTO_MAP] if name.startswith("AutoModelFor"))
        with tempfile.TemporaryDirectory() as place:
            question, answered = Path(place) / "question.json", Path(place) / "answer.npz"
            asked = {"folder": str(folder.resolve()), "auto": auto, "paired": known.paired, "prompts": known.prompts}
            question.write_text(json.dumps({**asked, "texts": known.texts(), "new_tokens": len(known.answers[0])}))
            done = subprocess.run(
                [sys.executable, "-P", str(_path("kvfold.hf.without_kvfold")), str(question), str(answered)],
                env={**os.environ, "HF_MODULES_CACHE": str(Path(place) / "modules")},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
            with np.load(answered) as found:
                logits = [found[f"logits{row}"] for row in range(len(known.prompts))]
                return logits, found["answers"].tolist()

    @override
    def content(self, source: Checkpoint, folder: Path) -> str:
        """The checkpoint's content hash: the source's tensors under another config.json."""
        specs = {name: source.spec(name) for name in source.names()}
        return content_hash(read_json(folder / "config.json"), specs, source.digests)


def _closure(*entries: str) -> list[str]:
    """The modules of kvfold that these modules need, themselves included, by name."""
    found: set[str] = set()
    left = list(entries)
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


def _families_of(home: str) -> str:
    """The end of the copy of `families`. The import is inside, since families import this module."""
    table = hasattr(importlib.import_module(f"{_FAMILIES}.{home}"), "FAMILIES")
    return (
        "\n\ndef all_families() -> dict[str, Family]:  # of the file with this checkpoint's family\n"
        f"    from .{_flat(f'families.{home}')} import {'FAMILIES' if table else 'FAMILY'}\n\n"
        f"    return {{family.name: family for family in {'FAMILIES' if table else '(FAMILY,)'}}}\n"
    )
