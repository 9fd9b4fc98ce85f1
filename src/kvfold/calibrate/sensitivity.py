"""Sensitivity: the KL to the teacher of converting one site alone, or a few sites that share.

The method converts these sites. The teacher then runs with the new tensors in place of its own, and computes the same
as the student: a shared head is repeated for each head that it stands for, and a site without keys and values reads
those of its owner. Next-token distributions are compared on a sample of the calibration text:

    kl = mean_t sum_V p (log p - log q)       p: the teacher's, q: with these sites converted; nats per token

The hidden states before a converted site do not change, so only its layer and those above it run again. Answers are
kept in kvfold's cache folder as they come, whatever the budget for which they are requested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kvfold.calibrate import CalibrationSettings
from kvfold.calibrate.decoder import calibration_hash
from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.requests import Answers, ConvertedKL, FoldedKL
from kvfold.contracts.site import Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, read_json, write_json
from kvfold.errors import CheckpointError
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress, task
from kvfold.text.tokens import TokenFile

FORMAT = 2  # of the kept answers
LENGTH = 256  # tokens of a row
LOGITS_BYTES = 32 << 20  # of one batch's logits in float32

Question = FoldedKL | ConvertedKL


def measure(
    source: Checkpoint,
    method: Method[Any],
    config: Any,
    questions: Sequence[Question],
    answers: Answers,
    tokens: TokenFile,
    settings: CalibrationSettings = CalibrationSettings(),
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the questions by running the teacher, or from the cache folder. `answers` are those that `convert` needs.

    Memory: the whole teacher in float32, and two hidden states per token of the sample. Time: about half a pass over
    the sample for each question. Raises CheckpointError if a KL is not finite, OutputError if the cache cannot be
    written.
    """
    device = best_device()
    same = {repr(spelled(_common(method, config, each, source.shape))) for each in questions}
    sample = {"tokens": settings.sensitivity_tokens, "length": LENGTH}
    hashes = [source.hash(progress), calibration_hash(tokens, settings)]
    identity = [FORMAT, *hashes, sample, device, [type(config).__module__, *same]]
    path = cache_folder() / "sensitivity" / f"{fingerprint(identity)[:32]}.json"
    kept = read_json(path)
    sound = isinstance(kept, dict) and all(type(kl) is float and math.isfinite(kl) for kl in kept.values())
    known: dict[str, float] = kept if sound else {}
    asked: dict[int, list[Question]] = {}
    for each in sorted(questions, key=_order):
        if _key(each) not in known:
            asked.setdefault(_sites(each)[0].layer, []).append(each)
    if asked:
        rows_BT = _rows(tokens, min(LENGTH, source.known_length), settings.sensitivity_tokens)
        total = rows_BT.numel() * sum(map(len, asked.values()))
        with task(progress, "measuring sensitivity", total, "tokens"), torch.inference_mode():
            teacher = _Teacher(source, rows_BT, device)
            for layer, here in asked.items():
                converted = {each: _converted(source, method, config, each, answers) for each in here}
                for each, kl in teacher.compare(layer, converted, progress).items():
                    if not math.isfinite(kl):
                        raise CheckpointError("logits are not finite", where=source.path, got=each)
                    known[_key(each)] = max(0.0, kl)  # below 0 is rounding
                with disk_errors(path):
                    prepare_cache(path.parent)
                    write_json(path, known)
    return {each: {"kl": torch.tensor(known[_key(each)], dtype=torch.float64)} for each in questions}


# --- questions -----------------------------------------------------------------------------------------------------


def _sites(question: Question) -> tuple[Site, ...]:
    return (question.site,) if isinstance(question, FoldedKL) else question.sites


def _order(question: Question) -> tuple[tuple[Site, ...], int]:
    return _sites(question), -question.heads if isinstance(question, FoldedKL) else 0


def _key(question: Question) -> str:
    if isinstance(question, FoldedKL):
        return f"{question.site}, {question.heads} heads"
    return " with ".join(map(str, question.sites))


def _config(method: Method[Any], config: Any, question: Question, shape: Shape) -> Any:
    """The settings that convert these sites alone."""
    if isinstance(question, FoldedKL):
        return method.with_heads(config, question.heads)
    return method.alone(config, shape, question.sites)


def _common(method: Method[Any], config: Any, question: Question, shape: Shape) -> Any:
    """The settings that all questions of a kind share."""
    one = replace(question, heads=1) if isinstance(question, FoldedKL) else ConvertedKL(())
    return _config(method, config, one, shape)


