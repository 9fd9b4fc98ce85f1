"""The figures of an inspection, and how well inspections predicted, from the records of `benchmarks/inspection.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvfold.disk.record import Record
from kvfold.report import figures
from kvfold.report.inspection import KIND, heads_figure
from kvfold.report.tables import markdown, plain
from pages.students import bare_name

RUN = "inspection"
WITHIN, TIMES = 0.3, 5.0  # the goals: of predicted losses, and of the heads named over as many at random


def inspection_figures(records: Sequence[Record]) -> Mapping[str, str]:
    """The heat maps of the first inspection, by the name of their file."""
    for each in records:
        if each.kind == KIND and each.run == RUN:
            rows = each.metrics["layers"]
            titles = {"kl": "KL without each head, nats per token", "rise": "Loss of copying without each head, nats"}
            return {
                f"inspect-{key}.svg": figures.standalone(heads_figure(key, rows, title, 2))
                for key, title in titles.items()
            }
    return {}


def inspection_tables(records: Sequence[Record]) -> Iterator[str]:
    """Predicted beside measured losses of folds, and what the heads named are worth beside others."""
    found = [each for each in records if each.kind == "benchmark"]
    if not found:
        return
    folds = [(each, row) for each in found for row in each.metrics["folds"]]
    lines = [
        [
            bare_name(each.settings["source"]),
            str(row["kv_heads"]),
            *(f"{row[key]:.3f}" for key in ("predicted", "kl", "loss_gap")),
            *(f"{row['predicted'] / row[key] - 1:+.0%}" for key in ("kl", "loss_gap")),
        ]
        for each, row in folds
    ]
    columns = ["model", "heads of each layer", "predicted", "measured KL", "measured rise of the loss"]
    yield markdown(([*columns, "error, KL", "error, rise"], lines))
    for key, words in (("kl", "KL"), ("loss_gap", "rise of the loss")):
        held = sum(abs(row["predicted"] / row[key] - 1) <= WITHIN for _, row in folds)
        yield f"Within {WITHIN:.0%} of the measured {words}: {held} of {len(folds)} folds."
    lines = []
    for each in found:
        recall = each.metrics["recall"]
        named = ", ".join(f"{layer}.{head}" for layer, head in recall["named"])
        times = f"{recall['lost'] / recall['lost_at_random']:.1f}" if recall["lost_at_random"] > 0 else "–"
        numbers = [f"{recall[key]:.2f}" for key in ("gain", "lost", "lost_at_random")]
        lines.append([bare_name(each.settings["source"]), named, *numbers, times])
    columns = [
        "model",
        "the five heads named",
        "copy gain",
        "lost without them",
        "lost without five at random",
        "times",
    ]
    yield markdown((columns, lines), words=2)
    texts = "; ".join(f"{bare_name(each.settings['source'])} on `{each.settings['data']}`" for each in found)
    yield f"Layer.head; gains in nats. {texts}. Measured on {plain(found[0].device)}{_note(found[0])}."


def _note(record: Record) -> str:
    return f" ({record.settings['note']})" if record.settings.get("note") else ""
