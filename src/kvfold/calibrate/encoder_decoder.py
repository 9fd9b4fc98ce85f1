"""Calibration of an encoder-decoder: the whole model reads batches of pairs, and every site's sums grow side by side.

What a cross-attention makes keys and values of is the encoder's output: its input moments are those of encoder tokens,
its queries' those of decoder tokens. Decoders alone are read layer by layer (`calibrate`); here the model must fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from kvfold.calibrate.statistics import Sampling, finite, looks, start
from kvfold.contracts.requests import Answers, AttentionGram, Question, Request, SampledPairs
from kvfold.contracts.site import Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError, SettingError
from kvfold.progress import SILENT, Progress
from kvfold.text.pairs import Ids, Pairs, batched, start_id

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 512  # tokens: rows of equal lengths are read together up to here


def read(
    source: Checkpoint,
    requests: Sequence[Request],
    rows: Iterable[tuple[Ids, Ids]],
    *,
    dtype: str,
    device: str,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests from one pass of the teacher over rows of input and target, keeping nothing.

    Raises SettingError for a request that asks for single tokens or compares encoder with decoder tokens,
    CheckpointError when an answer is not finite.
    """
    from kvfold import hf  # loads transformers: what is kept is answered without it

    for request in requests:
        kinds = {site.kind for site, _ in looks(request) if not isinstance(request, AttentionGram)}
        if isinstance(request, SampledPairs) or len(kinds) > 1:
            raise SettingError(
                f"{type(request).__name__} is not answered by an encoder-decoder", where="calibrate", got=request
            )
    model: Any = hf.load(source.path, dtype=dtype, device=device, attention=hf.WATCHED)
    pass_ = _Pass(source, model, requests, device)
    made = sorted(rows, key=lambda row: (len(row[0]), len(row[1])))
    progress.start("calibrating", sum(len(given) + len(asked) for given, asked in made), "tokens")
    try:
        with pass_.listening(), torch.inference_mode():
            for batch in _batches(made):
                progress.advance(pass_.add(batch.to(device)))
    finally:
        progress.stop()
    return pass_.answers()


def _batches(rows: Sequence[tuple[Ids, Ids]]) -> Iterator[Pairs]:
    """Rows of equal lengths together: nothing is padded, and so nothing is counted that is not there."""
    for lengths, same in groupby(rows, key=lambda row: (len(row[0]), len(row[1]))):
        waiting, count = list(same), max(1, BATCH // max(lengths))
        for first in range(0, len(waiting), count):
            yield batched(waiting[first : first + count])


class _Pass:
    """The sums of all requests, and the hooks that feed them."""

    def __init__(self, source: Checkpoint, model: Any, requests: Sequence[Request], device: str) -> None:
        self.source, self.model = source, model
        self.sums = {request: start(request, source.shape, device, Sampling([], 0)) for request in requests}
        self.seen: dict[tuple[Site, str], Tensor] = {}
        self.tokens = {"encoder": 0, "decoder": 0}

    def listening(self) -> ExitStack:
        """Look at what the requests look at, for the length of a context."""
        from kvfold import hf

        stack, takers = ExitStack(), {}
        for site, what in {look for request in self.sums for look in looks(request)}:
            if what == "p":
                module = self.model.get_submodule(self.source.family.module(site))
                takers[module] = self._taker(AttentionGram(site))
                continue
            name = self.source.family.tensor(site, "k" if what == "x" else what)
            module = self.model.get_submodule(name.rpartition(".")[0])
            stack.callback(module.register_forward_hook(self._show((site, what))).remove)
        stack.enter_context(hf.probabilities(takers))
        return stack

    def _show(self, look: tuple[Site, str]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen[look] = inputs[0] if look[1] == "x" else output

        return hook

    def _taker(self, request: AttentionGram) -> Any:
        """Sum up while the attention runs: the probabilities of all attentions together would be too many."""
        return lambda p_BHTS: self.sums[request].add(self.seen[request.site, "x"], p_BHTS)

    def add(self, batch: Pairs) -> int:
        """Read a batch; the tokens that it had."""
        begun_BT = batch.shifted(start_id(self.model.config))
        self.model(input_ids=batch.input_BS, decoder_input_ids=begun_BT, use_cache=False)
        for request, total in self.sums.items():
            if not isinstance(request, AttentionGram):
                total.add(*(self.seen[look] for look in looks(request)))
        self.seen.clear()
        self.tokens["encoder"] += batch.input_BS.numel()
        self.tokens["decoder"] += batch.target_BT.numel()
        return batch.input_BS.numel() + batch.target_BT.numel()

    def answers(self) -> Answers:
        """What every request asked for."""
        found: dict[Question, dict[str, Tensor]] = {}
        for request, total in self.sums.items():
            site, what = looks(request)[-1]
            of_encoder = site.kind == "encoder" or (site.kind == "cross" and what in "xk")
            tokens = self.tokens["encoder" if of_encoder else "decoder"]
            found[request] = {name: tensor.cpu() for name, tensor in total.answer(tokens).items()}
            if not finite(found[request]):
                raise CheckpointError(
                    "the teacher's activations are not finite", where=self.source.path, got=request, next="try float32"
                )
        return found
