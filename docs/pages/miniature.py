"""The figure of the README, and the page with the paper in miniature, from records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from kvfold.disk.record import Record
from kvfold.errors import DataError
from kvfold.report import figures, tables
from kvfold.report.benches import bench_rows, benched, benches, teacher_model
from kvfold.report.figures import Point
from kvfold.report.rows import Row, Spread, Study
from kvfold.report.sections import quality_points
from kvfold.report.studies import studies
from kvfold.report.tables import markdown

INITS = ("mean", "first", "random")  # in the order that the paper found


# --- the README ----------------------------------------------------------------------------------------------------


def of_runs(records: Sequence[Record], keep: Callable[[str], bool]) -> list[Record]:
    """The records of the runs whose names are kept."""
    return [each for each in records if keep(each.name)]


def front(study: Study) -> Study:
    """The study with its best students alone: those that no other student beats in both bytes and loss.

    A method that has none among them keeps the student of its lowest loss, so that every method has a row.
    """
    sized = [
        (row.cache_bytes, loss.mean, row)
        for row in _students(study)
        if row.cache_bytes and (loss := row.metric("loss"))
    ]
    kept = [
        row
        for size, loss, row in sized
        if not any(a <= size and b <= loss and (a, b) != (size, loss) for a, b, _ in sized)
    ]
    for method in {row.method for *_, row in sized} - {row.method for row in kept}:
        kept.append(min((each for each in sized if each[2].method == method), key=lambda each: each[1])[2])
    return replace(study, rows=tuple(row for row in study.rows if row in kept))


def quality_figure(records: Sequence[Record]) -> str:
    """Cache bytes per token against loss above the teacher's, for the best students of the first study: an SVG.

    Raises DataError when no student has both numbers.
    """
    found = [front(study) for study in studies(records)[:1]]
    parts = {row.cache_bytes: row.teacher_cache_bytes for study in found for row in study.rows}
    points = [point for study in found for point in quality_points(study, schooled=False)]
    if not any(point.y for point in points):
        raise DataError("no student with both bytes and loss is here", next="evaluate it with this version of kvfold")
    drawn = figures.scatter(
        "quality",
        "Cache bytes per token against loss above the teacher's",
        [replace(point, label=f"{point.about or point.label}{_beside(point, parts.get(point.x))}") for point in points],
        x_label="cache bytes per token",
        y_label="loss above the teacher’s (nats)",
    )
    return figures.standalone(drawn)


def _beside(point: Point, whole: float | None) -> str:
    """The second line of a student's label: how much of the teacher's cache it keeps, and what it loses."""
    return f"\n{tables.part_of(point.x / whole)} of the bytes, {point.y:+.3f}" if whole and point.y else ""


# --- the paper in miniature ----------------------------------------------------------------------------------------


def miniature_page(records: Sequence[Record]) -> str:
    """The docs page that holds the paper's orderings against the records of the miniature.

    Every sentence about an ordering is computed: it says that it holds, that it does not, or that the seeds are too
    far apart to tell. Raises DataError when no student was evaluated.
    """
    found = studies(records)
    if not any(row.role == "student" for study in found for row in study.rows):
        raise DataError("no evaluation of a student is among the records", next="run recipes/miniature.yaml")
    device = next((record.device for record in records if record.device), "")
    parts = [
        "# The paper in miniature",
        "Generated from records; do not edit. This page repeats experiments of *GQA: Training Generalized Multi-Query "
        "Transformer Models from Multi-Head Checkpoints* (Ainslie et al. 2023, arXiv 2305.13245), which uses T5 XXL, "
        "on the included checkpoint. Loss is in nats per token of held-out text, lower is better; ± is the standard "
        f"deviation over seeds. Measured on {tables.plain(device)}.",
    ]
    for study in found:
        parts += [*_inits(study), *_alphas(study)]
    parts += _groups(records, found)
    return "\n\n".join(parts) + "\n"


def _model(row: Row) -> str:
    """MQA, or GQA with its number of heads."""
    heads = str(row.settings.get("kv_heads"))
    return "MQA" if heads == "1" else f"GQA-{heads}"


def _students(study: Study) -> list[Row]:
    return [row for row in study.rows if row.role == "student"]


def _alpha(row: Row) -> float:
    return float(row.training.get("alpha") or 0)


def _points(study: Study) -> dict[tuple[str, str, float], Spread]:
    """Loss by model, init and alpha; alpha 0 is the student merely converted."""
    found: dict[tuple[str, str, float], Spread] = {}
    for row in _students(study):
        model, init = _model(row), str(row.settings.get("init", INITS[0]))
        for alpha, loss in ((0.0, row.loss_before), (_alpha(row), row.metric("loss"))):
            if loss is not None:
                found.setdefault((model, init, alpha), loss)
    return found


def _order(key: str) -> tuple[int, str]:
    return (len(key), key) if key != "MQA" else (99, key)


def compare(lower: Spread, higher: Spread) -> str:
    """Whether the first is below the second: `yes`, `no`, or `unclear` if the seeds' deviations cover the distance."""
    distance = higher.mean - lower.mean
    if abs(distance) <= math.hypot(lower.deviation, higher.deviation) and max(lower.count, higher.count) > 1:
        return "unclear"
    return "yes" if distance > 0 else "no"


