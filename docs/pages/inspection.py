"""The figures of an inspection, and how well inspections predicted, from the records of `benchmarks/inspection.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvfold.disk.record import Record
from kvfold.inspection.suggestion import COPIES
from kvfold.report import figures
from kvfold.report.inspection import KIND, heads_figure
from kvfold.report.tables import markdown, plain

RUN = "inspection"
WITHIN = 0.3  # the goal of predicted losses


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
    folds = [(_model(each), row) for each in found for row in each.metrics["folds"]]
    lines = [
        [
            model,
            str(row["kv_heads"]),
            *(f"{row[key]:.3f}" for key in ("predicted", "kl", "loss_gap")),
            *(f"{row['predicted'] / row[key] - 1:+.0%}" for key in ("kl", "loss_gap")),
        ]
        for model, row in folds
    ]
    columns = ["model", "heads of each layer", "predicted", "measured KL", "measured rise of the loss"]
    yield markdown(([*columns, "error, KL", "error, rise"], lines))
    for key, words in (("kl", "KL"), ("loss_gap", "rise of the loss")):
        held = sum(abs(row["predicted"] / row[key] - 1) <= WITHIN for _, row in folds)
        yield f"Within {WITHIN:.0%} of the measured {words}: {held} of {len(folds)} folds."
    recalls = {_model(each): each.metrics["recall"] for each in found}
    lines = [
        [
            model,
            ", ".join(f"{layer}.{head}" for layer, head in recall["named"]),
            *(f"{recall[key]:.2f}" for key in ("gain", "lost", "lost_at_random")),
            f"{recall['lost'] / recall['lost_at_random']:.1f}",
        ]
        for model, recall in recalls.items()
        if recall["gain"] > COPIES and recall["lost_at_random"] > 0
    ]
    if lines:
        columns = ["model", "the five heads named", "copy gain", "lost without them", "without five at random", "times"]
        yield markdown((columns, lines), words=2)
    for model, recall in recalls.items():
        if recall["gain"] <= COPIES:
            yield f"{model} does not copy: its copy gain is {recall['gain']:.2f} nats."
    texts = "; ".join(f"{_model(each)} on `{each.settings['data']}`" for each in found)
    yield f"Heads are layer.head, gains are in nats. {texts}. Measured on {plain(found[0].device)}{_note(found[0])}."


def _model(record: Record) -> str:
    return record.name.partition("/")[2]


def _note(record: Record) -> str:
    return f" ({record.settings['note']})" if record.settings.get("note") else ""
