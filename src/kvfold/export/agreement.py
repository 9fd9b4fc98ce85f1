"""The comparison of an engine with transformers: logits of given texts, and greedy tokens decoded with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import UnsupportedModel
from kvfold.text.pairs import start_id

Logits = NDArray[np.float32]
"""`(T, V)`; masked where an engine does not tell them."""

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2, "int8": 0.1}
"""Root mean square of the difference over the spread of the logits, by dtype of the stored weights.

llama.cpp also rounds activations to the dtype of the weights. A misplaced head costs about 1.
"""


@dataclass(frozen=True)
class Reference:
    """The answers of transformers in float32: prompts, greedy continuations, and the logits of every position.

    For an encoder-decoder (`paired`), the encoder reads the prompt, and positions are those of the answer.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Logits]  # (T, V) of prompt and answer without the last token
    paired: bool = False

    def before(self, number: int) -> int:
        """The position whose logits choose the first token of an answer."""
        return 0 if self.paired else len(self.prompts[number]) - 1

    def texts(self) -> list[list[int]]:
        """The ids that `logits` belong to."""
        return [
            (prompt + answer)[: len(rows)]
            for prompt, answer, rows in zip(self.prompts, self.answers, self.logits, strict=True)
        ]


def random_prompts(vocab_size: int, tokens: int, count: int = 3) -> list[list[int]]:
    """Prompts of random ids, the same each time."""
    import torch

    drawn: list[list[int]] = torch.randint(
        vocab_size, (count, tokens), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return drawn


def reference(model: Any, prompts: list[list[int]], *, new_tokens: int) -> Reference:
    """Continue prompts of one length greedily with a transformers model.

    No token ends an answer: an engine that stops at its end token is compared up to there.
    """
    import torch

    ids_BT = torch.tensor(prompts)
    new_BT, rows, answer, cache = ids_BT, [], [], None
    paired = bool(model.config.is_encoder_decoder)
    with torch.no_grad():
        given: dict[str, Any] = {}
        if paired:
            given = {"encoder_outputs": model.get_encoder()(ids_BT)}
            new_BT = torch.full((len(prompts), 1), start_id(model.config))
        for _ in range(new_tokens):
            read = {"decoder_input_ids" if paired else "input_ids": new_BT}
            found = model(**given, **read, past_key_values=cache, use_cache=True)
            cache, new_BT = found.past_key_values, found.logits[:, -1:].argmax(-1)
            rows.append(found.logits.float())
            answer.append(new_BT)
    logits_BTV = torch.cat(rows, dim=1)
    return Reference(prompts, torch.cat(answer, dim=1).tolist(), list(logits_BTV.numpy()), paired)


@dataclass(frozen=True)
class Parting:
    """The first token of an answer that differs, with transformers' logits of both tokens."""

    prompt: int
    step: int
    token: int
    other: int  # the engine's
    logit: float
    other_logit: float

    @property
    def margin(self) -> float:
        """How much transformers prefers its own token."""
        return self.logit - self.other_logit

    def near_tie(self, largest: float) -> bool:
        """Whether logits that differ by at most `largest` can change the order of the two tokens."""
        return self.margin <= 2 * largest


def partings(known: Reference, answers: Sequence[Sequence[int]]) -> list[Parting]:
    """The partings of the answers that differ, in the order of the prompts."""
    found = []
    for number, (answer, other) in enumerate(zip(known.answers, answers, strict=True)):
        step = next((n for n, (own, new) in enumerate(zip(answer, other, strict=False)) if own != new), None)
        if step is not None:
            row = known.logits[number][step + known.before(number)]
            tokens = answer[step], other[step]
            found.append(Parting(number, step, *tokens, *(float(row[token]) for token in tokens)))
    return found


def compare(known: Reference, logits: Sequence[Logits], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Differences in logits, and how many greedy tokens are the same up to the first that is not.

    Logits that an engine does not tell are masked. Those of an encoder-decoder are compared up to the first token that
    differs. `near_ties` of `differing_answers` part where transformers' logits of both tokens are closer than twice the
    largest difference.
    """
    parted = {each.prompt: each for each in partings(known, answers)}
    differences, values, positions, same, total = [], [], 0, 0, 0
    for number, (rows, other_rows) in enumerate(zip(known.logits, logits, strict=True)):
        length = min(len(known.answers[number]), len(answers[number]))
        agreed = parted[number].step if number in parted else length
        total, same = total + length, same + agreed
        count = len(rows) if not known.paired else agreed + (number in parted)
        difference = other_rows[:count] - rows[:count]
        positions += int((~np.ma.getmaskarray(difference)).any(axis=1).sum())
        values.append(rows[:count])
        differences.append(np.ma.compressed(difference))
    difference, expected = np.concatenate(differences), np.concatenate(values)
    largest = float(np.abs(difference).max())
    return {
        "positions": positions,
        "max_difference": largest,
        "relative_difference": float(np.sqrt(np.mean(difference**2)) / expected.std()),
        "tokens": total,
        "same_tokens": same,
        "differing_answers": len(parted),
        "near_ties": sum(each.near_tie(largest) for each in parted.values()),
    }


def disagreement(found: dict[str, Any], tolerance: float) -> str | None:
    """Why these differences are no agreement: logits beyond the tolerance, or another token that is no near tie."""
    if not found["relative_difference"] <= tolerance:  # also when it is not a number
        return f"logits differ by {found['relative_difference']:.3g} of their spread (tolerance {tolerance:g})"
    if found["near_ties"] < found["differing_answers"]:
        return f"{found['differing_answers'] - found['near_ties']} greedy answers differ where it is no near tie"
    return None


def require(found: dict[str, Any], engine: str, weights: str, advice: str = "nothing was exported") -> None:
    """Raise UnsupportedModel unless the logits agree within the tolerance and every other token is a near tie."""
    wrong = disagreement(found, TOLERANCE[weights])
    if wrong:
        raise UnsupportedModel(f"{engine} disagrees with transformers: {wrong}", next=advice)
