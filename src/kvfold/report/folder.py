"""The folder of a run: its records, checkpoints with lineages, training logs, and recipe."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfold.disk.manifest import read_lineage
from kvfold.disk.output import MANIFEST, REPLACED, tidy
from kvfold.disk.record import Record, read_all, warn
from kvfold.errors import DataError, KvfoldError, plain
from kvfold.inputs import LARGE, parse_json, read_bytes, read_text
from kvfold.progress import SILENT, Progress
from kvfold.report.reading import log_line, record_fault
from kvfold.report.rows import Study
from kvfold.report.studies import studies

LOG = "train.jsonl"
RECIPE = "recipe.yaml"
HASHES = ("text", "teacher")  # settings of a step that are content hashes


@dataclass(frozen=True)
class Folded:
    """A checkpoint of the run: its path, its name below the run's folder, its lineage."""

    path: Path
    name: str
    lineage: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    folder: Path
    records: tuple[Record, ...]
    checkpoints: tuple[Folded, ...]
    logs: Mapping[str, tuple[Mapping[str, Any], ...]]  # name of the checkpoint -> lines of its train.jsonl
    recipe: str | None  # the recipe's text, where the run keeps it

    @property
    def studies(self) -> list[Study]:
        """The records grouped into studies, in which they may be compared with one another."""
        return studies(
            self.records, {checkpoint.lineage["hash"]: checkpoint.lineage for checkpoint in self.checkpoints}
        )


def collect(run_dir: str | Path, progress: Progress = SILENT) -> Run:
    """Read the folder of a run. One line names what cannot be read; it is left out.

    Raises DataError if there is nothing to report.
    """
    folder = Path(run_dir)
    tidy(folder)
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "no such directory"
        raise DataError(what, where=folder, next="give the folder of a run")
    for replaced in folder.rglob(f"*.partial/{REPLACED}"):
        tidy(replaced.parent.with_suffix(""))  # restores an output whose replacement was killed
    checkpoints, logs, odd = [], {}, []
    for path in sorted(folder.rglob(MANIFEST)):
        if REPLACED not in path.parts:
            tidy(path.parent)
        if any(part.endswith((".partial", REPLACED)) for part in path.relative_to(folder).parts):
            continue
        try:
            lineage = read_lineage(path.parent)
        except KvfoldError as error:
            odd.append(f"{error}: it is not shown")
            continue
        name = str(path.parent.relative_to(folder))
        checkpoints.append(Folded(path.parent, folder.resolve().name if name == "." else name, lineage or {}))
        if (path.parent / LOG).exists():
            logs[checkpoints[-1].name] = tuple(_log(path.parent / LOG, odd))
    records = []
    for record in read_all(folder, progress):
        if record.status == "failed":
            records.append(replace(record, metrics={}))  # only its error is shown
            continue
        fault = record_fault(record)
        if fault is None:
            records.append(record)
        else:
            odd.append(f"the record {record.name} is not shown: {fault}")
    warn(odd, progress)
    if not records and not checkpoints:
        raise DataError(
            "nothing to report: no record and no checkpoint of kvfold is here",
            where=folder,
            next="run a recipe first, or point evaluate and bench here with --records",
        )
    return Run(folder, tuple(records), tuple(checkpoints), logs, _recipe(folder / RECIPE, progress))


def _recipe(path: Path, progress: Progress) -> str | None:
    """The text of the run's recipe; None if there is none that can be read."""
    if not path.exists():
        return None
    try:
        return read_text(path)
    except KvfoldError as error:
        warn([f"{error}: it is not shown"], progress)
        return None


def _log(path: Path, odd: list[str]) -> Iterator[Mapping[str, Any]]:
    """The lines of a training log that have a loss; a log that cannot be read adds a line to `odd`."""
    try:
        octets = read_bytes(path, limit=LARGE)
    except KvfoldError as error:
        odd.append(f"{error}: it is not shown")
        return
    for text in octets.splitlines():
        try:
            line = log_line(parse_json(text, where=path))
        except KvfoldError:  # the last line of a run that was killed while it wrote
            continue
        if line is not None:
            yield line


def commands(checkpoint: Folded, by_hash: Mapping[str, str]) -> str:
    """The commands that made a checkpoint from its root, one per line; `by_hash` names the checkpoints of the run."""
    root, steps = checkpoint.lineage["root"], checkpoint.lineage["steps"]
    lines = []
    for number, step in enumerate(steps):
        source = root["name"] if step["source"] == root["hash"] else by_hash.get(step["source"], f"step-{number}")
        following = steps[number + 1]["source"] if number + 1 < len(steps) else checkpoint.lineage["hash"]
        made = by_hash.get(following, f"step-{number + 1}")
        words = ["kvfold", step["stage"], *([source] if source else []), made, *_flags(step["settings"])]
        lines.append(shlex.join(plain(word, 4000) for word in words))
    return "\n".join(lines)


COSTS = {"kl": "KL", "rise": "rise of the loss of copying"}  # of a mix of heads


def _costs(mix: Mapping[str, Any]) -> str:
    return " and ".join(f"{words} {mix[name]:.4f}" for name, words in COSTS.items() if name in mix)


def findings(lineage: Mapping[str, Any]) -> list[str]:
    """What the conversions of a lineage found, in sentences: how a budget was spent, which heads merge without loss."""
    lines = []
    for found in (step.get("found") or {} for step in lineage["steps"]):
        if "mix" in found:
            mix, same = found["mix"], found["uniform"]
            lines.append(
                f"Key/value heads by layer, within {found['budget']:.1%} of the root teacher's cache: "
                f"{mix['kv_heads']}, of predicted {_costs(mix)} nats before any repair; "
                f"{same['kv_heads']} in every layer: {_costs(same)}."
            )
        if "chosen" in found:
            chosen, alike = found["chosen"], found["alike"]
            lines.append(
                f"The layer that each layer reads, within {found['budget']:.1%} of the root teacher's cache: "
                f"{chosen['layout']}, of predicted KL {chosen['kl']:.4f} nats before any repair; "
                f"groups as alike as can be, {alike['layout']}: {alike['kl']:.4f}."
            )
        merged = {name: site for name, site in (found.get("sites") or {}).items() if site.get("lossless")}
        if merged:
            each = (f"{name} ({len(site['lossless'])} of {len(site['lost'])} groups)" for name, site in merged.items())
            lines.append(f"Heads that were linear images of one another, merged without loss: {', '.join(each)}.")
        latent = {name: site for name, site in (found.get("sites") or {}).items() if "planes" in site}
        if latent:
            kept = (f"{name} {len(site['planes'][0])} planes and {site['lost']:.1%}" for name, site in latent.items())
            lines.append(
                f"Rotated planes of each key head, and what the latent loses in its metric: {', '.join(kept)}."
            )
    return lines


def _flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Resolved settings as flags, without content hashes."""
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if key in HASHES:
            continue
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif isinstance(value, list | tuple):
            yield from (flag, ",".join(map(str, value))) if value else ()
        elif value is not None:
            yield from (flag, str(value))
