"""What an inspection found: heat maps of layers and heads, what it suggests, and the commands for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvfold.disk.record import Record
from kvfold.errors import plain
from kvfold.report import figures
from kvfold.report.blocks import Block, Section, tabulated
from kvfold.report.tables import NONE, part_of

KIND = "inspect"
STUDENT = "student"  # the directory that the suggested command writes
DARKER = "Stronger colour is more"

Rows = Sequence[Mapping[str, Any]]

HEADS = (  # figures of layers and heads: the key of a row, the title, what it says, and digits
    (
        "kl",
        "What breaks without a head",
        "KL to the whole model on text, nats per token. Heads without colour are hardly used.",
        2,
    ),
    (
        "rise",
        "Which heads copy",
        "How much harder a repeated span of text becomes without the head, nats per token. The heads with colour find "
        "what was said before, or help to.",
        2,
    ),
    ("induction", "Looks up what followed last time", "Share of attention on the token after the same one before.", 2),
    ("sink", "Parked on the first tokens", "Share of attention on the first 4 tokens: the head has nothing to do.", 2),
    ("local", "Looks at the last words", "Share of attention on the last 16 tokens.", 2),
    ("far", "Looks far back", "Share of attention on all tokens between the first and the last ones.", 2),
    ("entropy", "How widely a head looks", "Entropy of the attention in nats: 0 is one token, 3 is about 20.", 1),
    ("distance", "How far back a head looks", "Mean distance of what it attends to, in tokens.", 0),
    ("key_rank", "Directions that its keys use", "Effective rank of the keys as the queries see them; few: narrow.", 1),
    ("value_rank", "Directions that its values use", "Effective rank of the values as the output sees them.", 1),
)
SHARES = ("induction", "sink", "local", "far")


def inspection_sections(record: Record) -> list[Section]:
    """The sections of the page of an inspection that have something to show."""
    rows = record.metrics["layers"]
    drawn = {key: _heads(key, title, about, digits, rows) for key, title, about, digits in HEADS}
    made = [
        Section("suggestion", "What to fold", " ".join(_facts(record)), tuple(_suggestion(record))),
        Section("needed", "Which heads are needed", "", _there(drawn, "kl", "rise")),
        Section("folds", "How many heads a layer needs", "", tuple(_folds(record))),
        Section("attention", "What the heads look at", "", _there(drawn, *SHARES, "entropy", "distance")),
        Section("likeness", "Which heads are alike", _same(record), tuple(_likeness(rows))),
        Section("ranks", "How much a head holds", "", _there(drawn, "key_rank", "value_rank")),
        Section("planes", "Which rotary planes matter", "", tuple(_planes(rows))),
    ]
    return [section for section in made if section.blocks or section.about]


# --- what it suggests -------------------------------------------------------------------------------------------------


def advice(record: Record) -> list[str]:
    """What the inspection suggests, in sentences."""
    return [*(f"{title}: {costs}." for title, costs in _folds_suggested(record.metrics).values()), *_facts(record)]


def _folds_suggested(found: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The suggested folds in words, with their costs: `uniform`, `mix`."""
    named = {}
    if uniform := found.get("uniform"):
        named["uniform"] = f"{_heads_of(uniform)} everywhere", _costs(uniform)
    if mix := found.get("mix"):
        start = "Or, at the same bytes," if uniform else "Within the loss,"
        named["mix"] = f"{start} {mix['kv_heads']}", _costs(mix)
    return named


def _facts(record: Record) -> list[str]:
    found, facts = record.metrics, []
    if "predicted" in found and not _folds_suggested(found):
        facts.append(_nothing(found["predicted"], record.settings["loss"]))
    if layers := found.get("copying"):
        it = "copies: fold it last" if len(layers) == 1 else "copy: fold them last"
        facts.append(f"{_layers(layers)} {it}.")
    if "recall_heads" in found:
        named = [f"{layer}.{head}" for layer, head, _ in found["recall_heads"]]
        facts.append(
            f"Heads that copy (layer.head): {', '.join(named)}."
            if named
            else "No head copies: without any one of them the loss of copying hardly rises."
        )
    return [*facts, *filter(None, [_same(record)])]


