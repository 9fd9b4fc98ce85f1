"""Sensitivity: what it costs to convert one site alone, a few that share, or all alike, and to lose one head.

The method converts these sites. The teacher then runs with the new tensors in place of its own, and computes the same
as the student: a shared head is repeated for each head that it stands for, and a site without keys and values reads
those of its owner. Next-token distributions are compared on a sample of the calibration text:

    kl = mean_t sum_V p (log p - log q)       p: the teacher's, q: with these sites converted; nats per token

The mean over ordinary text hardly sees copying, which few heads do. So a second sample is rows whose last tokens repeat
the first ones (`kvfold.calibrate.recall`). On it, the rise of the loss of the repetition is a second cost of converted
sites. What the query heads that read one key/value head are worth is measured without them, on either sample: their
outputs are replaced by their means over a row (zeros would take a bias away too).

The hidden states before a changed site do not change, so only its layer and those above it run again; of an
encoder-decoder, those of the decoder, on inputs and targets. Answers are
kept in kvfold's cache folder as they come, whatever the budget for which they are requested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from kvfold import ranks
from kvfold.calibrate import CalibrationSettings
from kvfold.calibrate.decoder import calibration_hash
from kvfold.calibrate.encoder_decoder import batches_of
from kvfold.calibrate.recall import copied_loss, copies
from kvfold.calibrate.resumed import Changed, Resumed, ResumedPairs
from kvfold.calibrate.statistics import SEED
from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.requests import (
    COPIED,
    Ablated,
    AblatedKL,
    AblatedRecall,
    Alone,
    Answers,
    ConvertedKL,
    CrossGram,
    Folded,
    FoldedKL,
    FoldedRecall,
    HeadKL,
    Question,
    UniformKL,
)
from kvfold.contracts.site import Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, read_json, write_json
from kvfold.errors import CheckpointError
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress, task
from kvfold.settings import MOST
from kvfold.text.copies import SPAN
from kvfold.text.pairs import Corpus, Row
from kvfold.text.tokens import TokenFile

FORMAT = 4  # of the kept answers
LENGTH = 256  # tokens of a row
COPY_LENGTH = 96  # tokens of a row whose end repeats its beginning
HEAD_TOKENS = 2048  # of the text on which the KL without a head is measured
LOGITS_BYTES = 32 << 20  # of one batch's logits in float32


def measure(
    source: Checkpoint,
    method: Method[Any],
    config: Any,
    questions: Sequence[Alone],
    answers: Answers,
    tokens: TokenFile | Corpus,
    settings: CalibrationSettings = CalibrationSettings(),
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the questions by running the teacher, or from the cache folder. `answers` are those that `convert` needs.

    Memory: the whole teacher in float32, and two hidden states per token of the sample. Time: about half a pass over
    the sample for each question. Raises CheckpointError if an answer is not finite, DataError if the text is too short
    to repeat a part of it, OutputError if the cache cannot be written.
    """
    found: dict[Question, dict[str, Tensor]] = {}
    for kind in KINDS:
        here = [each for each in questions if isinstance(each, kind.asks)]
        if here:
            work = _Measurement(source, method, config, kind, {**answers, **found})
            numbers = work.answers(here, tokens, settings, progress)
            found |= {each: {kind.name: torch.tensor(numbers[_key(each)], dtype=torch.float64)} for each in here}
    return found


