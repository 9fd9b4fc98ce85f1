"""The rows of text that a repair reads, without padding: those of a decoder, or inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvfold import hf, ranks
from kvfold.contracts.effort import RepairSettings
from kvfold.disk.checkpoint import Checkpoint
from kvfold.machine import best_device
from kvfold.text.pairs import Corpus, batched, start_id
from kvfold.text.pairs import Row as Pair
from kvfold.text.tokens import TokenFile

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

BATCH = 4096  # tokens that pass through a layer together
SEED = 0  # of span corruption

Model = hf.Layers | hf.PairedLayers


@dataclass(frozen=True)
class Rows:
    """This rank's rows by their tokens in the decoder, and by positions of the encoder's output, 0 in a decoder."""

    lengths: Sequence[int]
    encoded: Sequence[int]
    tokens: TokenFile | Sequence[Pair]
    numbers: Sequence[int]  # of the rows in the text
    ends: Sequence[int]  # tokens of the text up to the end of each row

    @classmethod
    def of(cls, text: TokenFile | Corpus, teacher: Checkpoint, settings: RepairSettings) -> Rows:
        """The rows of a text. Pairs lie with others of their lengths, within parts of the size that q reads."""
        length = min(settings.length, teacher.known_length)
        if isinstance(text, TokenFile):
            length = min(length, len(text))
            count = len(text) // length
            return cls._dealt([length] * count, [0] * count, text)
        parts: list[list[Pair]] = [[]]
        room = most = min(settings.q_tokens, settings.inner_tokens)
        for pair in text.rows(length, SEED):
            if parts[-1] and len(pair[1]) > room:
                parts.append([])
                room = most
            parts[-1].append(pair)
            room -= len(pair[1])
        pairs = [pair for part in parts for pair in sorted(part, key=lambda pair: (len(pair[0]), len(pair[1])))]
        return cls._dealt([len(target) for _, target in pairs], [len(given) for given, _ in pairs], pairs)

    @classmethod
    def _dealt(cls, lengths: Sequence[int], encoded: Sequence[int], tokens: TokenFile | Sequence[Pair]) -> Rows:
        """This rank's part of all rows: batches are dealt, so that q, which reads the first rows, is shared too."""
        this, ends = ranks.current(), list(accumulate(lengths))
        whole = cls(lengths, encoded, tokens, range(len(lengths)), ends)
        batches = whole.batches(BATCH)[this.rank :: this.world]
        own = [number for row, count in batches for number in range(row, row + count)]
        kept = tokens if isinstance(tokens, TokenFile) else [tokens[number] for number in own]
        return cls([lengths[at] for at in own], [encoded[at] for at in own], kept, own, [ends[at] for at in own])

    def open(self, source: Checkpoint) -> AbstractContextManager[Model]:
        """A model whose layers run one by one on these rows."""
        device = best_device()
        if isinstance(self.tokens, TokenFile):
            every = source.shape.num_layers
            return hf.Layers(source, device=device, attention=hf.WATCHED, lengths=self.lengths, in_turn=every)
        return hf.PairedLayers(source, self.encoded, device=device, attention=hf.WATCHED)

    def embed(self, model: Model, row: int, count: int) -> Tensor:
        """The input of layer 0, `hidden_BTD`, of `count` rows from `row` on."""
        if isinstance(model, hf.PairedLayers):
            assert not isinstance(self.tokens, TokenFile)
            batch = batched(self.tokens[row : row + count]).to(model.device)
            return model.embed(row, batch.read(torch.float32), batch.shifted(start_id(model.model.config)))
        assert isinstance(self.tokens, TokenFile)
        length, own = self.lengths[0], self.numbers[row : row + count]
        rows = [self.tokens.tokens[number * length : (number + 1) * length] for number in own]
        return model.embed(torch.from_numpy(np.stack(rows).astype("int64")))

    def first(self, tokens: int) -> int:
        """How many rows are among the first of the text that have at most this number of tokens; its first is."""
        return sum(end <= tokens or number == 0 for end, number in zip(self.ends, self.numbers, strict=True))

    def sampled(self, rows: int, count: int) -> list[int]:
        """About `count` of the first rows of the text, evenly spaced: those that are among the first `rows` here."""
        step = -(-sum(ranks.gather_in_order(rows)) // count)
        return [row for row in range(rows) if self.numbers[row] % step == 0]

    def batches(
        self, most: int, size: Callable[[int, int], int] = lambda tokens, encoded: tokens, rows: int | None = None
    ) -> list[tuple[int, int]]:
        """Adjacent rows of the same lengths as (first row, number of rows), of at most `most` together.

        `size` is that of a row of these lengths; a row that is larger comes alone. `rows` limits them to the first.
        """
        return list(self._batches(most, size, rows))

    def _batches(self, most: int, size: Callable[[int, int], int], rows: int | None) -> Iterator[tuple[int, int]]:
        first = 0
        for lengths, same in groupby(zip(self.lengths[:rows], self.encoded[:rows], strict=True)):
            count, each = len(list(same)), max(1, most // max(1, size(*lengths)))
            for row in range(0, count, each):
                yield first + row, min(each, count - row)
            first += count
