"""Model cards: where a student comes from, what was measured, and how to load it.

Every trained checkpoint of a run gets a card: as README.md, or as MODEL_CARD.md if kvfold did not write its README.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from kvfold.disk.manifest import read_lineage
from kvfold.disk.output import read_json, replacing, written_by_kvfold
from kvfold.disk.record import Record
from kvfold.errors import CheckpointError, plain
from kvfold.evaluate.gate import missed_line
from kvfold.report import kept, tables
from kvfold.report.folder import Folded, Run, commands, findings
from kvfold.report.outcome import default_gate
from kvfold.report.rows import Row, Study
from kvfold.report.studies import studies

_PLACE = re.compile(r"(?<![\w./-])/(?:[^\s/'`|;,]+/)+(?=[^\s/'`|;,])")  # folders of this machine
OWN = "kvfold_"  # prefix of the model types that only kvfold's classes load
MARK = "<!-- Written by kvfold; `kvfold report` writes it anew. -->"


def templates(kind: Literal["html", "text"]) -> jinja2.Environment:
    """The templates of the package; those of HTML escape every value."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("kvfold"),
        autoescape=kind == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_cards(run: Run) -> list[Path]:
    """Write the card of every trained checkpoint of a run, and return their paths."""
    written = []
    names = {checkpoint.lineage["hash"]: checkpoint.name for checkpoint in run.checkpoints}
    for checkpoint in run.checkpoints:
        if any(step["stage"] == "uptrain" for step in checkpoint.lineage["steps"]):
            path = card_path(checkpoint.path)
            if path is None:
                continue
            with replacing(path) as sibling:
                sibling.write_text(card(checkpoint.path, run.records, names=names), encoding="utf-8")
            written.append(path)
    return written


def card_path(folder: Path) -> Path | None:
    """README.md of a checkpoint, else MODEL_CARD.md; None if kvfold wrote neither."""
    places = (folder / "README.md", folder / "MODEL_CARD.md")
    return next((path for path in places if not os.path.lexists(path) or written_by_kvfold(path)), None)


def card(checkpoint_dir: str | Path, records: Sequence[Record], *, names: Mapping[str, str] | None = None) -> str:
    """The model card of a checkpoint, with its numbers from `records`.

    `names` are folders by content hash, for the commands. Raises CheckpointError without a lineage.
    """
    folder = Path(checkpoint_dir)
    lineage, config = read_lineage(folder), read_json(folder / "config.json")
    config = {"model_type": "unknown", **(config if isinstance(config, dict) else {})}
    if lineage is None or not lineage["steps"]:
        raise CheckpointError("has no lineage, so a card would be empty", where=folder, next="fold it with kvfold")
    found = studies(records, {lineage["hash"]: lineage})
    measured = [
        (study, replace(row, records=own))  # only the seed of this checkpoint
        for study in found
        for row in study.rows
        if (own := tuple(each for each in row.records if each.hashes.get("student") == lineage["hash"]))
    ]
    text = (
        templates("text")
        .get_template("card.md.j2")
        .render(
            mark=MARK,
            front=_front(lineage, config),
            name=tables.plain(folder.resolve().name),
            lineage={**lineage, "root": {**lineage["root"], "name": _quoted(lineage["root"]["name"])}},
            config=config,
            steps=[(step["stage"], _step(step["settings"]), step.get("tokens")) for step in lineage["steps"]],
            numbers=[tables.markdown(_numbers(study, row), words=1) for study, row in measured],
            evaluated=[
                {
                    "tokens": row.records[0].settings.get("tokens"),
                    "data": _quoted(row.records[0].settings.get("data", "the text")),
                    "missed": missed_line([] if row.records[0].settings.get("gate") else default_gate(study, row)),
                }
                for study, row in measured
            ],
            findings=[_inert(line) for line in findings(lineage)],
            commands=commands(Folded(folder, folder.resolve().name, lineage), names or {}),
            own_classes=str(config.get("model_type")).startswith(OWN),
        )
    )
    return _PLACE.sub("", text)


def _front(lineage: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """YAML front matter, by the hub's rules. It names no licence: that is the teacher's, on the teacher's card."""
    root, methods = lineage["root"], [step["settings"].get("method") for step in lineage["steps"]]
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if str(root["name"]).count("/") == 1 and not str(root["name"]).startswith((".", "/")):
        front |= {"base_model": root["name"], "base_model_relation": "finetune"}
    front["tags"] = ["kvfold", "kv-cache", *dict.fromkeys(str(name) for name in methods if name)]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()


def _step(settings: Mapping[str, Any]) -> str:
    return _inert(
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value not in (None, (), []))
    )


def _inert(text: str) -> str:
    """Text in one line without HTML."""
    return plain(text, 10_000).replace("<", "&lt;")


def _quoted(name: object) -> str:
    """A name without backticks, to stand between some."""
    return plain(name, 400).replace("`", "'")


def _numbers(study: Study, row: Row) -> tables.Table:
    """Student and teacher side by side."""
    teacher = study.teacher

    def both(name: str, digits: int) -> list[str]:
        return [tables.cell(side.metric(name) if side else None, digits) for side in (row, teacher)]

    sizes = [tables.NONE if n is None else f"{n:,.0f}" for n in (row.cache_bytes, row.teacher_cache_bytes)]
    lines = [
        ["cache bytes per token", *sizes],
        ["loss, nats per token", *both("loss", 4)],
        ["loss before training", tables.cell(row.loss_before) if row.trained else tables.NONE, ""],
        ["perplexity", *both("perplexity", 3)],
        ["KL to the teacher, nats", tables.cell(row.metric("kl")), ""],
        ["top-1 agreement with the teacher", tables.percent(row.metric("agreement")), ""],
    ]
    for distance, value in row.keyed("copy_loss").items():
        other = teacher.keyed("copy_loss").get(distance) if teacher else None
        lines.append([f"copy loss over {int(distance):,} tokens", tables.cell(value, 3), tables.cell(other, 3)])
    accuracies: dict[str, Callable[[Row], kept.Score | None]] = {"last words": kept.last_word}
    accuracies |= {kept.title(task): partial(kept.accuracy, task=task) for task in kept.tasks_of([row])}
    for name, of in accuracies.items():
        own, theirs = (kept.percent(of(side) if side else None) for side in (row, teacher))
        lines.append([f"accuracy on {name}", own, theirs])
    lines += [[f"decode speed at {c:,} × {b}", f"{speed:.2f}×", "1×"] for (c, b), speed in sorted(row.speedups.items())]
    return ["", "this model", "teacher"], [line for line in lines if line[1] != tables.NONE]
