"""Sensitivity: what folding one site alone costs, as KL to the teacher, for each number of heads that it could keep.

For each site the method makes its tensors under the moments that calibration found. The teacher runs with these in
place of its own (a shared head written out for each head that it stands for, which computes the same), and next-token
distributions are compared over a sample of the calibration text:

    kl = mean_t sum_V p (log p - log q)       p: the teacher's, q: with one site folded; nats per token

Layers below the folded one hear nothing of it: hidden states before it are kept, and only layers from it on run again.
Answers are kept in kvfold's cache folder as they come, whatever the budget that they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kvfold.calibrate import calibration_hash
from kvfold.checkpoint import Checkpoint
from kvfold.data import TokenFile
from kvfold.errors import CheckpointError
from kvfold.lineage import known_length
from kvfold.methods import Method
from kvfold.output import cache_folder, disk_errors, fingerprint, read_json, write_json
from kvfold.progress import SILENT, Progress
from kvfold.shape import Answers, FitLoss, FoldedKL, Question, Site, SiteTensors

FORMAT = 1  # of the kept answers
LOGITS_BYTES = 32 << 20  # of one batch's logits in float32


@dataclass(frozen=True)
class SensitivitySettings:
    """How much of the calibration text is read again for each choice."""

    tokens: int = field(default=8192, metadata={"help": "Tokens, in rows spread evenly over the calibration text."})
    length: int = field(default=256, metadata={"help": "Tokens of a row; each row is read from its own beginning."})


def measure(
    source: Checkpoint,
    method: Method,
    config: Any,
    questions: Sequence[FoldedKL],
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with_heads: Any = getattr(method, "with_heads")  # noqa: B009 - of methods that ask; no part of every contract
    same = [type(config).__module__, asdict(with_heads(config, 1))]
    identity = [FORMAT, source.hash(progress), calibration_hash(tokens), asdict(settings), device, same]
    path = cache_folder() / "sensitivity" / f"{fingerprint(identity)[:32]}.json"
    known: dict[str, float] = read_json(path) or {}
    asked: dict[Site, list[int]] = {}
    for each in sorted(questions, key=lambda each: (each.site, -each.heads)):
        if _key(each) not in known:
            asked.setdefault(each.site, []).append(each.heads)
    if asked:
        rows_BT = _rows(tokens, min(settings.length, known_length(source)), settings.tokens)
        progress.start("measuring sensitivity", rows_BT.numel() * sum(map(len, asked.values())), "tokens")
        try:
            with torch.inference_mode():
                reading = _Reading(source, rows_BT, device)
                for site, numbers in asked.items():
                    folded = {
                        heads: _folded(source, method, with_heads(config, heads), site, answers) for heads in numbers
                    }
                    for heads, kl in reading.compare(site.layer, folded, progress).items():
                        if not math.isfinite(kl):
                            raise CheckpointError("logits are not finite", where=source.path, got=FoldedKL(site, heads))
                        known[_key(FoldedKL(site, heads))] = max(0.0, kl)  # below 0 is rounding
                    with disk_errors(path):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_json(path, known)
        finally:
            progress.stop()
    return {each: {"kl": torch.tensor(known[_key(each)], dtype=torch.float64)} for each in questions}


def fit_losses(
    source: Checkpoint,
    method: Method,
    config: Any,
    questions: Sequence[FitLoss],
    answers: Answers,
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Let the method say what each set of sites would lose, by the weights and the moments that `answers` holds."""
    lost: Any = getattr(method, "lost")  # noqa: B009 - of methods that ask; no part of every contract
    found: dict[Question, dict[str, Tensor]] = {}
    progress.start("fitting", len(questions), "groups")
    try:
        for each in questions:
            group = {site: tensors_of(source, site) for site in each.sites}
            found[each] = {"lost": torch.tensor(lost(group, answers, config), dtype=torch.float64)}
            progress.advance(1)
    finally:
        progress.stop()
    return found


def tensors_of(source: Checkpoint, site: Site) -> SiteTensors:
    """What a method is handed of a site."""
    attention = source.shape.sites[site]
    return SiteTensors(attention, {role: source.read(source.family.tensor(site, role)) for role in attention.roles()})


