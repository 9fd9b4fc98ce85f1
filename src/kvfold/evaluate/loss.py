"""Loss, KL and agreement on held-out text, token by token, in windows.

With tokens `x_1 .. x_N`, student `q` and teacher `p`, each in the context of its window:

    loss      = - mean_t log q(x_t | context)        nats per token; perplexity = exp(loss)
    kl        = mean_t sum_V p (log p - log q)       KL(teacher || student), nats per token
    agreement = mean_t [argmax p = argmax q]
    bits per byte = sum_t loss_t / (ln 2 * bytes of the text): comparable between tokenizers

A window is `length` tokens; windows advance by `stride`. The first window counts in full, each later one only where no
earlier window counted: every token except the first counts once, with at least `length - stride` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvfold import ranks
from kvfold.progress import SILENT, Progress, task

Part = TypeVar("Part")

LOGITS_BYTES = 1 << 30  # of one model's logits: where a vocabulary is large, a batch runs in smaller parts
CHUNK_BYTES = 8 << 20  # of logits in fp32 while they are scored: about what a core's cache holds


def windows(tokens: int, length: int, stride: int) -> list[tuple[int, int]]:
    """`(begin, counted)` of each window over `tokens` predicted tokens: the last `counted` of a window count.

    All windows are of one length, `min(length, tokens)`: the last one begins earlier instead of being shorter.
    """
    length = min(length, tokens)
    made, covered = [(0, length)], length
    while covered < tokens:
        end = min(covered + stride, tokens)
        made.append((end - length, end - covered))
        covered = end
    return made


def score(
    models: Mapping[str, nn.Module],
    ids_N: Tensor,
    *,
    length: int,
    stride: int,
    batch_size: int,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Sums over each window, in float64, of its tokens' `token_scores`, and `tokens_W`, their number.

    `models` is a `student`, and a `teacher` where there is one. Logits are in memory for a part of a batch at a time,
    and in fp32 for a chunk of it.
    """
    student = models["student"]
    made = windows(len(ids_N) - 1, length, stride)
    length = min(length, len(ids_N) - 1)
    device, itemsize = next(student.parameters()).device, next(student.parameters()).element_size()
    vocabulary = int(student.config.vocab_size)  # type: ignore[union-attr,arg-type]
    rows = max(1, min(batch_size, LOGITS_BYTES // (length * vocabulary * itemsize)))

    def read(part: Sequence[tuple[int, int]]) -> Scored:
        begins_B, counted_B = (torch.tensor(each) for each in zip(*part, strict=True))
        ids_BT = ids_N[begins_B[:, None] + torch.arange(length + 1)].to(device)
        keep = int(counted_B.max())
        counts_BT = (torch.arange(keep) >= keep - counted_B[:, None]).to(device)
        logits = [model(ids_BT[:, :-1], use_cache=False).logits[:, -keep:] for model in models.values()]
        return [_pick(each, counts_BT) for each in logits], _pick(ids_BT[:, -keep:], counts_BT), counted_B.tolist()

    parts = [made[first : first + rows] for first in range(0, len(made), rows)]
    return collect(parts, read, [sum(counted for _, counted in part) for part in parts], progress)


def _pick(value_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """The tokens that count; without a copy where all do."""
    return value_BT.flatten(0, 1) if bool(counts_BT.all()) else value_BT[counts_BT]


Scored = tuple[list[Tensor], Tensor, list[int]]
"""Of a batch: the logits of each model, `logits_NV`, the tokens `targets_N`, and how many of them each row has."""


def collect(
    parts: Sequence[Part], read: Callable[[Part], Scored], tokens: Sequence[int], progress: Progress
) -> dict[str, Tensor]:
    """Sums over each row, in float64, of its tokens' `token_scores`, and `tokens_B`, their number.

    `parts` are batches for `read`, with `tokens` each, and every one is read by one rank.
    """

    def sums(part: Part) -> dict[str, Tensor]:
        logits, targets_N, counts = read(part)
        found = token_scores(*logits, targets_N=targets_N)
        found["tokens"] = torch.ones_like(found["student"])
        return {
            key: torch.stack([row.double().sum() for row in torch.split(value_N, counts)]).cpu()
            for key, value_N in found.items()
        }

    with task(progress, "loss", sum(tokens), "tokens"):
        found = ranks.each(parts, sums, progress=progress, amounts=tokens)
    return {key: torch.cat([part[key] for part in found]) for key in found[0]}


def token_scores(logits_NV: Tensor, teacher_NV: Tensor | None = None, *, targets_N: Tensor) -> dict[str, Tensor]:
    """Per token: `student_N` (loss in nats) and, with a teacher's logits, `teacher_N`, `kl_N` and `agreement_N`."""
    rows = max(1, CHUNK_BYTES // (4 * logits_NV.shape[-1]))
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, len(targets_N), rows):
        part = slice(first, first + rows)
        target_N1 = targets_N[part, None]
        log_q_NV = _log_softmax(logits_NV[part])
        found = {"student": -log_q_NV.gather(1, target_N1)[:, 0]}
        if teacher_NV is not None:
            log_p_NV = _log_softmax(teacher_NV[part])
            found["teacher"] = -log_p_NV.gather(1, target_N1)[:, 0]
            found["agreement"] = (log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).double()
            found["kl"] = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        for key, value_N in found.items():
            parts.setdefault(key, []).append(value_N)
    return {key: torch.cat(values) for key, values in parts.items()}


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return torch.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), -1)


def summary(scores: Mapping[str, Tensor], who: str, text_bytes: int) -> dict[str, Any]:
    """One model's loss with its standard error over windows, perplexity, and bits per byte of text."""
    mean, error = _mean(scores[who], scores["tokens"])
    found: dict[str, Any] = {"loss": mean, "loss_stderr": error, "perplexity": perplexity(mean)}
    if text_bytes:
        found["bits_per_byte"] = float(scores[who].sum()) / (math.log(2) * text_bytes)
    return found


def perplexity(nats: float) -> float:
    """`exp(nats)`, at most `exp(700)`, which a float still holds."""
    return math.exp(min(nats, 700.0))


def distance(scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """Student against teacher on the same tokens: `kl`, `agreement`, and the gap in loss with its paired error."""
    tokens = scores["tokens"]
    gap, error = _mean(scores["student"] - scores["teacher"], tokens)
    return {
        "loss_gap": gap,
        "loss_gap_stderr": error,
        "kl": _mean(scores["kl"], tokens)[0],
        "agreement": _mean(scores["agreement"], tokens)[0],
    }


def metrics(own: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """A record's metrics: the numbers of the student, and where there is a teacher, its own and the distance to it."""
    found = {"tokens": int(scores["tokens"].sum()), "windows": len(scores["tokens"]), **own["student"]}
    if "teacher" in own:
        found |= {"teacher_loss": own["teacher"]["loss"], **distance(scores), "teacher": own["teacher"]}
    return found


def _mean(sums_W: Tensor, tokens_W: Tensor) -> tuple[float, float | None]:
    """Mean per token, and its standard error with windows as the units (a ratio estimate); None for one window."""
    count, total = len(sums_W), float(tokens_W.sum())
    mean = float(sums_W.sum()) / total
    if count < 2:
        return mean, None
    spread = float(((sums_W - mean * tokens_W) ** 2).sum()) * count / (count - 1)
    return mean, math.sqrt(spread) / total
