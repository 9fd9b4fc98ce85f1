"""The tree of errors that kvfold raises on purpose.

    KvfoldError                 exit 2: the user can mend it; one clear line
    ├── SettingError            a flag, a recipe key, a head count that cannot be
    ├── CheckpointError         a checkpoint that is missing, damaged or of the wrong kind
    │   └── UnsupportedModel    a checkpoint that is whole, but that no family or method can take
    ├── DataError               text, token files, tokenizers
    ├── OutputError             an output that exists, a full disk, no permission
    ├── TrainingError           a loss that is not a number, a run that diverged
    ├── GateMissed              exit 3: a threshold on a measured number does not hold
    └── Interrupted             exit 130: stopped by Ctrl-C or a signal; nothing lost

Anything else that escapes is a bug of kvfold and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvfoldError(Exception):
    """A mistake that the user can mend, told as what, where, got, allowed and next."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        next: str | None = None,  # the word of the house: what, where, got, allowed, next
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
    """A flag, a recipe key or a method's setting that cannot be."""


class CheckpointError(KvfoldError):
    """A checkpoint that is missing, damaged or of the wrong kind."""


class UnsupportedModel(CheckpointError):
    """A whole checkpoint that no family or method of kvfold can take."""


class DataError(KvfoldError):
    """Text, token files or tokenizers that cannot be used."""


class OutputError(KvfoldError):
    """An output that exists already, or a place that cannot be written."""


class TrainingError(KvfoldError):
    """A training run that cannot go on: its last good state is on disk."""


class GateMissed(KvfoldError):
    """A threshold on a measured number does not hold."""

    exit_code = 3


class Interrupted(KvfoldError):
    """Stopped by Ctrl-C or a signal; the same command continues."""

    exit_code = 130


def plain(value: object, limit: int) -> str:
    """A value as one line of at most about `limit` characters that is safe to print.

    Control characters, those that change the direction of text, and lone surrogates are escaped: a message may quote
    a file from anywhere, and must not steer the terminal. The middle of a longer text is left out.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"
    return "".join(each if each.isprintable() else " " if each in "\t\n\r" else ascii(each)[1:-1] for each in text)


def choices(options: Iterable[object]) -> str:
    """Say a list of options as people do: `1, 2, 3 or 4`."""
    words = [str(option) for option in options]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} or {words[-1]}"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return `did you mean 'x'?` for the known word nearest to this one, or None."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None
