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

    def texts(self) -> list[list[int]]:
        """The ids that `logits` belong to."""
        return [
            (prompt + answer)[: len(rows)]
            for prompt, answer, rows in zip(self.prompts, self.answers, self.logits, strict=True)
        ]


def reference(model: Any, *, vocab_size: int, prompt_tokens: int, new_tokens: int, prompts: int = 3) -> Reference:
    """Continue random prompts of `prompt_tokens` ids, the same each time, greedily with a transformers model.

    No token ends an answer: an engine that stops at its end token is compared up to there.
    """
    import torch

    ids_BT = torch.randint(vocab_size, (prompts, prompt_tokens), generator=torch.Generator().manual_seed(0))
    new_BT, rows, answer, cache = ids_BT, [], [], None
    paired = bool(model.config.is_encoder_decoder)
    with torch.no_grad():
        given: dict[str, Any] = {}
        if paired:
            given = {"encoder_outputs": model.get_encoder()(ids_BT)}
            new_BT = torch.full((prompts, 1), start_id(model.config))
        for _ in range(new_tokens):
            read = {"decoder_input_ids" if paired else "input_ids": new_BT}
            found = model(**given, **read, past_key_values=cache, use_cache=True)
            cache, new_BT = found.past_key_values, found.logits[:, -1:].argmax(-1)
            rows.append(found.logits.float())
            answer.append(new_BT)
    logits_BTV = torch.cat(rows, dim=1)
    return Reference(ids_BT.tolist(), torch.cat(answer, dim=1).tolist(), list(logits_BTV.numpy()), paired)


def compare(known: Reference, logits: Sequence[Logits], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Differences in logits, and how many greedy tokens are the same up to the first that is not.

    Logits of an encoder-decoder are compared up to the first token that differs. `near_ties` of `differing_answers`
    part where the two best logits are closer than twice the largest difference.
    """
    differences, values, margins = [], [], []
    same = total = 0
    for prompt, answer, rows, other_rows, other in zip(
        known.prompts, known.answers, known.logits, logits, answers, strict=True
    ):
        length = min(len(answer), len(other))
        parted = next((n for n in range(length) if answer[n] != other[n]), None)
        total += length
        same += length if parted is None else parted
        count = len(rows) if not known.paired else length if parted is None else parted + 1
        values.append(rows[:count])
        differences.append(other_rows[:count] - rows[:count])
        if parted is not None:
            best = np.sort(rows[parted + (0 if known.paired else len(prompt) - 1)])[-2:]
            margins.append(best[1] - best[0])
    difference, expected = np.concatenate(differences), np.concatenate(values)
    largest = float(np.abs(difference).max())
    return {
        "positions": len(expected),
        "max_difference": largest,
        "relative_difference": float(np.sqrt(np.mean(difference**2)) / expected.std()),
        "tokens": total,
        "same_tokens": same,
        "differing_answers": len(margins),
        "near_ties": sum(bool(margin <= 2 * largest) for margin in margins),
    }


def require(found: dict[str, Any], engine: str, weights: str, advice: str = "nothing was exported") -> None:
    """Raise UnsupportedModel unless the logits agree within the tolerance and every other token is a near tie."""
    tolerance = TOLERANCE[weights]
    wrong = None
    if not found["relative_difference"] <= tolerance:  # also when it is not a number
        wrong = f"logits differ by {found['relative_difference']:.3g} of their spread (tolerance {tolerance:g})"
    elif found["near_ties"] < found["differing_answers"]:
        wrong = f"{found['differing_answers'] - found['near_ties']} greedy answers differ where it is no near tie"
    if wrong:
        raise UnsupportedModel(f"{engine} disagrees with transformers: {wrong}", next=advice)
