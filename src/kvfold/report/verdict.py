"""The verdict on a student: ship it, train it longer, or use a quantised cache instead.

`verdict` is a pure function of measured numbers, and `RULE` states it in words with the same thresholds. If it depends
on a number that was not measured, the verdict is to measure that first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvfold.evaluate.gate import COPIES, KNOWS, LOSS_LIMIT, RECALL_LIMIT
from kvfold.formats import measurable

Outcome = Literal["ship", "train", "quantise", "measure"]

OUTCOMES: dict[Outcome, str] = {
    "ship": "Ship it",
    "train": "Train it longer",
    "quantise": "Use a quantised cache instead",
    "measure": "Measure first",
}

CLOSING_LIMIT = 0.5  # of the gap that is left: another doubling of the tokens is worth it if the last closed as much
GAP_LIMIT = 0.02  # nats: a smaller gap is not worth more training

RULE = (
    "Measure first: the cache bytes or the loss of the student or of the teacher is missing; or the student caches at "
    "least as many bytes per token as the teacher with an fp8 cache, and the loss of that cache is missing.",
    "Use a quantised cache instead: the student caches at least as many bytes per token as the teacher with an fp8 "
    "cache, and its loss is no lower.",
    f"Train it longer: the gate is missed. The default gate is a loss of at most {LOSS_LIMIT:g} nats per token above "
    f"the teacher's, and at least {RECALL_LIMIT:.0%} of the teacher's copy gain at every distance and of its accuracy "
    f"on last words (where the teacher gains at least {COPIES:g} nats, and gets at least {KNOWS:.0%} right). Or more "
    f"than {GAP_LIMIT:g} nats are left and the last doubling of the training tokens closed at least "
    f"{CLOSING_LIMIT:.0%} of what is left.",
    "Ship it: none of the above.",
)


@dataclass(frozen=True)
class Measured:
    """What the verdict depends on; None if not measured. Bytes are per token, losses in nats per token."""

    loss: float | None = None
    teacher_loss: float | None = None
    cache_bytes: float | None = None
    teacher_bytes: float | None = None
    fp8_bytes: float | None = None  # of the teacher with an fp8 cache
    fp8_loss: float | None = None  # of the teacher with an fp8 cache
    gate: bool | None = None  # do all rows hold; None: no gate of the recipe
    limited: bool = True  # does the default gate apply
    recall_kept: float | None = None  # of the teacher's copy gain, at the worst distance
    words_kept: float | None = None  # of the teacher's accuracy on last words
    trained: bool = False
    closing: float | None = None  # nats that a doubling of the training tokens closes


@dataclass(frozen=True)
class Verdict:
    """An outcome, its reason, and missing numbers that could change it."""

    outcome: Outcome
    reason: str
    missing: tuple[str, ...] = ()


def verdict(measured: Measured) -> Verdict:
    """The first line of `RULE` that applies to a student."""
    known = Measured(**measurable(vars(measured)))
    needed = {
        "the student's loss": known.loss,
        "the teacher's loss": known.teacher_loss,
        "the student's cache bytes": known.cache_bytes,
        "the teacher's cache bytes": known.teacher_bytes,
    }
    missing = tuple(name for name, value in needed.items() if value is None)
    if known.loss is None or known.teacher_loss is None or known.cache_bytes is None or known.teacher_bytes is None:
        return Verdict("measure", f"The verdict depends on {_listed(missing)}.", missing)
    if known.fp8_bytes is None:
        return _depends("the size of the teacher's fp8 cache")
    if known.cache_bytes >= known.fp8_bytes:
        if known.fp8_loss is None:
            return _depends("the teacher's loss with an fp8 cache")
        if known.loss >= known.fp8_loss:
            reason = (
                f"The teacher with an fp8 cache takes {known.fp8_bytes:,.0f} bytes per token at a loss of "
                f"{known.fp8_loss:.4f}; this student takes {known.cache_bytes:,.0f} at {known.loss:.4f}."
            )
            return Verdict("quantise", reason)
    gap = known.loss - known.teacher_loss
    if known.gate is False:
        return Verdict("train", "It misses its gate.")
    beyond = _beyond(gap, known.recall_kept, known.words_kept) if known.limited else []
    if beyond and known.gate is None:
        reason = "; ".join(beyond)
        return Verdict("train", f"{reason[0].upper()}{reason[1:]}.")
    if known.closing is not None and gap > GAP_LIMIT and known.closing >= CLOSING_LIMIT * gap:
        reason = f"A doubling of its training tokens closed {known.closing:.3f} nats, and {gap:.3f} are left."
        return Verdict("train", reason)
    missing = ("whether more training would help",) if known.trained and known.closing is None else ()
    if known.gate is None and known.recall_kept is None and known.words_kept is None:
        missing += ("recall",)
    within = "Its gate holds" if known.gate else "The default gate holds" if known.limited else "No gate is set"
    reason = f"{within}, at {100 * known.cache_bytes / known.teacher_bytes:.3g}% of the teacher's cache bytes."
    if beyond:
        reason += f" The gate allows more than the default gate: {'; '.join(beyond)}."
    return Verdict("ship", reason, missing)


def _beyond(gap: float, recall_kept: float | None, words_kept: float | None) -> list[str]:
    """The rows of the default gate that it misses, in words."""
    found = [f"its loss is {gap:.3f} nats above the teacher's (limit {LOSS_LIMIT:g})"] if gap > LOSS_LIMIT else []
    if recall_kept is not None and recall_kept < RECALL_LIMIT:
        found.append(
            f"at the worst distance, {max(recall_kept, 0):.0%} of the teacher's copy gain is left "
            f"(limit {RECALL_LIMIT:.0%})"
        )
    if words_kept is not None and words_kept < RECALL_LIMIT:
        found.append(f"{words_kept:.0%} of the teacher's accuracy on last words is left (limit {RECALL_LIMIT:.0%})")
    return found


def _depends(name: str) -> Verdict:
    return Verdict("measure", f"The verdict depends on {name}.", (name,))


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