def say(claim: str, answers: Mapping[str, str]) -> str:
    """One sentence on a claim, from the answer at each place where it was tried."""
    words = {"yes": "holds", "no": "does **not** hold", "unclear": "cannot be decided from these seeds"}
    parts = [
        f"{word} for {', '.join(places)}"
        for answer, word in words.items()
        if (places := [place for place, given in answers.items() if given == answer])
    ]
    return f"- {claim}: {'; '.join(parts)}."


def _inits(study: Study) -> Iterator[str]:
    """(a) Mean against first against random."""
    points = _points(study)
    places = sorted({(model, alpha) for model, _, alpha in points}, key=lambda each: (_order(each[0]), each[1]))
    lines, first, second = [], {}, {}
    for model, alpha in places:
        losses = {init: points[model, init, alpha] for init in INITS if (model, init, alpha) in points}
        if len(losses) < 2:
            continue
        place = f"{model} at alpha {alpha:.3g}"
        lines.append([place, *(tables.cell(losses.get(init)) for init in INITS)])
        if {"mean", "first"} <= losses.keys():
            first[place] = compare(losses["mean"], losses["first"])
        if {"first", "random"} <= losses.keys():
            second[place] = compare(losses["first"], losses["random"])
    if lines:
        yield "## (a) The start of a pooled head"
        yield "The paper (figure 4, MQA at alpha 0.05): mean is better than first, first is better than noise."
        yield markdown((["", *INITS], lines))
        claims = (("mean is better than first", first), ("first is better than random", second))
        yield "\n".join(say(claim, answers) for claim, answers in claims if answers)


def _alphas(study: Study) -> Iterator[str]:
    """(b) Quality over the share of pre-training."""
    points = {(model, alpha): loss for (model, init, alpha), loss in _points(study).items() if init == INITS[0]}
    alphas = sorted({alpha for _, alpha in points})
    models = sorted({model for model, _ in points}, key=_order)
    if len(alphas) < 3:
        return
    lines = [[model, *(tables.cell(points.get((model, alpha))) for alpha in alphas)] for model in models]
    controls = {_alpha(row): row.metric("loss") for row in study.rows if row.role == "control"}
    start = study.teacher.metric("loss") if study.teacher else None
    if controls or start:
        losses = {0.0: start, **controls}
        lines.append(["control: the teacher, trained further", *(tables.cell(losses.get(alpha)) for alpha in alphas)])
    yield "## (b) Quality over alpha"
    yield (
        "Alpha is uptraining tokens over pre-training tokens, from mean pooling. The paper (figure 5): GQA is "
        "reasonable without uptraining and MQA is not; both gain up to 5%, and less beyond."
    )
    yield markdown((["", *(f"alpha {alpha:.3g}" for alpha in alphas)], lines))
    yield "\n".join(say(claim, answers) for claim, answers in _alpha_claims(points, alphas, models) if answers)


