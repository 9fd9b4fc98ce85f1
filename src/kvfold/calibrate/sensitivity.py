"""Sensitivity: what converting one site alone costs, or a few that share, as KL to the teacher.

For each site the method makes its tensors under the moments that calibration found. The teacher runs with these in
place of its own (a shared head written out for each head that it stands for, consumers given what their owner makes,
which computes the same), and next-token distributions are compared over a sample of the calibration text:

    kl = mean_t sum_V p (log p - log q)       p: the teacher's, q: with one site folded; nats per token

Layers below the folded one hear nothing of it: hidden states before it are kept, and only layers from it on run again.
Answers are kept in kvfold's cache folder as they come, whatever the budget that they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kvfold.calibrate.decoder import calibration_hash
from kvfold.contracts.method import Method
from kvfold.contracts.per_layer import spelled
from kvfold.contracts.requests import Answers, ConvertedKL, FoldedKL
from kvfold.contracts.site import Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import known_length
from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, read_json, write_json
from kvfold.errors import CheckpointError
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.text.tokens import TokenFile

FORMAT = 2  # of the kept answers
LOGITS_BYTES = 32 << 20  # of one batch's logits in float32


@dataclass(frozen=True)
class SensitivitySettings:
    """How much of the calibration text is read again for each choice."""

    tokens: int = field(default=8192, metadata={"help": "Tokens, in rows spread evenly over the calibration text."})
    length: int = field(default=256, metadata={"help": "Tokens of a row; each row is read from its own beginning."})


def measure(
    source: Checkpoint,
    method: Method[Any],
    config: Any,
    questions: Sequence[FoldedKL | ConvertedKL],
    answers: Answers,
    tokens: TokenFile,
    settings: SensitivitySettings = SensitivitySettings(),
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the questions by reading, or from the cache folder; `answers` are those that `method.convert` needs.

    The whole teacher is in memory, in float32, and of the text two hidden states a token. Cost: for each question about
    half a pass over the sample. Raises CheckpointError when a KL is not finite, OutputError when the disk refuses.
    """
    device = best_device()
    same = [
        type(config).__module__,
        *({repr(spelled(_least(method, config, each, source.shape))) for each in questions}),
    ]
    identity = [FORMAT, source.hash(progress), calibration_hash(tokens), asdict(settings), device, same]
    path = cache_folder() / "sensitivity" / f"{fingerprint(identity)[:32]}.json"
    kept = read_json(path)
    sound = isinstance(kept, dict) and all(type(kl) is float and math.isfinite(kl) for kl in kept.values())
    known: dict[str, float] = kept if sound else {}
    asked: dict[int, list[Alone]] = {}
    for each in sorted(questions, key=_order):
        if _key(each) not in known:
            asked.setdefault(_sites(each)[0].layer, []).append(each)
    if asked:
        rows_BT = _rows(tokens, min(settings.length, known_length(source)), settings.tokens)
        progress.start("measuring sensitivity", rows_BT.numel() * sum(map(len, asked.values())), "tokens")
        try:
            with torch.inference_mode():
                reading = _Reading(source, rows_BT, device)
                for layer, here in asked.items():
                    folded = {each: _folded(source, method, config, each, answers) for each in here}
                    for each, kl in reading.compare(layer, folded, progress).items():
                        if not math.isfinite(kl):
                            raise CheckpointError("logits are not finite", where=source.path, got=each)
                        known[_key(each)] = max(0.0, kl)  # below 0 is rounding
                    with disk_errors(path):
                        prepare_cache(path.parent)
                        write_json(path, known)
        finally:
            progress.stop()
    return {each: {"kl": torch.tensor(known[_key(each)], dtype=torch.float64)} for each in questions}


# --- what is asked -------------------------------------------------------------------------------------------------

Alone = FoldedKL | ConvertedKL


def _sites(question: Alone) -> tuple[Site, ...]:
    return (question.site,) if isinstance(question, FoldedKL) else question.sites


def _order(question: Alone) -> tuple[tuple[Site, ...], int]:
    return _sites(question), -question.heads if isinstance(question, FoldedKL) else 0


def _key(question: Alone) -> str:
    if isinstance(question, FoldedKL):
        return f"{question.site}, {question.heads} heads"
    return " with ".join(map(str, question.sites))


def _config(method: Method[Any], config: Any, question: Alone, shape: Shape) -> Any:
    """The settings under which these sites alone are converted."""
    if isinstance(question, FoldedKL):
        return method.with_heads(config, question.heads)
    return method.alone(config, shape, question.sites)


def _least(method: Method[Any], config: Any, question: Alone, shape: Shape) -> Any:
    """What all questions of a kind have in common."""
    one = replace(question, heads=1) if isinstance(question, FoldedKL) else ConvertedKL(())
    return _config(method, config, one, shape)


