"""The errors that kvfold raises on purpose, with the exit status of the command line.

    KvfoldError                 2    an error that the user can correct
    ├── SettingError            2    a flag, a recipe key or a method's setting is invalid
    ├── CheckpointError         2    a checkpoint is missing, damaged or of the wrong kind
    │   └── UnsupportedModel    2    no family or method supports a checkpoint
    ├── DataError               2    a text, a token file or a tokenizer cannot be used
    ├── OutputError             2    an output exists, the disk is full, or permission is missing
    ├── TrainingError           2    a loss is not finite
    ├── GateMissed              3    a measured number misses its threshold
    └── Interrupted             130  Ctrl-C or a signal stopped the command

Any other exception is a bug in kvfold and keeps its traceback (exit status 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvfoldError(Exception):
    """An error that the user can correct: one line of what, where, got, allowed and next. Exit status 2."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        next: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.allowed, self.next = what, where, got, allowed, next
        line = plain(what, 600)
        if where is not None:
            line = f"{plain(where, 400)}: {line}"
        if got is not None:
            line += f" (got {plain(got, 200)})"
        if allowed is not None:
            line += f"; allowed: {plain(allowed, 1000)}"
        if next is not None:
            line += f"; {plain(next, 600)}"
        super().__init__(line)


class SettingError(KvfoldError):
    """A flag, a recipe key or a method's setting is invalid. Exit status 2."""


class CheckpointError(KvfoldError):
    """A checkpoint is missing, damaged or of the wrong kind. Exit status 2."""


class UnsupportedModel(CheckpointError):
    """No family or method supports this checkpoint, although it is valid. Exit status 2."""


class DataError(KvfoldError):
    """A text, a token file or a tokenizer cannot be used. Exit status 2."""


class OutputError(KvfoldError):
    """An output exists already, or cannot be written. Exit status 2."""


class TrainingError(KvfoldError):
    """A training run cannot continue; its last valid state is on disk. Exit status 2."""


class GateMissed(KvfoldError):
    """A measured number misses its threshold. Exit status 3."""

    exit_code = 3


class Interrupted(KvfoldError):
    """Ctrl-C or a signal stopped the command, which continues when it is repeated. Exit status 130."""

    exit_code = 130


def plain(value: object, limit: int) -> str:
    """A value as one printable line of about `limit` characters at most; the middle of a longer text is left out.

    Control characters, directional marks and lone surrogates are escaped, because a message may quote any file.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"
    return "".join(each if each.isprintable() else " " if each in "\t\n\r" else ascii(each)[1:-1] for each in text)


def choices(options: Iterable[object]) -> str:
    """Options as a list in words: `1, 2, 3 or 4`."""
    words = [str(option) for option in options]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """`did you mean 'x'?` for the known word nearest to `word`, or None."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None