def commands(record: Record) -> dict[str, str]:
    """The command of each suggested fold: `uniform`, the same heads in every layer, and `mix`."""
    settings = record.settings
    source, data = (plain(settings[name], 4000) for name in ("source", "data"))
    effort = [] if settings["effort"] == "standard" else ["--effort", settings["effort"]]
    chosen = {name: record.metrics.get(name) for name in ("uniform", "mix")}
    words = ["kvfold", "convert", source, STUDENT, "--method", "gqa", "--calibration", data, *effort]
    return {name: shlex.join([*words, "--kv-heads", str(fold["kv_heads"])]) for name, fold in chosen.items() if fold}


def _heads_of(fold: Mapping[str, Any]) -> str:
    return "1 head" if fold["kv_heads"] == 1 else f"{fold['kv_heads']} heads"


def _costs(fold: Mapping[str, Any]) -> str:
    return (
        f"{part_of(fold['cache'])} of the cache, predicted loss {fold['kl']:+.3f} nats per token and "
        f"loss of copying {fold['rise']:+.3f}, before repair"
    )


def _nothing(predicted: Mapping[str, Mapping[str, Any]], loss: float) -> str:
    if not predicted:
        return "Every layer has one head: there is nothing to fold."
    least = min(predicted.values(), key=lambda each: float(each["kl"]))
    return f"No fold is within a loss of {loss:g}: {_heads_of(least)} everywhere: {_costs(least)}."


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"Layer {numbers[0]}"
    return f"Layers {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _same(record: Record) -> str:
    pairs = [f"{first} and {second} of layer {layer}" for layer, first, second in record.metrics["duplicates"]]
    return (
        f"Heads that are images of one another, so that one for both loses nothing: {'; '.join(pairs)}."
        if pairs
        else ""
    )


def _suggestion(record: Record) -> Iterator[Block]:
    suggested, written = _folds_suggested(record.metrics), commands(record)
    for name, (title, costs) in suggested.items():
        yield Block("code", title, f"{costs[0].upper()}{costs[1:]}.", content=written[name])
    folds = record.metrics.get("predicted") or {}
    rows = [
        [_heads_of(each), part_of(each["cache"]), f"{each['kl']:.3f}", f"{each['rise']:.3f}"] for each in folds.values()
    ]
    columns = ["in every layer", "of the cache", "predicted loss, nats", "loss of copying, nats"]
    about = "The sum of what each layer costs alone, before any repair; a repair takes a part of it away."
    yield from tabulated("Every number of heads", columns, rows, about=about)


# --- heat maps --------------------------------------------------------------------------------------------------------


def heads_figure(key: str, rows: Rows, title: str, digits: int) -> str:
    """One number of every key/value head as inline SVG: a row for each layer, a column for each head."""
    return figures.heat_map(
        f"heads-{key}",
        title,
        [row[key] for row in rows],
        x_label="key/value head",
        y_label="layer",
        y_ticks=[str(row["layer"]) for row in rows],
        digits=digits,
        most=1.0 if key in SHARES else None,
        root=key in ("kl", "rise"),
    )


def _heads(key: str, title: str, about: str, digits: int, rows: Rows) -> Block | None:
    if key not in rows[0]:
        return None
    table = [[str(row["layer"]), " ".join(f"{value:.{digits + 1}f}" for value in row[key])] for row in rows]
    drawn = heads_figure(key, rows, title, digits)
    return Block("figure", title, f"{about} {DARKER}.", (["layer", "head by head"], table), drawn, words=2)


