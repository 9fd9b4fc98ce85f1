"""The section on budgets of bytes: different heads per layer against the same number in every layer, without training.

Each run whose name begins with `budget` gets a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvfold.disk.record import Record
from kvfold.report.rows import spread
from kvfold.report.studies import row_of
from kvfold.report.tables import markdown
from pages.miniature import compare, say
from pages.students import bare_name

BUDGET = "budget"


@dataclass(frozen=True)
class _Folded:
    """A student by the heads of its layers."""

    record: Record
    heads: str  # `2`, or `4/1/1/2/2`
    chosen: bool  # by measured sensitivity
    seconds: float

    @property
    def mean_heads(self) -> float:
        """Heads of a layer, on average: what its bytes are proportional to."""
        numbers = [int(number) for number in self.heads.split("/")]
        return sum(numbers) / len(numbers)

    @property
    def loss(self) -> float:
        return float(self.record.metrics["loss"])


def budgets(records: Sequence[Record]) -> Iterator[str]:
    """A table for every run, the most bytes first, and whether choosing by layer is better."""
    for run in sorted({each.name.partition("/")[0] for each in records if each.name.startswith(BUDGET)}):
        found = sorted(
            (each for record in records if record.name.startswith(f"{run}/") for each in _folded(record)),
            key=lambda each: (-each.mean_heads, each.chosen),
        )
        if not found:
            continue
        teacher, first = float(found[0].record.metrics["teacher_loss"]), found[0].record.settings
        whole = int(found[0].record.metrics["cache"]["teacher"]["kv_heads"])
        yield f"## Different heads per layer: `{bare_name(first['teacher'])}`"
        yield (
            f"The same bytes in every layer, or more where the measured KL is largest (`--kv-heads auto --budget`). "
            f"Both are repaired and not trained. `{bare_name(first['data'])}`, {first['tokens']:,} tokens; the "
            f"teacher's loss is {teacher:.4f}. Seconds are for the conversion, including its measurements."
        )
        lines = [
            [
                each.heads + (" (auto)" if each.chosen else ""),
                f"{each.mean_heads / whole:.1%}",
                f"{each.loss:.4f}",
                f"{each.loss - teacher:.4f}",
                f"{each.seconds:.0f}",
            ]
            for each in found
        ]
        yield markdown((["heads", "bytes of the teacher's", "loss", "above the teacher's", "seconds"], lines))
        yield say("heads of each layer's own are better than the same bytes spent evenly", _answers(found))


def heads_by_layer(records: Sequence[Record]) -> Iterator[str]:
    """The key/value heads of each layer that training chose within each budget, drawn, of the first seed."""
    found: dict[tuple[float, str], list[list[list[int]]]] = {}
    for record in (each for each in records if each.kind == "evaluate" and "budget" in row_of(each, {})):
        chosen = (record.metrics.get("made_by") or [{}])[-1].get("found", {})
        kinds = {", keys": "groups", ", values": "value_groups"} if "value_groups" in chosen else {"": "groups"}
        for kind, name in kinds.items():
            if name in chosen:
                found.setdefault((float(row_of(record, {})["budget"]), kind), list(chosen[name].values()))
    if found:
        columns = sorted(found.items())
        lines = [
            [str(layer), *(_drawn(len(groups[layer]), sum(map(len, groups[layer]))) for _, groups in columns)]
            for layer in range(len(columns[0][1]))
        ]
        yield markdown((["layer", *(f"{budget:.0%} of the bytes{kind}" for (budget, kind), _ in columns)], lines))


def _drawn(heads: int, whole: int) -> str:
    return "█" * heads + "░" * (whole - heads)


def _folded(record: Record) -> Iterator[_Folded]:
    row = row_of(record, {}) if record.kind == "evaluate" and record.status != "failed" else {}
    steps = record.metrics.get("made_by", ())
    if row.get("role") == "student" and steps and steps[-1]["stage"] == "convert":
        yield _Folded(record, str(steps[-1]["settings"]["kv_heads"]), "budget" in row, float(steps[-1]["seconds"]))


def _answers(found: Sequence[_Folded]) -> dict[str, str]:
    """For each number of heads in every layer: whether a choice by layer of no more bytes is better."""
    answers = {}
    for even in (each for each in found if not each.chosen):
        twins = [each.loss for each in found if each.chosen and 0 <= even.mean_heads - each.mean_heads < 0.5]
        ours, theirs = spread(twins), spread([even.loss])
        if ours and theirs:
            answers[f"{even.heads} heads"] = compare(ours, theirs)
    return answers
