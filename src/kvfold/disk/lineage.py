"""Lineage: the steps that made a student, the location of its root teacher, and whether both share a vocabulary."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.disk.checkpoint import FORMAT, Checkpoint
from kvfold.disk.output import cache_folder, prepare_cache, read_object, write_json
from kvfold.disk.record_commit import versions
from kvfold.disk.sidecar import tokenizer_identity
from kvfold.errors import CheckpointError
from kvfold.progress import SILENT, Progress


def descend(
    source: Checkpoint,
    *,
    inputs: str,
    stage: str,
    settings: Mapping[str, Any],
    calibration: str | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    wall_seconds: float | None = None,
) -> dict[str, Any]:
    """The lineage of a stage's output, made from `source`; `save_model` and `convert` add the content hash."""
    before = source.lineage or {"steps": []}
    root = before.get("root")
    if root is None or root["hash"] == source.hash():
        root = {  # under its present name, which may differ from the one it was trained under
            "hash": source.hash(),
            "name": source.name,
            "config": source.config,
            "parameters": source.shape.parameters,
        }
    step = {
        "stage": stage,
        "settings": dict(settings),
        "source": source.hash(),
        "calibration": calibration,
        "tokens": tokens,
        "seed": seed,
        "versions": versions(),
        "wall_seconds": wall_seconds,
    }
    return {
        "format": FORMAT,
        "inputs": inputs,
        "hash": None,
        "root": root,
        "steps": [*before["steps"], step],
        "tokenizer": source.tokenizer_hash(),
    }


def known_length(checkpoint: Checkpoint) -> int:
    """The longest text in tokens that a model reads well: the length it was trained on, else its maximum positions.

    The config may allow more positions than kvfold's pretraining used; beyond those the loss rises.
    """
    steps = (checkpoint.lineage or {}).get("steps", ())
    seen = [step["settings"]["sequence_length"] for step in steps if step["settings"].get("sequence_length")]
    first = bool(steps) and steps[0]["stage"] == "pretrain"  # else the teacher was trained elsewhere
    return min(checkpoint.shape.max_positions, max(seen)) if first and seen else checkpoint.shape.max_positions


def steps_since_root(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps from the root teacher to a student, as records keep them: stage, seconds, tokens trained.

    A conversion also has its resolved settings and its measurements (`found`).
    """
    steps = (checkpoint.lineage or {}).get("steps", ())
    return [
        {"stage": step["stage"], "seconds": step.get("wall_seconds"), "tokens": step.get("tokens")}
        | ({key: step[key] for key in ("settings", "found") if key in step} if step["stage"] == "convert" else {})
        for step in steps
        if step["stage"] != "pretrain"
    ]


def root_teacher(student: Checkpoint, progress: Progress = SILENT) -> Checkpoint | None:
    """The root teacher of a student, recognised by its content hash, or None if it is in none of the usual places.

    Those are its path at conversion, its name in the lineage (a path or a hub id), and that name beside or above the
    student.
    """
    if student.lineage is None or student.root_hash() == student.hash(progress):
        return None
    root = student.lineage["root"]
    name = str(root["name"])
    beside = [str(folder / Path(name).name) for folder in student.path.resolve().parents[:3]]
    known = remembered(root["hash"])
    for place in dict.fromkeys([*([str(known)] if known else []), name, *beside]):
        if not (Path(place) / "config.json").is_file() and not (place == name and re.search("[/:]", name)):
            continue
        try:
            found = Checkpoint.open(place)
        except CheckpointError:  # another folder of that name, or an unreachable hub
            continue
        if found.hash(progress) == root["hash"]:
            return found
    return None


def remember(source: Checkpoint) -> None:
    """Store the path of a checkpoint in the cache, by its hash: a lineage holds no path to its root teacher.

    A cache that cannot be written is not an error: the user can pass --teacher.
    """
    with contextlib.suppress(OSError):
        path = _place_of(source.hash())
        prepare_cache(path.parent)
        write_json(path, {"path": str(source.path.resolve())})


def remembered(hashed: str) -> Path | None:
    """The path at which a checkpoint of this hash was last read; it may have been deleted or changed since."""
    path = read_object(_place_of(hashed)).get("path")
    return Path(path) if isinstance(path, str) else None


def known_root(source: Checkpoint) -> Path | None:
    """The path at which the root teacher of a student was last read, if the cache has it."""
    return remembered(source.lineage["root"]["hash"]) if source.lineage else None


def _place_of(hashed: str) -> Path:
    return cache_folder() / "checkpoints" / f"{hashed[:32]}.json"


def vocabulary_difference(student: Checkpoint, teacher: Checkpoint) -> str | None:
    """How a teacher's vocabulary or special tokens differ from its student's, or None if no difference is known.

    With another vocabulary, next-token distributions cannot be compared; with other special tokens, the two models read
    different texts. A missing tokenizer is not a difference.
    """
    ours, theirs = student.shape.vocab_size, teacher.shape.vocab_size
    if ours != theirs:
        return f"{theirs:,} tokens against {ours:,}"
    own, other = tokenizer_identity(student.path), tokenizer_identity(teacher.path)
    if not own or not other or own == other:
        return None
    if own["words"] != other["words"]:
        return "another tokenizer"
    names = [name for name in sorted({*own, *other}) if own.get(name) != other.get(name)]
    return ", ".join(f"{name} {other.get(name)!r} against {own.get(name)!r}" for name in names)
