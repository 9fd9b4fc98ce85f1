"""Records of Fusion-in-Decoder (Izacard & Grave 2020, arXiv 2007.01282): a question, its passages, and its answers.

A row has the keys of the authors' code (facebookresearch/FiD):

    {"question": "...", "answers": ["...", ...], "ctxs": [{"title": "...", "text": "..."}, ...]}

`target`, where there is one, is the answer that a model is trained on; otherwise it is the first of `answers`. Any of
`answers` is right. For each passage, the encoder reads `question: Q title: T context: X`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvfold.errors import DataError

if TYPE_CHECKING:
    from kvfold.text.spans import Ids

KEYS = ("question", "ctxs")
COLUMNS = (*KEYS, "answers", "target")
_EXAMPLE = '{"question": "...", "answers": ["..."], "ctxs": [{"title": "...", "text": "..."}]}'


@dataclass(frozen=True)
class Question:
    """One record."""

    question: str
    target: str
    answers: tuple[str, ...]
    passages: tuple[tuple[str, str], ...]  # title and text

    def inputs(self) -> list[str]:
        """What the encoder reads: one text for each passage."""
        return [
            f"question: {self.question}{f' title: {title}' if title else ''} context: {text}"
            for title, text in self.passages
        ]

    def document(self) -> str:
        """The record as one text, for a tokenizer that is trained on it."""
        passages = (f"title: {title} context: {text}" for title, text in self.passages)
        return "\n".join([f"question: {self.question}", *passages, *dict.fromkeys((self.target, *self.answers))])


def is_question(row: object) -> bool:
    """Whether a row of a file is a record."""
    return isinstance(row, Mapping) and set(KEYS) <= set(row)


def read_question(row: Any, where: str) -> Question:
    """The record of a row. Raises DataError for one that has no passages or no answer."""
    question, given, answers, target = (row.get(key) for key in COLUMNS)
    right = [target] if answers is None else answers
    known = isinstance(given, Sequence) and all(isinstance(each, Mapping) for each in given) and given
    texts = [(each.get("title") or "", each.get("text")) for each in given] if known else []
    strings = [question, *(part for pair in texts for part in pair), *(right if isinstance(right, list) else [None])]
    if not texts or not right or not all(isinstance(each, str) for each in strings):
        raise DataError("is no question with passages and answers", where=where, allowed=_EXAMPLE)
    return Question(question, right[0] if target is None else str(target), tuple(right), tuple(texts))


@dataclass(frozen=True)
class Passages:
    """The ids of the passages of one record. Its length is that of the encoder's outputs, one after another."""

    ids: tuple[Ids, ...]

    def __len__(self) -> int:
        return sum(map(len, self.ids))

    def __getitem__(self, tokens: slice) -> Passages:
        """The passages, each cut to these tokens."""
        return Passages(tuple(each[tokens] for each in self.ids))

    @classmethod
    def grouped(cls, ids: Sequence[Ids], counts: Sequence[int]) -> list[Passages]:
        """The passages of records that have these numbers of them, from those of all records."""
        left: Iterator[Ids] = iter(ids)
        return [cls(tuple(islice(left, count))) for count in counts]
