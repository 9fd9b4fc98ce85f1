"""Lineage: where a student comes from, where its first teacher lies now, and whether both read the same tokens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.disk.checkpoint import FORMAT, Checkpoint
from kvfold.disk.output import cache_folder, prepare_cache, read_json, write_json
from kvfold.disk.record import versions
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
    """The lineage of what a stage makes of a checkpoint; `save_model` and `convert` add the content hash."""
    before = source.lineage or {"steps": []}
    root = before.get("root")
    if root is None or root["hash"] == source.hash():
        root = {  # by the name under which it was found now, whatever it was called when it was trained
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
    """Tokens of the longest text that a model is known to read well: what it was trained on, else its positions.

    A config may promise more positions than a training by kvfold ever showed; beyond them the loss is another one.
    """
    steps = (checkpoint.lineage or {}).get("steps", ())
    seen = [step["settings"]["sequence_length"] for step in steps if step["settings"].get("sequence_length")]
    first = bool(steps) and steps[0]["stage"] == "pretrain"  # else the teacher came with a training of its own
    return min(checkpoint.shape.max_positions, max(seen)) if first and seen else checkpoint.shape.max_positions


def steps_since_root(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What was done to a student since its first teacher, as records keep it: stage, seconds, tokens trained.

    Conversions say their resolved settings too, what `auto` came to, and what they found on the way.
    """
    steps = (checkpoint.lineage or {}).get("steps", ())
    return [
        {"stage": step["stage"], "seconds": step.get("wall_seconds"), "tokens": step.get("tokens")}
        | ({key: step[key] for key in ("settings", "found") if key in step} if step["stage"] == "convert" else {})
        for step in steps
        if step["stage"] != "pretrain"
    ]


def root_teacher(student: Checkpoint, progress: Progress = SILENT) -> Checkpoint | None:
    """The first teacher of a student's lineage, known by its content; None when it is in none of the usual places.

    They are where it was when it was converted, the name that the lineage has for it, that name beside or above the
    student, and the hub.
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
        except CheckpointError:  # something else of that name, or a hub that is not reached: not the teacher
            continue
        if found.hash(progress) == root["hash"]:
            return found
    return None


def remember(source: Checkpoint) -> None:
    """Note in the cache where a checkpoint lies, by its hash: a lineage names no place, and students look for teachers.

    A cache that cannot be written is no mistake: the teacher is then told with --teacher.
    """
    with contextlib.suppress(OSError):
        path = _place_of(source.hash())
        prepare_cache(path.parent)
        write_json(path, {"path": str(source.path.resolve())})


def remembered(hashed: str) -> Path | None:
    """Where a checkpoint of this hash lay when it was last read; it may have gone or changed since."""
    known = read_json(_place_of(hashed))
    return Path(known["path"]) if isinstance(known, dict) and isinstance(known.get("path"), str) else None


def known_root(source: Checkpoint) -> Path | None:
    """Where the root teacher of a student lay when it was last read, as far as that is known without reading it."""
    root = (source.lineage or {}).get("root")
    return remembered(str(root["hash"])) if isinstance(root, dict) and "hash" in root else None


def _place_of(hashed: str) -> Path:
    return cache_folder() / "checkpoints" / f"{hashed[:32]}.json"


def vocabulary_difference(student: Checkpoint, teacher: Checkpoint) -> str | None:
    """How the tokens of a teacher differ from its student's; None when they are the same, as far as that is known.

    With other tokens, the two next-token distributions cannot be compared; with other special tokens, they read
    different texts. A missing tokenizer is no difference.
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
