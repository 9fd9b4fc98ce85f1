"""Recall, which the mean loss hides: copying over a distance, last words, and passkeys.

- **Copy loss**: the loss on the second occurrence of a random span of tokens (the repeated random tokens of Olsson et
  al. 2022, arXiv 2209.11895). Only recall lowers it, in models of any size.
- **Last word**: greedy accuracy on the last word of a passage that contains the word before, as in LAMBADA (Paperno et
  al. 2016, arXiv 1606.06031). The passages come from the user's own held-out text.
- **Passkey** (Mohtashami and Jaggi 2023, arXiv 2305.16300): a number that is hidden in a long text. Small models fail.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import ranks
from kvfold.errors import DataError, SettingError
from kvfold.evaluate.loss import perplexity
from kvfold.evaluate.samples import decode
from kvfold.evaluate.settings import EvaluateSettings
from kvfold.progress import SILENT, Progress, task
from kvfold.text.copies import SPAN, copy_rows

PASSAGE = 128  # tokens of a passage with its last word: LAMBADA's have about 100

HIDDEN = "There is a pass key hidden in this text. Find it and remember it.\n"
NEEDLE = ("\nThe pass key is", ". Remember it.\n")
QUESTION = "\nWhat is the pass key? The pass key is"

_WORD = re.compile(r"[^\W\d_]{2,}")
_LAST = re.compile(r" ([^\W\d_]{2,})(?=[.!?,;:])")  # of a clause


@dataclass(frozen=True)
class Questions:
    """Rows of one length: `ids_BT`, of which the last `answers[b]` tokens are the answer."""

    ids_BT: Tensor
    answers: Sequence[int]


def last_words(tokenizer: Any, ids_N: Tensor, *, count: int, length: int) -> Questions | None:
    """At most `count` passages of `length` tokens that end in a word which they contain before; None without any.

    Words end a clause, follow a space, and are not among the most frequent words that together make up half of the
    text: those are guessed without recall. The passages are spread evenly over all that qualify, without a seed.
    """
    text = decode(tokenizer, ids_N)
    if not tokenizer.is_fast:  # only those of the library `tokenizers` give the characters of a token
        return None
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins, ends = ([offset[side] for offset in read["offset_mapping"]] for side in (0, 1))
    rare, rows, answers = _rare(text), [], []
    for found in _LAST.finditer(text):
        begin, end = found.span(1)
        first, behind = bisect_right(ends, begin), bisect_left(begins, end)
        whole = first < behind and begins[first] >= begin - 1 and ends[behind - 1] == end
        if not whole or found[1] not in rare or not behind - first < length <= behind:
            continue
        if found[1] in _WORD.findall(text, begins[behind - length], begin):
            rows.append(read["input_ids"][behind - length : behind])
            answers.append(behind - first)
    if not rows:
        return None
    chosen = torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long().tolist()
    return Questions(torch.tensor([rows[at] for at in chosen]), [answers[at] for at in chosen])


def _rare(text: str) -> set[str]:
    """The words of a text without the most frequent ones, which together make up half of it."""
    counts = Counter(_WORD.findall(text)).most_common()
    total = sum(count for _, count in counts)
    before = accumulate((count for _, count in counts), initial=0)
    return {word for (word, _), covered in zip(counts, before, strict=False) if covered >= total / 2}


def passkeys(tokenizer: Any, ids_N: Tensor, context: int, *, trials: int, seed: int) -> Questions:
    """Texts of `context` tokens that hide a five-digit number, at evenly spread depths, and end with it.

    The filler is held-out text; the number at the end follows a question. Raises SettingError when the context is too
    short for the question, DataError when the text is too short for the context.
    """
    opening, before, after, question = (_encode(tokenizer, text) for text in (HIDDEN, *NEEDLE, QUESTION))
    generator = torch.Generator().manual_seed(seed)
    depths = ((torch.randperm(trials, generator=generator) + 0.5) / trials).tolist()
    rows, answers = [], []
    for depth in depths:
        key = _encode(tokenizer, f" {int(torch.randint(10_000, 100_000, (1,), generator=generator))}")
        room = context - len(opening) - len(before) - 2 * len(key) - len(after) - len(question)
        if room < 1:
            raise SettingError(
                "the context is too short for the question",
                where="passkey_contexts",
                got=context,
                allowed=f"at least {context - room + 1} tokens",
            )
        if room > len(ids_N):
            raise DataError(
                "the held-out text is too short to fill a passkey context",
                got=f"{len(ids_N):,} tokens",
                allowed=f"at least {room:,}",
            )
        start, split = int(torch.randint(len(ids_N) - room + 1, (1,), generator=generator)), round(depth * room)
        filler = ids_N[start : start + room].tolist()
        rows.append([*opening, *filler[:split], *before, *key, *after, *filler[split:], *question, *key])
        answers.append(len(key))
    return Questions(torch.tensor(rows), answers)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Recall:
    """The rows of every test. They are made before a model is loaded, so that a text that is too short fails early."""

    copies: Mapping[int, Tensor]  # ids_BT by distance
    passkeys: Mapping[int, Questions]  # by context
    last_words: Questions | None

    @classmethod
    def of(cls, tokenizer: Any, ids_N: Tensor, settings: EvaluateSettings) -> Recall:
        """Make the rows. Raises what `copy_rows` and `passkeys` raise."""
        special, seed = tokenizer.all_special_ids, settings.seed
        length = min(PASSAGE, settings.sequence_length or PASSAGE)
        return cls(
            {
                distance: copy_rows(ids_N, distance, trials=settings.copy_trials, seed=seed, special=special)
                for distance in settings.copy_distances
            },
            {
                context: passkeys(tokenizer, ids_N, context, trials=settings.passkey_trials, seed=seed)
                for context in settings.passkey_contexts
            },
            last_words(tokenizer, ids_N, count=settings.last_words, length=length) if settings.last_words else None,
        )

    def measure(self, model: nn.Module, *, batch_size: int, what: str, progress: Progress = SILENT) -> dict[str, Any]:
        """Copy losses by distance, passkeys by context, and last words, as a record names them."""
        rows = [*self.copies.values(), *(each.ids_BT for each in self.passkeys.values())]
        rows += [] if self.last_words is None else [self.last_words.ids_BT]
        found: dict[str, Any] = {}
        with task(progress, what, sum(rows_BT.numel() for rows_BT in rows), "tokens"):
            for distance, rows_BT in self.copies.items():
                first, second = copy_loss(model, rows_BT, batch_size=batch_size, progress=progress)
                found["copy_loss_first"] = first  # the same at every distance: nothing is before the first span
                found.setdefault("copy_loss", {})[str(distance)] = second
                found.setdefault("copy_gain", {})[str(distance)] = first - second
            for context, questions in self.passkeys.items():
                right_B, loss_B = answer(model, questions, batch_size=batch_size, progress=progress)
                found.setdefault("passkey", {})[str(context)] = float(right_B.mean())
                found.setdefault("passkey_loss", {})[str(context)] = float(loss_B.sum()) / sum(questions.answers)
            if self.last_words is not None:
                found |= last_word(*answer(model, self.last_words, batch_size=batch_size, progress=progress))
        return found


def copy_loss(
    model: nn.Module, rows_BT: Tensor, *, batch_size: int, progress: Progress = SILENT
) -> tuple[float, float]:
    """Mean loss in nats on the first and on the second span of rows made by `copy_rows`.

    The first token of a span does not count: nothing predicts it.
    """
    first_BT, _ = _ends(model, rows_BT[:, :SPAN], SPAN - 1, batch_size, SILENT)
    second_BT, _ = _ends(model, rows_BT, SPAN - 1, batch_size, progress)
    return float(first_BT.mean()), float(second_BT.mean())


def answer(
    model: nn.Module, questions: Questions, *, batch_size: int, progress: Progress = SILENT
) -> tuple[Tensor, Tensor]:
    """Whether greedy decoding gives each answer whole, 1.0 or 0.0, and the loss of the answer in nats: `(B,)` each.

    Greedy decoding gives an answer if each of its tokens is the most likely one after those before it, so one pass
    over the row, answer included, is enough.
    """
    longest = max(questions.answers)
    loss_BT, right_BT = _ends(model, questions.ids_BT, longest, batch_size, progress)
    counts_BT = torch.arange(longest) >= longest - torch.tensor(questions.answers)[:, None]
    return (right_BT | ~counts_BT).all(1).double(), (loss_BT * counts_BT).sum(1)


def last_word(right_B: Tensor, loss_B: Tensor) -> dict[str, Any]:
    """Accuracy with its standard error, and perplexity per word, both as lm-eval's `lambada` defines them."""
    count = len(right_B)
    return {
        "last_word": float(right_B.mean()),
        "last_word_stderr": float(right_B.std()) / math.sqrt(count) if count > 1 else None,
        "last_word_perplexity": perplexity(float(loss_B.mean())),
        "last_word_questions": count,
    }


def _ends(model: nn.Module, rows_BT: Tensor, count: int, batch_size: int, progress: Progress) -> tuple[Tensor, Tensor]:
    """Loss in nats of the last `count` tokens of each row, and whether each token is the likeliest: `(B, count)`."""

    def read(ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        targets_BT = ids_BT[:, -count:]
        kept = model(ids_BT.to(next(model.parameters()).device), use_cache=False, logits_to_keep=count + 1)
        logits_BTV = kept.logits[:, :-1].float().cpu()
        flat = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return flat.view_as(targets_BT).double(), logits_BTV.argmax(-1) == targets_BT

    parts = torch.split(rows_BT, batch_size)
    found = ranks.each(parts, read, progress=progress, amounts=[ids_BT.numel() for ids_BT in parts])
    losses, right = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(right)