def _rows(tokens: TokenFile, length: int, count: int) -> Tensor:
    """Rows `ids_BT` spread evenly over a text, about `count` tokens of it."""
    length = min(length, len(tokens))
    rows = max(1, min(count, len(tokens)) // length)
    starts = [row * (len(tokens) - length) // max(1, rows - 1) for row in range(rows)]
    return torch.stack([torch.from_numpy(tokens.tokens[at : at + length].astype("int64")) for at in starts])


@dataclass(frozen=True)
class _Folded:
    """What a method makes of some sites: tensors by name in the teacher's shape, and consumers' modules by owners'."""

    tensors: Mapping[str, Tensor]
    reads: Mapping[str, str]


def _folded(source: Checkpoint, method: Method[Any], config: Any, question: Alone, answers: Answers) -> _Folded:
    """Convert these sites alone: each shared head is written out as often as it is read."""
    alone, name = _config(method, config, question, source.shape), source.family.tensor
    group = {site: source.roles(site) for site in _sites(question)}
    student = method.student(alone, source.shape).shape
    found, reads = {}, {}
    for site, roles in method.convert(group, answers, alone).items():
        before, after = source.shape.sites[site], student.sites[site]
        for role, tensor in roles.items():
            if role[0] in "kv" and len(tensor) < before.roles()[role][0]:  # shared by several heads
                heads = tensor.shape[0] // before.head_dim
                blocks = tensor.view(heads, before.head_dim, *tensor.shape[1:])
                tensor = blocks.repeat_interleave(before.num_key_value_heads // heads, 0).flatten(0, 1)
            found[name(site, role)] = tensor.float()
        if after.source is not None:
            owner = Site(after.source, site.kind)
            for role in {"k", "v", "k_norm"} & before.roles().keys():
                reads[name(site, role).removesuffix(".weight")] = name(owner, role).removesuffix(".weight")
    return _Folded(found, reads)


class _Reading:
    """The teacher over a sample of text: hidden states before the layer at hand, and behind the last."""

    def __init__(self, source: Checkpoint, rows_BT: Tensor, device: str) -> None:
        from kvfold import hf  # loads transformers: what is kept is answered without it

        self.through = hf.Through
        model: Any = hf.load(source.path, device=device)
        self.base, self.head, self.body = model.base_model, model.get_output_embeddings(), source.family.body
        self.prefix = f"{model.base_model_prefix}."
        self.shown = model.get_submodule(self.body.layers)
        self.layers, self.norm = list(self.shown), model.get_submodule(self.body.norm)
        rows = max(1, LOGITS_BYTES // (4 * rows_BT.shape[1] * source.shape.vocab_size))
        self.hidden = [model.get_input_embeddings()(ids_BT.to(device)) for ids_BT in torch.split(rows_BT, rows)]
        self.final = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
        self.at = 0

    def compare(self, layer: int, folded: Mapping[Alone, _Folded], progress: Progress) -> dict[Alone, float]:
        """KL to the teacher of what was made of sites from a layer on, in nats per token; layers are asked in order."""
        if self.at < layer:
            self._show(self.at, layer, nn.Identity())
            self.hidden = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
            self.at = layer
        self._show(layer, len(self.layers), self.norm)
        sums = dict.fromkeys(folded, 0.0)
        for hidden_BTD, final_BTD in zip(self.hidden, self.final, strict=True):
            log_p_BTV = self.head(final_BTD).log_softmax(-1)
            p_BTV = log_p_BTV.exp()
            for each, made in folded.items():
                log_q_BTV = self.head(self._run(hidden_BTD, made)).log_softmax(-1)
                sums[each] += float((p_BTV * (log_p_BTV - log_q_BTV)).sum(-1).double().sum())
                progress.advance(hidden_BTD.shape[0] * hidden_BTD.shape[1], f"layer {layer}")
        read = sum(hidden_BTD.shape[0] * hidden_BTD.shape[1] for hidden_BTD in self.hidden)
        return {each: total / read for each, total in sums.items()}

    def _show(self, first: int, end: int, norm: nn.Module) -> None:
        """Let hidden states pass through all layers but those from `first` on, before `end`."""
        for number, layer in enumerate(self.layers):
            self.shown[number] = layer if first <= number < end else self.through()
        self.base.set_submodule(self.body.norm.removeprefix(self.prefix), norm)

    def _run(self, hidden_BTD: Tensor, made: _Folded = _Folded({}, {})) -> Tensor:
        """The layers shown, with other tensors in place of the teacher's."""
        other = {name.removeprefix(self.prefix): tensor.to(hidden_BTD) for name, tensor in made.tensors.items()}
        given = {"inputs_embeds": hidden_BTD, "use_cache": False}
        with self._reading(made.reads):
            out_BTD: Tensor = functional_call(self.base, other, (), given).last_hidden_state
        return out_BTD

    @contextmanager
    def _reading(self, reads: Mapping[str, str]) -> Iterator[None]:
        """For a while consumers' modules put out what their owners' did: keys are alike before rotation too."""
        own = {name: self.base.get_submodule(name.removeprefix(self.prefix)) for name in reads}
        told: dict[str, _Told] = {}
        handles = []
        for name, owner in reads.items():
            if owner not in told:
                told[owner] = _Told()
                module = self.base.get_submodule(owner.removeprefix(self.prefix))
                handles.append(module.register_forward_hook(told[owner].listen))
            self.base.set_submodule(name.removeprefix(self.prefix), told[owner])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, module in own.items():
                self.base.set_submodule(name.removeprefix(self.prefix), module)


class _Told(nn.Module):
    """Puts out what another module did."""

    def listen(self, module: nn.Module, given: object, out: Tensor) -> None:
        """Hear the other module."""
        self.out = out

    def forward(self, *given: Tensor) -> Tensor:
        return self.out
