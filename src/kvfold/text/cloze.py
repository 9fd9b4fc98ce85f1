"""A reading task from any text: find the word that a sentence lacks, in one of many passages.

A passage is a sentence. A question is a few words of one around a word that is left out, its answer:

    question: in the muscle by the ___ of calcium ions     answer: release

One passage of a question is that sentence. The others are the sentences that share the most words with the question,
each word weighed by its rarity (`-log` of the share of sentences that have it), and lack the answer. So a reader has to
match the question with passages that resemble it, and to copy. Everything follows from the text and the seed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.disk.output import disk_errors, replacing
from kvfold.errors import DataError, OutputError
from kvfold.progress import SILENT, Progress, task
from kvfold.settings import MOST, SEEDS, check_range, setting
from kvfold.text.documents import read_texts
from kvfold.text.questions import is_question

if TYPE_CHECKING:
    from numpy.random import Generator

COMMON, FEW = 0.02, 20  # a word in more than this share of the sentences, and in more than a few, tells little
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MARKS = ".,;:!?()\"'“”‘’"
_WORD = re.compile(r"[a-z]+", re.IGNORECASE)


@dataclass(frozen=True)
class ClozeSettings:
    """How large a reading task is, and how hard."""

    records: int = setting(4000, "Questions.")
    passages: int = setting(20, "Passages of a question, one of which holds its answer.")
    words: int = setting(24, "Longest sentence, in words; the shortest has half of them.")
    around: int = setting(4, "Words of the question on each side of the blank.")
    gap: int = setting(1, "Words that are left out: the one that is asked for, and those behind it.")
    blank: str = setting("___", "What stands for the word; <extra_id_0> is the sentinel of a T5.")
    occurrences: int = setting(50, "Sentences that hold an answer, at least: the words of answers are frequent ones.")
    shuffle: bool = setting(False, "Shuffle the words of each sentence first, so that only reading gives the answer.")
    seed: int = setting(0, "Seed of the sentences that are asked about, and of the order of passages.")

    def __post_init__(self) -> None:
        """Raise SettingError for values out of range."""
        check_range(self, "questions", 1, MOST, "records", "passages", "around", "gap", "occurrences")
        check_range(self, "questions", 2, MOST, "words")
        check_range(self, "questions", 0, SEEDS - 1, "seed")


def cloze(
    text: str | Path,
    out: str | Path,
    settings: ClozeSettings = ClozeSettings(),
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write a `.jsonl` of questions about a text, with passages (`kvfold.text.questions`), and return its path.

    Raises DataError for a text with too few sentences, OutputError if `out` exists and is not overwritten. Only a file
    of questions is.
    """
    import numpy as np  # not loaded for the help of the command

    out = Path(out)
    if os.path.lexists(out):
        _check_replaceable(out, text, overwrite)
    sentences = _sentences(text, settings)
    found = _Sentences(sentences)
    order = np.random.default_rng(settings.seed).permutation(len(sentences))
    lines: list[str] = []
    with task(progress, "questions", settings.records, "questions"):
        for number in order:
            if len(lines) == settings.records:
                break
            made = found.record(int(number), settings, np.random.default_rng((settings.seed, int(number))))
            if made is not None:
                lines.append(json.dumps(made, ensure_ascii=False))
                progress.advance(1)
    if len(lines) < settings.records:
        raise DataError(
            "the text has fewer questions than asked for", where=text, got=len(lines), allowed=f"{settings.records:,}"
        )
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as sibling:
            sibling.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return out


def _check_replaceable(out: Path, text: str | Path, overwrite: bool) -> None:
    """Refuse to replace anything but questions. Raises OutputError."""
    if not overwrite:
        raise OutputError("exists", where=out, next="give another path, or --overwrite")
    if out.is_symlink() or not out.is_file() or not _holds_question(out):
        raise OutputError("is there and holds no questions: it is not replaced", where=out, next="give another path")
    if os.path.exists(text) and out.samefile(text):
        raise OutputError("is the text itself: it is not replaced", where=out, next="give another path")


def _holds_question(path: Path) -> bool:
    """Whether the first line of a file is a question with passages."""
    with disk_errors(path), path.open("rb") as file:
        first = file.readline()
    try:
        return is_question(json.loads(first))
    except ValueError:
        return False


def _sentences(text: str | Path, settings: ClozeSettings) -> list[list[str]]:
    """The sentences of a text that are neither short nor long, as words; each is there once."""
    import numpy as np

    found: dict[str, list[str]] = {}
    for document in read_texts(text):
        for paragraph in document.splitlines():
            for sentence in _END.split(paragraph):
                words = sentence.split()
                if settings.words / 2 <= len(words) <= settings.words:
                    found.setdefault(" ".join(words), words)
    if len(found) < settings.passages:
        raise DataError("has too few sentences", where=text, got=len(found), allowed=f"{settings.passages} or more")
    if settings.shuffle:
        generator = np.random.default_rng(settings.seed)
        return [[words[at] for at in generator.permutation(len(words))] for words in found.values()]
    return list(found.values())


def _bare(word: str) -> str:
    """A word without punctuation, in lower case; empty for numbers and formulas."""
    bare = word.strip(_MARKS).lower()
    return bare if _WORD.fullmatch(bare) else ""


class _Sentences:
    """Sentences, and where each word stands."""

    def __init__(self, sentences: Sequence[Sequence[str]]) -> None:
        self.sentences = sentences
        self.words = [[_bare(word) for word in sentence] for sentence in sentences]
        self.of = Counter(word for words in self.words for word in set(words) if word)
        self.places: dict[str, list[int]] = {}
        for number, words in enumerate(self.words):
            for word in sorted(set(words)):
                if word and self.of[word] <= max(FEW, COMMON * len(sentences)):
                    self.places.setdefault(word, []).append(number)

    def record(self, number: int, settings: ClozeSettings, generator: Generator) -> dict[str, object] | None:
        """The question about a sentence; None if no word of it can be asked for, or too few passages resemble it."""
        sentence, words = self.sentences[number], self.words[number]
        known = [
            at
            for at, word in enumerate(words[: len(words) - settings.gap + 1])
            if word in self.places and self.of[word] >= settings.occurrences and words.count(word) == 1
        ]
        if not known:
            return None
        at = min(known, key=lambda place: (self.of[words[place]], place))  # the rarest
        end = at + settings.gap
        before, behind = slice(max(0, at - settings.around), at), slice(end, end + settings.around)
        asked = {word for word in [*words[before], *words[behind]] if word}
        others = self._alike(number, asked, words[at], settings.passages - 1) if settings.passages > 1 else []
        if len(others) < settings.passages - 1:
            return None
        shown = generator.permutation([number, *others])
        answer = " ".join(sentence[at:end]).strip(_MARKS)
        # byte-level tokenizers have other ids for a word without the blank that stands before it in a passage
        return {
            "question": " ".join([*sentence[before], settings.blank, *sentence[behind]]),
            "answers": [answer.lower()],
            "target": f" {answer}",
            "ctxs": [{"title": "", "text": " ".join(self.sentences[each])} for each in shown],
        }

    def _alike(self, number: int, asked: set[str], answer: str, count: int) -> list[int]:
        """The sentences without the answer that share most with the words that are asked about."""
        scores: dict[int, float] = {}
        for word in sorted(asked & self.places.keys()):
            weight = math.log(len(self.sentences) / self.of[word])
            for other in self.places[word]:
                scores[other] = scores.get(other, 0.0) + weight
        ranked = sorted(scores, key=lambda other: (-scores[other], other))
        return [other for other in ranked if other != number and answer not in self.words[other]][:count]
