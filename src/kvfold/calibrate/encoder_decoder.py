"""Calibration of an encoder-decoder: the whole model reads batches of pairs, and every batch adds to all sums.

The keys and values of a cross-attention are made of the encoder's output: its input moments are over encoder tokens,
those of its queries over decoder tokens. The model must fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch

from kvfold import ranks
from kvfold.calibrate.statistics import Signal, Sums, signals, watch
from kvfold.contracts.requests import Answers, AttentionGram, Request, SampledPairs
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import SettingError
from kvfold.progress import SILENT, Progress, task
from kvfold.text.pairs import Pairs, Row, batched, start_id

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 512  # tokens of one batch, on its longer side


def read(
    source: Checkpoint,
    requests: Sequence[Request],
    rows: Iterable[Row],
    *,
    dtype: str,
    device: str,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests by one pass of the teacher over rows of input and target, without the cache.

    Each rank reads its share of the batches; rank 0 has the answers. Raises SettingError for requests of single tokens,
    or of encoder tokens with decoder tokens, and CheckpointError if an answer is not finite.
    """
    from kvfold import hf  # loads transformers, which answers from the cache do not need

    for request in requests:
        kinds = {site.kind for site, _ in signals(request) if not isinstance(request, AttentionGram)}
        if isinstance(request, SampledPairs) or len(kinds) > 1:
            raise SettingError(
                f"an encoder-decoder cannot answer {type(request).__name__}", where="calibrate", got=request
            )
    model: Any = hf.load(source.path, dtype=dtype, device=device, attention=hf.WATCHED)
    work = _Pass(source, model, requests, device)
    made = sorted(rows, key=lambda row: (len(row[0]), len(row[1])))
    total, this = sum(len(given) + len(wanted) for given, wanted in made), ranks.current()
    with task(progress, "calibrating", total, "tokens"), work.watching(), torch.inference_mode():
        for batch in islice(batches_of(made, BATCH), this.rank, None, this.world):
            progress.advance(work.add(batch.to(device)) * this.world)
    work.gather()
    return {**work.sums.answers(work.tokens_of, source.path), **work.averages.answers(work.tokens_of, source.path)}


def batches_of(rows: Sequence[Row], tokens: int) -> Iterator[Pairs]:
    """Adjacent rows of equal lengths together, up to this number of tokens on the longer side; nothing is padded."""
    for lengths, same in groupby(rows, key=lambda row: (len(row[0]), len(row[1]))):
        waiting, count = list(same), max(1, tokens // max(lengths))
        for first in range(0, len(waiting), count):
            yield batched(waiting[first : first + count])


class _Pass:
    """The sums of all requests, and the hooks that feed them."""

    def __init__(self, source: Checkpoint, model: Any, requests: Sequence[Request], device: str) -> None:
        self.source, self.model, shape = source, model, source.shape
        by_attention = [each for each in requests if isinstance(each, AttentionGram)]
        self.sums = Sums([each for each in requests if each not in by_attention], shape, device)
        self.averages = Sums(by_attention, shape, device)
        self.seen: dict[Signal, Tensor] = {}
        self.tokens = {"encoder": 0, "decoder": 0}

    def watching(self) -> ExitStack:
        """A context in which hooks on the model record what the requests need."""
        from kvfold import hf

        stack, takers = ExitStack(), {}
        for signal in {signal for request in (*self.sums.of, *self.averages.of) for signal in signals(request)}:
            name, hook = watch(self.source, signal, self.seen)
            if signal[1] == "p":
                takers[self.model.get_submodule(name)] = self._taker(AttentionGram(signal[0]))
            else:
                module = self.model.get_submodule(name.rpartition(".")[0])
                stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(hf.probabilities(takers))
        return stack

    def _taker(self, request: AttentionGram) -> Callable[[Tensor], None]:
        """Add while the attention runs: the probabilities of all attentions would not fit into memory."""
        return lambda p_BHTS: self.averages.of[request].add(self.seen[request.site, "x"], p_BHTS)

    def add(self, batch: Pairs) -> int:
        """Read a batch and return its number of tokens."""
        from kvfold import hf

        encoded, decoded = int(batch.seen_BS.sum()), batch.target_BT.numel()
        begun_BT = batch.shifted(start_id(self.model.config))
        read = hf.read_alone(self.model, batch.read(self.model.dtype))
        self.model(**read, decoder_input_ids=begun_BT, use_cache=False)
        self.sums.add(self.seen)
        self.seen.clear()
        self.tokens["encoder"] += encoded
        self.tokens["decoder"] += decoded
        return encoded + decoded

    def gather(self) -> None:
        """Count the tokens of all ranks."""
        counts = ranks.gather_in_order(self.tokens)
        self.tokens = {side: sum(each[side] for each in counts) for side in self.tokens}

    def tokens_of(self, request: Request) -> int:
        """The number of tokens over which a request sums: those of the encoder, or those of the decoder."""
        site, what = signals(request)[-1]
        of_encoder = site.kind == "encoder" or (site.kind == "cross" and what in "xk")
        return self.tokens["encoder" if of_encoder else "decoder"]
