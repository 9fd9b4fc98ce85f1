"""The page on conversion: what each start keeps without training, and what training adds to it.

Runs are known by their names: `conversion` and `conversion-...` are tables without training, one section each;
`...-paper` are students of the paper's recipe to hold them against. `budget` is heads of each layer's own, `local` what
block-local training adds, `recovery` loss over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvfold.disk.record import Record
from kvfold.errors import DataError
from kvfold.report import tables
from kvfold.report.rows import Spread, spread
from kvfold.report.tables import markdown
from pages.budgets import budgets
from pages.miniature import compare, say
from pages.recovery import FIGURE, local, loss_over_tokens, over_seeds, recovery
from pages.students import DEFAULT, MEAN, Ground, Result, Start, bare_name

CONVERSION, PAPER = "conversion", "-paper"
PAGE = "conversion.md"
ALPHA = 0.05  # the paper's share of the teacher's tokens
TARGETS = {2: 0.95, 4: 0.95, 8: 0.92}  # fewer heads -> gap closed without training


def conversion_pages(records: Sequence[Record]) -> dict[str, str]:
    """The page and its figure by file name; those for which there is no record are left out.

    Raises DataError when a run of conversions was evaluated in two ways, or does not say what its models cache.
    """
    ground = Ground.of(records)
    drawn = loss_over_tokens(ground)
    sections = [
        *(part for run in _runs(ground) for part in _section(run, ground)),
        *budgets(records),
        *local(ground),
        *recovery(ground),
        *over_seeds(records),
    ]
    if not sections:
        return {}
    parts = [
        "# What conversion keeps",
        "Generated from records; do not edit. The starts are described in "
        "[GQA and MQA](methods/gqa.md). Loss is in nats per token of held-out text. *Gap closed* is (loss of the "
        "mean-pooled student - loss) / (loss of the mean-pooled student - loss of the teacher), at the same bytes: "
        "0 is mean pooling, 1 the teacher. ± is a standard deviation; the best of a column is bold.",
        *sections,
    ]
    return {PAGE: "\n\n".join(parts) + "\n"} | ({FIGURE: drawn} if drawn else {})


def _runs(ground: Ground) -> list[str]:
    names = {each.run for each in ground.results if each.run.startswith(CONVERSION) and not each.trained}
    return sorted(name for name in names if not name.endswith(PAPER))


# --- without training ----------------------------------------------------------------------------------------------


def _section(run: str, ground: Ground) -> Iterator[str]:
    """One teacher: every start at every number of heads."""
    found = [each for each in ground.of_run(run) if not each.trained]
    if len({each.reading for each in found}) > 1:
        raise DataError("its students were evaluated in several ways", where=run, next="keep the records of one run")
    settings = found[0].record.settings
    teacher = bare_name(settings.get("teacher"))
    folds = ground.folds(str(settings.get("teacher")))
    heads = sorted({each.kv_heads for each in found}, reverse=True)
    if missing := [count for count in heads if count not in folds]:
        raise DataError(
            f"no record says what {missing[0]} heads are of", where=run, next="python docs/keep.py its folder"
        )
    losses: dict[tuple[Start, int], Spread] = {}
    gaps: dict[tuple[Start, int], Spread] = {}
    for start, count in {(each.start, each.kv_heads): None for each in found}:
        own = [each for each in found if (each.start, each.kv_heads) == (start, count)]
        for place, values in ((losses, [each.loss for each in own]), (gaps, [ground.gap_closed(each) for each in own])):
            if (value := spread(values)) is not None:
                place[start, count] = value
    yield f"## `{teacher}`, converted without training"
    yield (
        f"`{bare_name(settings['data'])}`, {settings['tokens']:,} tokens in windows of {settings['sequence_length']}. "
        f"Measured on {tables.plain(found[0].record.device)}."
    )
    yield _table(losses, gaps, {count: folds[count] for count in heads}, found[0].teacher_loss)
    yield "\n".join([*_targets(gaps, folds), *_claims(losses, folds)])
    yield from _paper(found, losses, gaps, folds, ground)


def _table(
    losses: Mapping[tuple[Start, int], Spread],
    gaps: Mapping[tuple[Start, int], Spread],
    folds: Mapping[int, tuple[int, int]],
    teacher_loss: float,
) -> str:
    starts = sorted({start for start, _ in losses}, key=lambda each: each.order)
    columns, bold = ["start"], set()
    lines = [["teacher"], *([start.words] for start in starts)]
    for count, (_, of) in folds.items():
        for values, digits, best in ((losses, 4, min), (gaps, 3, max)):
            columns.append(f"{count} of {of} heads: loss" if values is losses else "gap closed")
            lines[0].append(f"{teacher_loss:.4f}" if values is losses else tables.NONE)
            for line, start in zip(lines[1:], starts, strict=True):
                line.append(tables.cell(values.get((start, count)), digits))
            means = [values[start, count].mean for start in starts if (start, count) in values]
            bold |= {
                (number, len(columns) - 1)
                for number, start in enumerate(starts, 1)
                if means and (start, count) in values and values[start, count].mean == best(means)
            }
    return markdown((columns, lines), bold=bold)


def _targets(gaps: Mapping[tuple[Start, int], Spread], folds: Mapping[int, tuple[int, int]]) -> Iterator[str]:
    """Is enough of the gap closed without training?"""
    for (start, count), gap in sorted(gaps.items(), key=lambda each: -each[0][1]):
        times = folds[count][0]
        if start == DEFAULT and times in TARGETS:
            met = "holds" if gap.mean >= TARGETS[times] else "does **not** hold"
            yield (
                f"- {times} times fewer heads, at least {TARGETS[times]} of the gap closed by the default: "
                f"{met} ({gap.text(3)})."
            )


def _claims(losses: Mapping[tuple[Start, int], Spread], folds: Mapping[int, tuple[int, int]]) -> Iterator[str]:
    """What the table shows of the parts that the default is made of."""
    fit, o, down, q = (Start("fit", repair) for repair in ((), ("o",), ("o", "down"), ("q", "o", "down")))
    claims = (
        ("fit is better than align", fit, Start("align")),
        ("fit is better than align-norm", fit, Start("align-norm")),
        ("restoring the norm of align helps", Start("align-norm"), Start("align")),
        ("repairing o helps", o, fit),
        ("repairing down as well helps", down, o),
        ("repairing q as well helps", q, down),
        ("repairing gate and up as well helps", DEFAULT, q),
        ("the same repairs after fit are better than after mean", DEFAULT, Start("mean", DEFAULT.repair)),
    )
    for claim, lower, higher in claims:
        answers = {
            f"{count} head{'s' if count > 1 else ''}": compare(losses[lower, count], losses[higher, count])
            for count in sorted(folds, reverse=True)
            if (lower, count) in losses and (higher, count) in losses
        }
        if answers:
            yield say(claim, answers)


def _paper(
    found: Sequence[Result],
    losses: Mapping[tuple[Start, int], Spread],
    gaps: Mapping[tuple[Start, int], Spread],
    folds: Mapping[int, tuple[int, int]],
    ground: Ground,
) -> Iterator[str]:
    """The default without training against the paper's recipe: mean pooling, and cross-entropy on 5% of the tokens."""
    teacher, reading = found[0].record.hashes.get("teacher"), found[0].reading
    trained = [
        each
        for each in ground.results
        if each.start == MEAN and each.loss_name == "ce" and each.record.hashes.get("teacher") == teacher
        if each.alpha == ALPHA or (each.trained and each.run.endswith(PAPER))
    ]
    lines, answers, windows, overtaken = [], {}, set(), False
    for count in sorted({each.kv_heads for each in trained} & {heads for _, heads in gaps}, reverse=True):
        own = [each for each in trained if each.kv_heads == count]
        own = [each for each in own if each.reading == reading] or own
        gap, ours = spread(ground.gap_closed(each) for each in own), gaps.get((DEFAULT, count))
        if gap is None or ours is None:
            continue
        alike = all(each.reading == reading for each in own)
        windows |= set() if alike else {int(each.record.settings["sequence_length"]) for each in own}
        place = f"{count} of {folds[count][1]} heads"
        loss = spread(each.loss for each in own) if alike else None
        lines.append([place, losses[DEFAULT, count].text(), ours.text(3), tables.cell(loss), gap.text(3)])
        answers[place] = compare(gap, ours)
        overtaken |= gap.mean > 1
    if lines:
        columns = ["", "default, no training: loss", "gap closed", "paper's recipe: loss", "gap closed"]
        yield "### Against the paper's recipe"
        yield (
            f"Mean pooling, then cross-entropy on {ALPHA:.0%} of the teacher's own tokens (Ainslie et al. 2023). Both "
            "gaps are relative to mean pooling before any training."
            + (
                f" The paper's students were read in windows of {' or '.join(map(str, sorted(windows)))} tokens, with "
                "their teacher and their mean-pooled student: compare their gaps with these, not their losses."
                if windows
                else ""
            )
        )
        yield markdown((columns, lines))
        if overtaken:
            yield (
                "A gap above 1 means that the student is better than its teacher: training on this text also improves "
                "the model, so the comparison is not of conversion alone."
            )
        yield say("converting without training is better than the paper's recipe with it", answers)