@dataclass(frozen=True)
class _Measurement:
    """The questions of one kind, under the settings that convert."""

    source: Checkpoint
    method: Method[Any]
    config: Any
    kind: _Kind
    given: Answers

    def answers(
        self, questions: Sequence[Alone], tokens: TokenFile | Corpus, settings: CalibrationSettings, progress: Progress
    ) -> Mapping[str, float]:
        """The answers by the key of each question, and those that were measured before."""
        device, sample = best_device(), self.sample(tokens, settings)
        path = cache_folder() / "sensitivity" / f"{self._identity(questions, tokens, settings, sample, device)}.json"
        kept = read_json(path)
        sound = isinstance(kept, dict) and all(type(cost) is float and math.isfinite(cost) for cost in kept.values())
        known: dict[str, float] = kept if sound else {}
        asked: dict[int, list[Alone]] = {}
        for each in sorted(questions, key=_order):
            if _key(each) not in known:
                asked.setdefault(each.sites[0].layer, []).append(each)
        if asked:
            known = ranks.everywhere(_measure, self, asked, tokens, settings, known, path, progress=progress)
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Pickle it without the answers, which may be gigabytes: other ranks get those of a layer at a time."""
        return {**vars(self), "given": {}}

    def _identity(
        self,
        questions: Sequence[Alone],
        tokens: TokenFile | Corpus,
        settings: CalibrationSettings,
        sample: _Sample,
        device: str,
    ) -> str:
        common = (_common(self.method, self.config, each, self.source.shape) for each in questions)
        same = {repr(spelled(config)) for config in common if config is not None}
        text = [calibration_hash(tokens, settings), sample.listed]
        how = [type(self.config).__module__, *same, self.kind.name]
        return fingerprint([FORMAT, self.source.hash(), text, device, how])[:32]

    def costs(
        self, teacher: Resumed | ResumedPairs, layer: int, questions: Sequence[Alone], progress: Progress
    ) -> Mapping[str, float]:
        """The mean cost per token of changes from a layer on, by the key of each question; all ranks' batches."""
        sites = {site for each in questions for site in each.sites}
        given = ranks.broadcast_object({each: self.given[each] for each in self.given if sites & _sites(each)})
        changes = {each: _changed(self.source, self.method, self.config, each, given) for each in questions}
        sums = dict.fromkeys(questions, 0.0)
        teacher.advance(layer)
        for batch, ids_BT in enumerate(teacher.ids):
            cost = self.kind.cost(teacher.own(batch, self.kind.last), ids_BT)
            for each, change in changes.items():
                sums[each] += cost(teacher.changed(batch, change, self.kind.last)) * ids_BT.numel()
                progress.advance(ids_BT.numel() * ranks.current().world, f"layer {layer}")
        of_ranks = ranks.gather_in_order((sum(map(Tensor.numel, teacher.ids)), sums))
        read, costs = sum(count for count, _ in of_ranks), {}
        for each in questions:
            costs[_key(each)] = sum(part[each] for _, part in of_ranks) / read
            if not math.isfinite(costs[_key(each)]):
                raise CheckpointError("logits are not finite", where=self.source.path, got=each)
        return costs

    def sample(self, tokens: TokenFile | Corpus, settings: CalibrationSettings) -> _Sample:
        """The rows of a text on which these questions are answered, in batches whose logits fit into memory.

        A model runs on this rank's batches.
        """
        this = ranks.current()
        longest, most = self.source.known_length, LOGITS_BYTES // (4 * self.source.shape.vocab_size)
        if isinstance(tokens, TokenFile):
            rows_BT = self.kind.rows(tokens, longest, settings)
            batches = torch.split(rows_BT, max(1, most // rows_BT.shape[1]))[this.rank :: this.world]
            return _Sample(rows_BT.tolist(), rows_BT.numel(), lambda *where: Resumed(where[0], batches, where[1]))
        pairs = _spread_pairs(tokens, longest, settings)
        ids = [target.tolist() for _, target in pairs]
        batched = list(islice(batches_of(pairs, most), this.rank, None, this.world))
        return _Sample(ids, sum(map(len, ids)), lambda *where: ResumedPairs(where[0], batched, where[1]))


def _measure(
    work: _Measurement,
    asked: Mapping[int, Sequence[Alone]],
    tokens: TokenFile | Corpus,
    settings: CalibrationSettings,
    known: dict[str, float],
    path: Path,
    *,
    progress: Progress,
) -> dict[str, float]:
    """The answers to the questions of each layer beside the `known` ones, on all ranks; rank 0 keeps them in a file."""
    sample = work.sample(tokens, settings)
    total = sample.tokens * sum(map(len, asked.values()))
    with (
        task(progress, "measuring sensitivity", total, "tokens"),
        torch.inference_mode(),
        sample.resumed(work.source, best_device()) as teacher,
    ):
        for layer, here in asked.items():
            known |= work.costs(teacher, layer, here, progress)
            if ranks.current().main:
                with disk_errors(path):
                    prepare_cache(path.parent)
                    write_json(path, known)
    return known


# --- questions -----------------------------------------------------------------------------------------------------


def _order(question: Alone) -> tuple[tuple[Site, ...], int]:
    return question.sites, -question.heads if isinstance(question, Folded) else 0


def _key(question: Alone) -> str:
    if isinstance(question, Ablated):
        return f"{question.site}, head {question.head}"
    if isinstance(question, ConvertedKL):
        return " with ".join(map(str, question.sites))
    if isinstance(question, UniformKL):
        return f"{len(question.sites)} sites, {question.heads} heads"
    return f"{question.site}, {question.heads} heads"


def _sites(question: Question) -> set[Site]:
    """The sites that a question is about."""
    if isinstance(question, CrossGram):
        return {question.first, question.second}
    return set(question.sites) if isinstance(question, ConvertedKL | UniformKL) else {question.site}


def _config(method: Method[Any], config: Any, question: Alone, shape: Shape) -> Any:
    """The settings that convert these sites alone."""
    if isinstance(question, Folded):
        return method.with_heads(config, question.heads)
    return method.alone(config, shape, question.sites)


def _common(method: Method[Any], config: Any, question: Alone, shape: Shape) -> Any:
    """The settings that all questions of a kind share; None for the ablation of a head, which nothing converts."""
    if isinstance(question, Ablated):
        return None
    one = replace(question, heads=1) if isinstance(question, Folded) else ConvertedKL(())
    return _config(method, config, one, shape)


def _changed(source: Checkpoint, method: Method[Any], config: Any, question: Alone, answers: Answers) -> Changed:
    """These sites converted alone, each shared head repeated for the heads that read it; or a head without readers."""
    family = source.family
    if isinstance(question, Ablated):
        attention = source.shape.sites[question.site]
        width = attention.query_group * attention.head_dim
        columns = slice(question.head * width, (question.head + 1) * width)
        return Changed(averaged={family.tensor(question.site, "o").removesuffix(".weight"): columns})
    alone = _config(method, config, question, source.shape)
    student = method.student(alone, source.shape).shape
    removed = {site for site in question.sites if site not in student.sites}
    group = {site: source.roles(site) for site in question.sites if site not in removed}
    found, reads = {}, {}
    for site, roles in method.convert(group, answers, alone).items() if group else ():
        before, after = source.shape.sites[site], student.sites[site]
        whole = dict(roles)
        for role, tensor in roles.items():
            if role[0] in "kv" and len(tensor) < before.roles()[role][0]:  # shared by several heads
                heads = tensor.shape[0] // before.head_dim
                blocks = tensor.view(heads, before.head_dim, *tensor.shape[1:])
                whole[role] = blocks.repeat_interleave(before.num_key_value_heads // heads, 0).flatten(0, 1)
        for name, held in family.stored(site, before).items():
            if held[0] in whole:
                found[name] = family.joined(before, {role: whole[role] for role in held}).float()
        if after.source is not None:
            owner = Site(after.source, site.kind)
            for role in {"k", "v", "k_norm"} & before.roles().keys():
                mine, theirs = (family.tensor(each, role).removesuffix(".weight") for each in (site, owner))
                reads[mine] = theirs
    return Changed(found, reads, removed=removed)


# --- samples, and what a change costs on them -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Rows of a text: their ids, which identify it, the number of these, and the teacher on them."""

    listed: Sequence[Sequence[int]]
    tokens: int
    resumed: Callable[[Checkpoint, str], Resumed | ResumedPairs]


Cost = Callable[[Tensor], float]


def spread(tokens: TokenFile, longest: int, settings: CalibrationSettings, most: int = MOST) -> Tensor:
    """Rows `ids_BT` of a text, spread evenly: about `sensitivity_tokens` tokens in all, and at most `most`."""
    length = min(LENGTH, longest, len(tokens))
    rows = max(1, min(settings.sensitivity_tokens, most, len(tokens)) // length)
    starts = [row * (len(tokens) - length) // max(1, rows - 1) for row in range(rows)]
    return torch.stack([torch.from_numpy(tokens.tokens[at : at + length].astype("int64")) for at in starts])


def _spread_pairs(tokens: Corpus, longest: int, settings: CalibrationSettings) -> list[Row]:
    """Inputs and targets with about `sensitivity_tokens` tokens of targets, spread evenly over a text, by length."""
    rows = list(tokens.rows(min(LENGTH, longest), SEED))
    count = max(1, round(len(rows) * min(1, settings.sensitivity_tokens / sum(len(target) for _, target in rows))))
    chosen = [rows[number * (len(rows) - 1) // max(1, count - 1)] for number in range(count)]
    return sorted(chosen, key=lambda row: (len(row[0]), len(row[1])))


def _copied(tokens: TokenFile, longest: int, settings: CalibrationSettings, *, count: int) -> Tensor:
    return copies(tokens, min(COPY_LENGTH, longest), count)


def _kl(own_BTV: Tensor, ids_BT: Tensor) -> Cost:
    """The mean KL to the teacher, in nats per token; below 0 is rounding."""
    log_p_BTV = own_BTV.log_softmax(-1)
    p_BTV = log_p_BTV.exp()

    def cost(logits_BTV: Tensor) -> float:
        log_q_BTV = logits_BTV.log_softmax(-1)
        return float((p_BTV * (log_p_BTV - log_q_BTV)).sum(-1).double().mean().clamp_min(0))

    return cost


def _rise(own_BTV: Tensor, ids_BT: Tensor) -> Cost:
    """The rise of the mean loss of the repetition over the teacher's, in nats per token."""
    whole = copied_loss(own_BTV, ids_BT)
    return lambda logits_BTV: copied_loss(logits_BTV, ids_BT) - whole


@dataclass(frozen=True)
class _Kind:
    """Questions that are answered on one sample by one cost, and the name of their answer."""

    asks: type | UnionType
    name: str
    rows: Callable[[TokenFile, int, CalibrationSettings], Tensor]
    cost: Callable[[Tensor, Tensor], Cost]  # of the teacher's logits and the ids
    last: int = 0  # tokens of a row that it looks at; 0: all


KINDS = (  # in this order, because folds may be weighed by the KL of their heads
    _Kind(HeadKL, "kl", partial(_copied, count=COPIED[HeadKL]), _kl),
    _Kind(FoldedRecall, "rise", partial(_copied, count=COPIED[FoldedRecall]), _rise, SPAN),
    _Kind(FoldedKL | ConvertedKL | UniformKL, "kl", spread, _kl),
    _Kind(AblatedKL, "kl", partial(spread, most=HEAD_TOKENS), _kl),
    _Kind(AblatedRecall, "rise", partial(_copied, count=COPIED[AblatedRecall]), _rise, SPAN),
)