def _key(question: FoldedKL) -> str:
    return f"{question.site}, {question.heads} heads"


def _rows(tokens: TokenFile, length: int, count: int) -> Tensor:
    """Rows `ids_BT` spread evenly over a text, about `count` tokens of it."""
    length = min(length, len(tokens))
    rows = max(1, min(count, len(tokens)) // length)
    starts = [row * (len(tokens) - length) // max(1, rows - 1) for row in range(rows)]
    return torch.stack([torch.from_numpy(tokens.tokens[at : at + length].astype("int64")) for at in starts])


def _folded(source: Checkpoint, method: Method, config: Any, site: Site, answers: Answers) -> dict[str, Tensor]:
    """What a method makes of one site, in the teacher's shape, by name: each shared head as often as it is read."""
    attention = source.shape.sites[site]
    made = method.convert({site: tensors_of(source, site)}, answers, config)[site]
    found = {}
    for role, tensor in made.items():
        if role in ("k", "v", "k_bias", "v_bias"):
            heads = tensor.shape[0] // attention.head_dim
            blocks = tensor.view(heads, attention.head_dim, *tensor.shape[1:])
            tensor = blocks.repeat_interleave(attention.num_key_value_heads // heads, 0).flatten(0, 1)
        found[source.family.tensor(site, role)] = tensor.float()
    return found


class _Reading:
    """The teacher over a sample of text: hidden states before the layer at hand, and behind the last."""

    def __init__(self, source: Checkpoint, rows_BT: Tensor, device: str) -> None:
        from kvfold import hf  # loads transformers: what is kept is answered without it

        model: Any = hf.load(source.path, device=device)
        self.base, self.head = model.base_model, model.get_output_embeddings()
        self.prefix = f"{model.base_model_prefix}."
        self.layers, self.norm = list(self.base.layers), self.base.norm
        rows = max(1, LOGITS_BYTES // (4 * rows_BT.shape[1] * source.shape.vocab_size))
        self.hidden = [self.base.embed_tokens(ids_BT.to(device)) for ids_BT in torch.split(rows_BT, rows)]
        self.final = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
        self.at = 0

    def compare(self, layer: int, folded: Mapping[int, Mapping[str, Tensor]], progress: Progress) -> dict[int, float]:
        """KL to the teacher of each set of tensors of a layer, in nats per token; layers are asked in order."""
        if self.at < layer:
            self._show(self.at, layer, nn.Identity())
            self.hidden = [self._run(hidden_BTD) for hidden_BTD in self.hidden]
            self.at = layer
        self._show(layer, len(self.layers), self.norm)
        sums = dict.fromkeys(folded, 0.0)
        for hidden_BTD, final_BTD in zip(self.hidden, self.final, strict=True):
            log_p_BTV = self.head(final_BTD).log_softmax(-1)
            p_BTV = log_p_BTV.exp()
            for heads, tensors in folded.items():
                log_q_BTV = self.head(self._run(hidden_BTD, tensors)).log_softmax(-1)
                sums[heads] += float((p_BTV * (log_p_BTV - log_q_BTV)).sum(-1).double().sum())
                progress.advance(hidden_BTD.shape[0] * hidden_BTD.shape[1], f"layer {layer}")
        read = sum(hidden_BTD.shape[0] * hidden_BTD.shape[1] for hidden_BTD in self.hidden)
        return {heads: total / read for heads, total in sums.items()}

    def _show(self, first: int, end: int, norm: nn.Module) -> None:
        """Let hidden states pass through all layers but those from `first` on, before `end`."""
        for number, layer in enumerate(self.layers):
            self.base.layers[number] = layer if first <= number < end else _Through()
        self.base.norm = norm

    def _run(self, hidden_BTD: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layers shown, with other tensors in place of the teacher's."""
        other = {name.removeprefix(self.prefix): tensor.to(hidden_BTD) for name, tensor in (tensors or {}).items()}
        given = {"inputs_embeds": hidden_BTD, "use_cache": False}
        out_BTD: Tensor = functional_call(self.base, other, (), given).last_hidden_state
        return out_BTD


class _Through(nn.Module):
    """In place of a layer that is not run."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states
