"""The sections on what training adds to each start.

`recovery` is loss over tokens, `local` attentions trained each on its own, `headline` the rows over seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from kvfold.disk.record import Record
from kvfold.report import figures, tables
from kvfold.report.rows import Spread, compact, spread
from kvfold.report.studies import studies
from kvfold.report.tables import markdown
from pages.miniature import compare, of_runs, say
from pages.students import DEFAULT, MEAN, Ground, Start, bare_name

RECOVERY, LOCAL, HEADLINE = "recovery", "local", "headline"
FIGURE = "loss-over-tokens.svg"

Curves = dict[tuple[Start, str], dict[int, Spread]]  # (start, loss) -> tokens -> loss


def _curves(ground: Ground) -> Curves:
    """Loss over tokens of each start and objective of the recovery, from no tokens on."""
    found = ground.of_run(RECOVERY)
    curves: Curves = {}
    trained = {(each.start, each.loss_name) for each in found if each.trained}
    for start, loss_name in sorted(trained, key=lambda each: (each[0].order, each[1]), reverse=True):
        own = [each for each in found if each.start == start and (each.loss_name == loss_name or not each.trained)]
        by_tokens = groupby(sorted(own, key=lambda each: each.tokens), key=lambda each: each.tokens)
        curves[start, loss_name] = {
            tokens: value for tokens, group in by_tokens if (value := spread(each.loss for each in group))
        }
    return curves


def loss_over_tokens(ground: Ground) -> str | None:
    """Loss over tokens of every start, beside the teacher's; None when nothing was trained."""
    curves = _curves(ground)
    if not curves:
        return None
    drawn = [
        figures.Line(
            f"{start.words}; {loss_name}",
            [tokens / 1e3 for tokens in points],
            [loss.mean for loss in points.values()],
            [loss.low for loss in points.values()],
            [loss.high for loss in points.values()],
        )
        for (start, loss_name), points in curves.items()
    ]
    inline = figures.lines(
        "recovery",
        "Loss over tokens of uptraining, by what training starts from",
        drawn,
        x_label="tokens of uptraining, thousands",
        y_label="loss (nats per token)",
        levels={"teacher": ground.of_run(RECOVERY)[0].teacher_loss},
    )
    return figures.standalone(inline)


def recovery(ground: Ground) -> Iterator[str]:
    """Loss over tokens, as a table and in words."""
    curves = _curves(ground)
    if not curves:
        return
    first = ground.of_run(RECOVERY)[0]
    counts = sorted({tokens for points in curves.values() for tokens in points})
    lines = [
        [start.words, loss_name, *(tables.cell(points.get(tokens)) for tokens in counts)]
        for (start, loss_name), points in curves.items()
    ]
    bold = set()
    for at, tokens in enumerate(counts, 2):
        means = {number: points[tokens].mean for number, points in enumerate(curves.values()) if tokens in points}
        bold |= {(number, at) for number, mean in means.items() if mean == min(means.values())}
    folds = ground.folds(str(first.record.settings.get("teacher")))
    of = f" of {folds[first.kv_heads][1]}" if first.kv_heads in folds else ""
    yield "## After uptraining"
    yield (
        f"`{bare_name(first.record.settings.get('teacher'))}`, {first.kv_heads}{of} heads, the same tokens and "
        f"schedule for every row. The teacher's loss is {first.teacher_loss:.4f}."
    )
    yield f"![Loss over tokens of uptraining for every start]({FIGURE})"
    columns = ["start", "trained by", *(f"{compact(tokens)} tokens" for tokens in counts)]
    yield markdown((columns, lines), words=2, bold=bold)
    yield "\n".join(say(claim, answers) for claim, answers in _recovery_claims(curves) if answers)


def _recovery_claims(curves: Curves) -> Iterator[tuple[str, dict[str, str]]]:
    pooled = curves.get((MEAN, "ce"), {})
    merely = next((points[0] for (start, _), points in curves.items() if start == DEFAULT and 0 in points), None)
    for start in sorted({start for start, _ in curves} - {DEFAULT}, key=lambda each: each.order):
        yield (
            f"the default is a better start than {start.words}",
            {
                f"{compact(tokens)} tokens by {loss_name}": compare(points[tokens], other[tokens])
                for (ours, loss_name), points in curves.items()
                if ours == DEFAULT
                for other in [curves.get((start, loss_name), {})]
                for tokens in points
                if tokens and tokens in other
            },
        )
    yield (
        "KL to the teacher is better than cross-entropy alone",
        {
            f"{start.words} after {compact(tokens)} tokens": compare(points[tokens], other[tokens])
            for (start, loss_name), points in curves.items()
            if "kl" in loss_name
            for other in [curves.get((start, "ce"), {})]
            for tokens in points
            if tokens and tokens in other
        },
    )
    if merely is not None:
        yield (
            "the default without training is better than mean pooling with cross-entropy",
            {f"{compact(tokens)} tokens": compare(merely, loss) for tokens, loss in pooled.items()},
        )


def local(ground: Ground) -> Iterator[str]:
    """Each attention trained on its own: before, after, and what it took."""
    found = ground.of_run(LOCAL)
    lines, answers = [], {}
    for after in sorted((each for each in found if each.trained), key=lambda each: (-each.kv_heads, each.start.order)):
        before = next(
            each for each in found if not each.trained and (each.start, each.kv_heads) == (after.start, after.kv_heads)
        )
        losses = [spread([each.loss]) for each in (before, after)]
        gaps = [spread([ground.gap_closed(each)]) for each in (before, after)]
        seconds = sum(step["seconds"] for step in after.record.metrics["made_by"] if step["stage"] == "uptrain")
        lines.append(
            [
                f"{after.kv_heads}: {after.start.words}",
                *(
                    tables.cell(value, digits)
                    for pair in zip(losses, gaps, strict=True)
                    for value, digits in zip(pair, (4, 3), strict=True)
                ),
                compact(after.tokens),
                f"{seconds / 60:.1f}",
            ]
        )
        if losses[0] and losses[1]:
            answers[f"{after.kv_heads} heads, {after.start.words}"] = compare(losses[1], losses[0])
    if not lines:
        return
    yield "## Attentions trained separately"
    yield (
        "Every attention is trained on the teacher's inputs and outputs; no gradient crosses a layer. "
        f"The teacher's loss is {found[0].teacher_loss:.4f}."
    )
    columns = ["heads, start", "loss", "gap closed", "trained: loss", "gap closed", "tokens", "minutes"]
    yield markdown((columns, lines))
    yield say("block-local training improves on it", answers)


def over_seeds(records: Sequence[Record]) -> Iterator[str]:
    """The rows over seeds, as the README has them."""
    for study in studies(of_runs(records, lambda name: name.startswith(HEADLINE))):
        yield "## Over seeds"
        yield (
            "Every method, and the control (the teacher), trained on the same tokens. "
            f"Gap closed is {tables.GAP_CLOSED}."
        )
        yield markdown(tables.headline(study), words=2)