def _there(drawn: Mapping[str, Block | None], *keys: str) -> tuple[Block, ...]:
    return tuple(block for key in keys if (block := drawn[key]) is not None)


def _folds(record: Record) -> Iterator[Block]:
    """The cost of each number of heads, layer by layer; a frame is the smallest within an even share of the loss."""
    rows: Rows = record.metrics["layers"]
    for key, title, about in (
        (
            "fold_kl",
            "Predicted loss of fewer heads",
            "KL if this layer alone keeps so many heads, nats per token before repair. A frame is the fewest heads "
            f"within the layer's share of a loss of {record.settings['loss']:g}.",
        ),
        ("fold_rise", "Copying lost with fewer heads", "How much harder a repeated span becomes, nats per token."),
    ):
        if not any(row.get(key) for row in rows):
            continue
        counts = sorted({int(count) for row in rows for count in row.get(key, ())})
        values = [[row.get(key, {}).get(str(count)) for count in counts] for row in rows]
        marked = {
            (at, counts.index(row["fewest"]))
            for at, row in enumerate(rows)
            if key == "fold_kl" and row["fewest"] in counts
        }
        drawn = figures.heat_map(
            f"folds-{key}",
            title,
            values,
            x_label="key/value heads that stay",
            y_label="layer",
            x_ticks=list(map(str, counts)),
            y_ticks=[str(row["layer"]) for row in rows],
            root=True,
            marked=marked,
        )
        table = [
            [str(row["layer"]), *(NONE if value is None else f"{value:.4f}" for value in line)]
            for row, line in zip(rows, values, strict=True)
        ]
        yield Block("figure", title, f"{about} {DARKER}.", (["layer", *map(str, counts)], table), drawn)


def _likeness(rows: Rows) -> Iterator[Block]:
    """The likeness of neighbouring heads, which a fold merges first, and all pairs as a table."""
    for key, title, about in (
        (
            "keys",
            "Keys of neighbouring heads",
            "1: one is an image of the other, plane by plane; 0: nothing in common.",
        ),
        ("values", "Values of neighbouring heads", "The same of values, as the output reads them."),
    ):
        if all(row["heads"] < 2 for row in rows):
            continue
        values = [[row[key][head][head + 1] for head in range(row["heads"] - 1)] for row in rows]
        drawn = figures.heat_map(
            f"likeness-{key}",
            title,
            values,
            x_label="heads",
            y_label="layer",
            x_ticks=[f"{head}, {head + 1}" for head in range(max(map(len, values)))],
            y_ticks=[str(row["layer"]) for row in rows],
            most=1.0,
        )
        table = [
            [f"{row['layer']}, head {head}", " ".join(f"{value:.3f}" for value in likeness)]
            for row in rows
            for head, likeness in enumerate(row[key])
        ]
        yield Block("figure", title, f"{about} {DARKER} alike.", (["layer", "to each head"], table), drawn, words=2)


def _planes(rows: Rows) -> Iterator[Block]:
    """Each layer's planes, as means over its heads."""
    rotated = [row for row in rows if row.get("planes")]
    if not rotated:
        return
    title = "Importance of each rotary plane"
    means = [[sum(plane) / len(plane) for plane in zip(*row["planes"], strict=True)] for row in rotated]
    ticks = [str(row["layer"]) for row in rotated]
    drawn = figures.heat_map(
        "planes", title, means, x_label="rotary plane, fastest first", y_label="layer", y_ticks=ticks
    )
    about = (
        "How much the logits change if this plane is not rotated, as a share of all planes, the mean of a layer's "
        f"heads. Where few planes have colour, elitekv can leave the others unrotated. {DARKER}."
    )
    table = [
        [f"{row['layer']}, head {head}", " ".join(f"{value:.3f}" for value in planes)]
        for row in rotated
        for head, planes in enumerate(row["planes"])
    ]
    yield Block("figure", title, about, (["layer", "plane by plane"], table), drawn, words=2)