def _alpha_claims(
    points: Mapping[tuple[str, float], Spread], alphas: Sequence[float], models: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    known = {model: [alpha for alpha in alphas if (model, alpha) in points] for model in models}
    gains = {
        f"{model} from {low:.3g} to {high:.3g}": compare(points[model, high], points[model, low])
        for model in models
        for low, high in pairwise(known[model])
    }
    yield "more uptraining is better", gains
    slower = {}
    for model in models:
        for (low, middle), (_, high) in pairwise(pairwise(known[model])):
            steps = [
                (points[model, a].mean - points[model, b].mean) / (b - a) for a, b in ((low, middle), (middle, high))
            ]
            slower[f"{model} at {middle:.3g}"] = "yes" if steps[1] < steps[0] else "no"
    yield "the gain per token decreases", slower
    against = {
        f"{model} at alpha {alpha:.3g}": compare(points[model, alpha], points["MQA", alpha])
        for model in models
        for alpha in known[model]
        if model != "MQA" and ("MQA", alpha) in points
    }
    yield "GQA is better than MQA", against


def _groups(records: Sequence[Record], found: Sequence[Study]) -> Iterator[str]:
    """(c) Decode time over the number of groups."""
    for bench in benches(records):
        heads = groups_of(bench, found)
        places = sorted({(row["context"], row["batch"]) for row in bench_rows(bench)})
        counts = sorted(set(heads.values()))
        times: dict[tuple[int, tuple[int, int]], float] = {
            (heads[row["model"]], (row["context"], row["batch"])): 1e3 * row["decode_s_per_token"]
            for row in bench_rows(bench, cache="native")
            if row["model"] in heads
        }
        if len(counts) < 3:
            continue
        yield "## (c) Decode time over the number of groups"
        yield (
            "Milliseconds per token, by context × batch, teacher and students interleaved in one run. The paper "
            "(figure 6): from 1 group to 8 of 64 the slowdown is modest, then it grows towards multi-head attention."
        )
        lines = [
            [
                f"{context:,} × {batch}",
                *(
                    f"{times[n, (context, batch)]:.3f}" if (n, (context, batch)) in times else tables.NONE
                    for n in counts
                ),
            ]
            for context, batch in places
        ]
        yield markdown((["", *(f"{n} group{'s' if n > 1 else ''}" for n in counts)], lines))
        yield "\n".join(say(claim, answers) for claim, answers in _group_claims(times, places, counts))


def groups_of(bench: Record, found: Sequence[Study]) -> dict[str, int]:
    """Key/value heads of each model of a benchmark: by the rows that evaluated it, the teacher's by its bytes."""
    heads = {
        model: int(row.settings["kv_heads"])
        for model in dict.fromkeys(row["model"] for row in bench_rows(bench))
        for study in found
        for row in _students(study)
        if str(row.settings.get("kv_heads", "")).isdigit() and benched(bench, model, (*row.records, *row.converted))
    }
    sizes = {row["model"]: int(row["cache_bytes"]) for row in reversed(bench_rows(bench, cache="native"))}
    teacher = teacher_model(bench)
    known = next((model for model in heads if model != teacher), None)
    if known is not None and teacher not in heads:
        heads[teacher] = round(heads[known] * sizes[teacher] / sizes[known])
    return heads


def _group_claims(
    times: Mapping[tuple[int, tuple[int, int]], float], places: Sequence[tuple[int, int]], counts: Sequence[int]
) -> Iterator[tuple[str, dict[str, str]]]:
    rising, late = {}, {}
    for place in places:
        known = [(count, times[count, place]) for count in counts if (count, place) in times]
        if len(known) < 3:
            continue
        name = f"{place[0]:,} × {place[1]}"
        rising[name] = "yes" if all(a[1] < b[1] for a, b in pairwise(known)) else "no"
        half = [time for count, time in known if count * 8 <= counts[-1]] or [known[0][1]]
        late[name] = "yes" if half[-1] - known[0][1] < (known[-1][1] - known[0][1]) / 2 else "no"
    yield "fewer groups decode faster, at every step", rising
    yield "an eighth of the groups costs less than half of the way to multi-head", late
