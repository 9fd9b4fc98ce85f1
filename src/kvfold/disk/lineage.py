"""Lineage: the steps that made a student, the location of its root teacher, and whether both share a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.contracts.site import QUERIES, Site
from kvfold.disk.checkpoint import FORMAT, Checkpoint
from kvfold.disk.record_commit import versions
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
    flops: float | None = None,
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
    if flops is not None:
        step["flops"] = flops
    return {
        "format": FORMAT,
        "inputs": inputs,
        "hash": None,
        "root": root,
        "steps": [*before["steps"], step],
        "tokenizer": source.tokenizer_hash,
    }


def steps_since_root(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The steps from the root teacher to a student, as records keep them: stage, seconds, tokens trained and FLOPs.

    A conversion also has its resolved settings, and each step the measurements of its method (`found`).
    """
    steps = (checkpoint.lineage or {}).get("steps", ())
    return [
        {"stage": step["stage"], "seconds": step.get("wall_seconds"), "tokens": step.get("tokens")}
        | ({"flops": step["flops"]} if "flops" in step else {})
        | ({"settings": step["settings"]} if step["stage"] == "convert" and "settings" in step else {})
        | ({"found": step["found"]} if "found" in step else {})
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
    known = [str(student.root_path)] if student.root_path else []
    for place in dict.fromkeys([*known, name, *beside]):
        if not (Path(place) / "config.json").is_file() and not (place == name and re.search("[/:]", name)):
            continue
        try:
            found = Checkpoint.open(place)
        except CheckpointError:  # another folder of that name, or an unreachable hub
            continue
        if found.hash(progress) == root["hash"]:
            return found
    return None


def needed_root(student: Checkpoint, progress: Progress = SILENT, *, next: str) -> Checkpoint | None:
    """The root teacher of a student; None of a checkpoint that is none. Raises CheckpointError if it is not found."""
    found = root_teacher(student, progress)
    if found is None and student.lineage is not None and student.root_hash() != student.hash():
        raise CheckpointError(
            f"its teacher {student.lineage['root']['name']!r} is not found", where=student.path, next=next
        )
    return found


def queries_since_root(student: Checkpoint) -> dict[Site, list[int]]:
    """The root teacher's query heads in the student's order, at the sites where a step reordered them."""
    order: dict[Site, list[int]] = {}
    for step in (student.lineage or {}).get("steps", []):
        found = step.get("found") or {}
        for site, attention in student.shape.sites.items():
            moved = (found.get("sites") or {}).get(str(site), {}).get(QUERIES)
            if groups := (found.get("groups") or {}).get(str(site)):  # of key/value heads, whose readers move with them
                heads = [head for group in groups for head in group]
                readers = attention.num_attention_heads // len(heads)
                moved = [head * readers + reader for head in heads for reader in range(readers)]
            if moved:
                before = order.get(site, range(len(moved)))
                order[site] = [before[head] for head in moved]
    return order


def vocabulary_difference(student: Checkpoint, teacher: Checkpoint) -> str | None:
    """How a teacher's vocabulary or special tokens differ from its student's, or None if no difference is known.

    With another vocabulary, next-token distributions cannot be compared; with other special tokens, the two models read
    different texts. A missing tokenizer is not a difference.
    """
    ours, theirs = student.shape.vocab_size, teacher.shape.vocab_size
    if ours != theirs:
        return f"{theirs:,} tokens against {ours:,}"
    own, other = student.tokenizer, teacher.tokenizer
    if not own or not other or own == other:
        return None
    if own["words"] != other["words"]:
        return "another tokenizer"
    names = [name for name in sorted({*own, *other}) if own.get(name) != other.get(name)]
    return ", ".join(f"{name} {other.get(name)!r} against {own.get(name)!r}" for name in names)
