"""Exact match and F1 of answers, with the normalisation of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250).

Answers are compared in lower case, without punctuation, articles and more than single blanks. F1 is that of their words
as bags, of the best of several right answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: str) -> float:
    """1 if both are the same, normalised."""
    return float(normalised(answer) == normalised(right))


def f1(answer: str, right: str) -> float:
    """The harmonic mean of precision and recall of an answer's words; of no words, whether both have none."""
    found, wanted = normalised(answer).split(), normalised(right).split()
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted))


def best(metric: Callable[[str, str], float], answers: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """The mean over questions of a metric to the best of the right answers."""
    return sum(max(metric(answer, each) for each in those) for answer, those in zip(answers, right, strict=True)) / len(
        answers
    )