def _rows(tokens: TokenFile, length: int, count: int) -> Tensor:
    """Rows `ids_BT`, about `count` tokens in all, spread evenly over a text."""
    length = min(length, len(tokens))
    rows = max(1, min(count, len(tokens)) // length)
    starts = [row * (len(tokens) - length) // max(1, rows - 1) for row in range(rows)]
    return torch.stack([torch.from_numpy(tokens.tokens[at : at + length].astype("int64")) for at in starts])


@dataclass(frozen=True)
class _Converted:
    """Converted sites: tensors by name in the teacher's shape, and modules that put out what another module did."""

    tensors: Mapping[str, Tensor]
    reads: Mapping[str, str]


def _converted(
    source: Checkpoint, method: Method[Any], config: Any, question: Question, answers: Answers
) -> _Converted:
    """Convert these sites alone, and repeat each shared head for the heads that read it."""
    alone, family = _config(method, config, question, source.shape), source.family
    group = {site: source.roles(site) for site in _sites(question)}
    student = method.student(alone, source.shape).shape
    found, reads = {}, {}
    for site, roles in method.convert(group, answers, alone).items():
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
    return _Converted(found, reads)


class _Teacher:
    """The teacher on a sample of text: hidden states before the current layer, and after the last, not normed."""

    def __init__(self, source: Checkpoint, rows_BT: Tensor, device: str) -> None:
        from kvfold import hf  # loads transformers, which answers from the cache do not need

        self.through, self.entering = hf.Through, hf.entering
        model: Any = hf.load_source(source, device=device)
        self.model, self.body = model, source.family.body
        self.shown = model.get_submodule(self.body.layers)
        self.layers, self.norm = list(self.shown), model.get_submodule(self.body.norm)
        rows = max(1, LOGITS_BYTES // (4 * rows_BT.shape[1] * source.shape.vocab_size))
        embed = model.get_input_embeddings()
        self._show(0, 0, nn.Identity())
        self.hidden = [self._states(embed(ids_BT.to(device))) for ids_BT in torch.split(rows_BT, rows)]
        self._show(0, len(self.layers), nn.Identity())
        self.final = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
        self.at = 0

    def compare(
        self, layer: int, converted: Mapping[Question, _Converted], progress: Progress
    ) -> dict[Question, float]:
        """KL to the teacher of converted sites from a layer on, in nats per token. Layers come in ascending order."""
        last = len(self.layers)
        if self.at < layer:
            self._show(self.at, layer, nn.Identity())
            self.hidden = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
            self.at = layer
        sums = dict.fromkeys(converted, 0.0)
        for hidden_BTD, final_BTD in zip(self.hidden, self.final, strict=True):
            self._show(last, last, self.norm)
            log_p_BTV = self._log_p(final_BTD)
            p_BTV = log_p_BTV.exp()
            self._show(layer, last, self.norm)
            for each, made in converted.items():
                log_q_BTV = self._log_p(hidden_BTD, made)
                sums[each] += float((p_BTV * (log_p_BTV - log_q_BTV)).sum(-1).double().sum())
                progress.advance(hidden_BTD.shape[0] * hidden_BTD.shape[1], f"layer {layer}")
        tokens = sum(hidden_BTD.shape[0] * hidden_BTD.shape[1] for hidden_BTD in self.hidden)
        return {each: total / tokens for each, total in sums.items()}

    def _show(self, first: int, end: int, norm: nn.Module) -> None:
        """Run the layers from `first` to before `end`, and pass hidden states through the others."""
        for number, layer in enumerate(self.layers):
            self.shown[number] = layer if first <= number < end else self.through()
        self.entered = self.shown[min(first, len(self.layers) - 1)]
        self.model.set_submodule(self.body.norm, norm)

    def _states(self, embedded_BTD: Tensor) -> Tensor:
        """The output of what is shown, without the head."""
        return cast(Tensor, self.model.base_model(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state)

    def _run(self, hidden_BTD: Tensor) -> Tensor:
        """The output of the shown layers, which hidden states enter."""
        with self.entering(self.entered, hidden_BTD):
            return self._states(hidden_BTD)

    def _log_p(self, hidden_BTD: Tensor, made: _Converted = _Converted({}, {})) -> Tensor:
        """The same as next-token distributions, with converted tensors in place of the teacher's."""
        tensors = {name: tensor.to(hidden_BTD) for name, tensor in made.tensors.items()}
        given = {"inputs_embeds": hidden_BTD, "use_cache": False}
        with self._sharing(made.reads), self.entering(self.entered, hidden_BTD):
            logits_BTV: Tensor = functional_call(self.model, tensors, (), given).logits
        return logits_BTV.log_softmax(-1)

    @contextmanager
    def _sharing(self, reads: Mapping[str, str]) -> Iterator[None]:
        """A context in which modules put out what another module did; keys are shared before rotation, too."""
        outputs: dict[str, Tensor] = {}
        handles = []
        for name, owner in reads.items():
            module, other = self.model.get_submodule(name), self.model.get_submodule(owner)
            handles += [
                other.register_forward_hook(lambda *seen, owner=owner: outputs.update({owner: seen[2]})),
                module.register_forward_hook(lambda *seen, owner=owner: outputs[owner]),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
