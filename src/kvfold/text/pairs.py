"""Text for encoder-decoders: span corruption of a text, and pairs from a file.

Pairs are lines of a `.tsv` (input, tab, target) or rows of a `.jsonl` (`input` and `target`); `pairs:PATH` reads any
file as a `.tsv`. Rows with a `question` and passages are records of Fusion-in-Decoder (`kvfold.text.questions`). For a
model that reads sound, the input is the path of a sound file, relative to the file of pairs. The batch of step `n` is a
function of (seed, n).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.disk.output import fingerprint
from kvfold.errors import DataError, KvfoldError, SettingError
from kvfold.inputs import check_regular, read_bytes
from kvfold.progress import SILENT, Progress
from kvfold.text.documents import LEFT_OUT, MENDED, local_files, mend, noted
from kvfold.text.files import ROWS, kind_of, opened, rows
from kvfold.text.questions import COLUMNS, KEYS, Passages, Question, is_question, read_question
from kvfold.text.sound import Clip, Reader
from kvfold.text.spans import DENSITY, Ids, corrupted, noise_counts, noise_mask, row_tokens
from kvfold.text.tokens import TokenFile, batch_places, check_vocabulary, token_file, tokenizer_hash

UNSEEN = -100  # the label of padding in a target
PREFIX = "pairs:"
SIDES = ("input", "target")  # the keys of a pair
_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")
Row = tuple[Ids | Clip | Passages, Ids]
"""Input and target."""


@dataclass(frozen=True)
class Pairs:
    """A batch: `input_BS` with its mask `seen_BS` (False: padding), and `target_BT`, padded with `UNSEEN`.

    Of passages, input and mask are `(B, N, S)`, and the encoder reads each of the N by itself. Of sound, the input is
    `(B, M, F)`, the features of F frames, and `seen_BS` has a place for each encoder position. `targets` divides a sum
    over targets; in a part of a batch it is the mean over parts, so that losses average to its.
    """

    input_BS: Tensor
    seen_BS: Tensor
    target_BT: Tensor
    targets: float | None = None  # None: those of the batch itself

    def to(self, device: str | torch.device, non_blocking: bool = False) -> Pairs:
        """Move the batch to a device."""
        input_BS, seen_BS, target_BT = (each.to(device, non_blocking=non_blocking) for each in self.tensors)
        return Pairs(input_BS, seen_BS, target_BT, self.targets)

    def split(self, rows: int) -> list[Pairs]:
        """Split the batch into parts of `rows` rows."""
        if rows >= len(self.target_BT):
            return [self]
        targets = int((self.target_BT != UNSEEN).sum()) * rows / len(self.target_BT)
        parts = zip(*(torch.split(each, rows) for each in self.tensors), strict=True)
        return [Pairs(input_BS, seen_BS, target_BT, targets) for input_BS, seen_BS, target_BT in parts]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, mask and target."""
        return self.input_BS, self.seen_BS, self.target_BT

    @property
    def sounds(self) -> bool:
        """Whether the input is sound."""
        return self.input_BS.is_floating_point()

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The input as arguments of an encoder of this format. Sound is never padded: its features include silence."""
        if self.sounds:
            return {"input_features": self.input_BS.to(dtype)}
        return {"input_ids": self.input_BS, "attention_mask": self.seen_BS}

    def shifted(self, start: int) -> Tensor:
        """The decoder's input `ids_BT`: the id `start`, then the target without its last token."""
        shifted_BT = self.target_BT.roll(1, dims=1)
        shifted_BT[:, 0] = start
        return shifted_BT.masked_fill(shifted_BT == UNSEEN, start)


def start_id(config: Any) -> int:
    """The first input id of the decoder of a transformers config, as in transformers' generation."""
    start = getattr(config, "decoder_start_token_id", None)
    return int((getattr(config, "bos_token_id", None) if start is None else start) or 0)


def batched(rows: Sequence[Row]) -> Pairs:
    """Batch rows of input and target, padded on the right."""
    target_BT = np.full((len(rows), max(len(target) for _, target in rows)), UNSEEN, dtype=np.int64)
    for number, (_, target) in enumerate(rows):
        target_BT[number, : len(target)] = target
    # where the tokens of each passage stand, and of an input, which is like one passage
    parts = [
        (where, part)
        for number, (given, _) in enumerate(rows)
        for where, part in (
            [((number, n), each) for n, each in enumerate(given.ids)]
            if isinstance(given, Passages)
            else [((number,), given)]
        )
    ]
    shape = [max(place) + 1 for place in zip(*(where for where, _ in parts), strict=True)]
    seen_BS = np.zeros((*shape, max(len(part) for _, part in parts)), dtype=bool)
    input_BS: NDArray[Any] = np.zeros(seen_BS.shape, dtype=np.int64)
    for where, part in parts:
        seen_BS[(*where, slice(len(part)))] = True
        if not isinstance(part, Clip):
            input_BS[(*where, slice(len(part)))] = part
    if clips := [given for given, _ in rows if isinstance(given, Clip)]:
        input_BS = np.stack([each.features() for each in clips])
    return Pairs(torch.from_numpy(input_BS), torch.from_numpy(seen_BS), torch.from_numpy(target_BT))


# --- span corruption ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """A text whose rows are corrupted on access."""

    tokens: TokenFile
    sentinels: tuple[int, ...]
    end: int

    @property
    def hash(self) -> str:
        """The identity of the text and the objective."""
        return f"spans:{self.tokens.hash}"

    @property
    def source(self) -> str:
        """The source of the text."""
        return self.tokens.source

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def read_tokens(self) -> int:
        """Number of tokens that both encoder and decoder read: the decoder's, which are fewer."""
        return int(DENSITY * len(self.tokens))

    @property
    def encoded_tokens(self) -> int:
        """Number of tokens that the encoder reads, about."""
        return len(self.tokens) - self.read_tokens

    def check(self, *, batch_size: int, length: int, vocab_size: int) -> None:
        """Raise DataError if inputs of `length` tokens need more text, sentinels or embeddings than there are."""
        if length < 4:
            raise DataError("span corruption needs inputs of 4 tokens or more", got=length)
        row = row_tokens(length)
        self.tokens.check(batch_size=batch_size, length=row, vocab_size=vocab_size)
        largest, spans = max(self.sentinels, default=-1), noise_counts(row)[1]
        if spans > len(self.sentinels) or largest >= vocab_size:
            raise DataError(
                f"an input of {length} tokens hides {spans} spans, but the tokenizer has fewer sentinels",
                where=self.tokens.source,
                got=f"{len(self.sentinels)} tokens <extra_id_N>, the largest id {largest} of {vocab_size}",
                next="use T5's own tokenizer, or one that `kvfold pretrain` made for an encoder-decoder",
            )

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Pairs:
        """The rows of a step, with inputs of `length` tokens and no padding."""
        row = row_tokens(length)
        places = batch_places(step, batch_size, self.tokens.windows(row), seed)
        return batched([self._row(place * row, row, (seed, epoch, place)) for epoch, place in places])

    def rows(self, length: int, seed: int = 0) -> Iterator[tuple[Ids, Ids]]:
        """The whole text in order, as inputs of `length` tokens and their targets; the last row may be shorter."""
        row = row_tokens(length)
        for start in range(0, len(self.tokens) - 1, row):
            yield self._row(start, min(row, len(self.tokens) - start), (seed, start))

    def _row(self, start: int, count: int, seed: tuple[int, ...]) -> tuple[Ids, Ids]:
        ids_N = self.tokens.tokens[start : start + count].astype(np.int64)
        noise_N = noise_mask(len(ids_N), np.random.default_rng(seed))
        return corrupted(ids_N, noise_N, self.sentinels, self.end)


def sentinels_of(tokenizer: Any) -> tuple[int, ...]:
    """The ids of `<extra_id_0>`, `<extra_id_1>` and so on in a tokenizer, up to the first that is missing."""
    words = tokenizer.get_vocab().items()
    found = {int(match[1]): number for word, number in words if (match := _SENTINEL.fullmatch(word))}
    return tuple(found[number] for number in range(len(found)) if number in found)


# --- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairFile:
    """The tokens of pairs, in memory; both sides end with the end token. Sound stays on disk until a batch needs it."""

    pairs: Sequence[Row] = field(repr=False)
    texts: Sequence[tuple[str, str]] = field(repr=False)
    source: str
    hash: str
    vocab_size: int
    answers: Sequence[Sequence[str]] = ()  # of questions with passages: all that are right

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sounds(self) -> bool:
        """Whether the inputs are sound files."""
        return isinstance(self.pairs[0][0], Clip)

    @property
    def read_tokens(self) -> int:
        """Number of tokens that both encoder and decoder read: those of the shorter side."""
        return min(sum(len(pair[side]) for pair in self.pairs) for side in (0, 1))

    @property
    def encoded_tokens(self) -> int:
        """Number of positions of the encoder's output."""
        return sum(len(given) for given, _ in self.pairs)

    def check(self, *, batch_size: int, length: int, vocab_size: int) -> None:
        """Raise DataError for fewer pairs than a batch, and for ids without an embedding in the model."""
        if len(self.pairs) < batch_size:
            raise DataError("fewer pairs than one batch", where=self.source, got=len(self.pairs), allowed=batch_size)
        check_vocabulary(self.source, self.vocab_size, vocab_size)

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Pairs:
        """The pairs of a step, each side cut to `length` tokens and padded to the longest."""
        pairs = [self.pairs[place] for _, place in batch_places(step, batch_size, len(self.pairs), seed)]
        return batched([(given[:length], target[:length]) for given, target in pairs])

    def rows(self, length: int, seed: int = 0) -> Iterator[Row]:
        """All pairs in the file's order, each side cut to `length` tokens."""
        for given, target in self.pairs:
            yield given[:length], target[:length]


Corpus = Spans | PairFile
"""The data of an encoder-decoder."""


def are_pairs(source: str | Path) -> bool:
    """True if a source holds pairs, False if it holds running text."""
    name, kind = str(source), kind_of(source)
    if name.startswith(PREFIX) or kind == ".tsv":
        return True
    if kind not in ROWS or not Path(name).is_file():
        return False
    try:
        _, first = next(rows(Path(name), _columns), ("", None))
    except KvfoldError:
        return False  # the reader of texts then reports the error
    return is_question(first) or (isinstance(first, Mapping) and set(SIDES) <= set(first))


def read_pairs(source: str | Path, notes: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """Inputs and targets of a file. Pairs with a null are left out and counted in `notes`.

    Raises DataError for a line that is not a pair.
    """
    path = Path(str(source).removeprefix(PREFIX))
    notes = Counter() if notes is None else notes
    for where, sides in _sides(path):
        if None in sides:
            notes[LEFT_OUT] += 1
        elif len(sides) == 2 and all(isinstance(each, str) for each in sides):
            made = [mend(each) for each in sides]
            notes[MENDED] += made != sides
            yield made[0], made[1]
        else:
            raise DataError(
                "is not a pair",
                where=where,
                got=f"{len(sides)} columns" if kind_of(path) not in ROWS else "another type than strings",
                allowed='input, tab, target; in a .jsonl {"input": ..., "target": ...}',
            )


def _sides(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """The columns of each line, or input and target of each row, with their place in the file."""
    if kind_of(path) in ROWS:
        for where, row in rows(path, _columns):
            if row is not None and not (isinstance(row, Mapping) and set(SIDES) <= set(row)):
                found = f"keys {', '.join(row) or 'none'}" if isinstance(row, Mapping) else type(row).__name__
                raise DataError("is not a pair", where=where, got=found, allowed='{"input": ..., "target": ...}')
            yield where, [None, None] if row is None else [row[side] for side in SIDES]
        return
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", list(line.rstrip("\n").split("\t"))


def _columns(names: Sequence[str]) -> Sequence[str]:
    if set(KEYS) <= set(names):
        return [name for name in COLUMNS if name in names]
    return SIDES if set(SIDES) <= set(names) else ()


def read_questions(source: str | Path) -> list[Question]:
    """The questions with passages of a file; none of a file of pairs. Raises DataError for a row that is none."""
    path = Path(source)
    if kind_of(source) not in ROWS or not is_question(next(rows(path, _columns), ("", None))[1]):
        return []
    return [read_question(row, where) for where, row in rows(path, _columns) if row is not None]


def corpus(
    source: str | Path,
    tokenizer_dir: str | Path,
    *,
    max_tokens: int | None = None,
    enough: int | None = None,
    spread: bool = False,
    teacher: str | Path | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Corpus:
    """The data of an encoder-decoder from a source: its pairs, or its text with span corruption.

    The arguments are those of `token_file`. `max_tokens` limits the tokens of pairs, and `enough` counts the tokens of
    inputs. Raises DataError if there is no text or no tokenizer, and SettingError for `self`, which only decoders
    support.
    """
    from kvfold import hf  # imports transformers, which reading text does not need

    tokenizer = hf.load_tokenizer(tokenizer_dir)
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end token, which an encoder-decoder needs", where=tokenizer_dir)
    if str(source) == "self":
        raise SettingError("only a decoder can sample text `self`", next="give a text, or pairs")
    if are_pairs(source):
        return _pair_file(
            str(source), tokenizer, end, max_tokens, seed if spread else None, progress, Reader.of(tokenizer_dir)
        )
    if Reader.of(tokenizer_dir) is not None:
        what, allowed = "the model reads sound, and this is no file of pairs", "a .tsv or .jsonl: sound file, text"
        raise DataError(what, where=source, allowed=allowed)
    whole = None if enough is None else 2 * enough  # rows have fewer tokens than twice their inputs
    tokens = token_file(
        source, tokenizer_dir, max_tokens=max_tokens, enough=whole, spread=spread, seed=seed, progress=progress
    )
    return Spans(tokens, sentinels_of(tokenizer), end)


def check_text(source: str | Path, *, paired: bool) -> None:
    """Raise DataError for a text that is missing or of an unknown kind, before work that takes long."""
    if paired and are_pairs(source):
        check_regular(Path(str(source).removeprefix(PREFIX)), error=DataError)
    elif str(source) not in ("self", "stdlib", "stdlib:heldout"):
        local_files(str(source))


def text_tokens(read: int, source: str | Path) -> int:
    """The tokens of a text, or of both sides of pairs, of which a decoder reads about `read`."""
    return 2 * read if are_pairs(source) else math.ceil(read / DENSITY)


def read_tokens(source: str | Path, tokenizer_dir: str | Path, *, paired: bool, **how: Any) -> TokenFile | Corpus:
    """A text as tokens, with the arguments of `token_file`; `paired`: as the `corpus` of an encoder-decoder."""
    return (corpus if paired else token_file)(source, tokenizer_dir, **how)


def _pair_file(
    source: str,
    tokenizer: Any,
    end: int,
    max_tokens: int | None,
    seed: int | None,
    progress: Progress,
    reader: Reader | None,
) -> PairFile:
    """All pairs, or the first pairs of `max_tokens` tokens, in the file's order or in a random one if `seed` is set."""
    notes, asked = Counter[str](), read_questions(source)
    texts = [(each.question, each.target) for each in asked] or list(read_pairs(source, notes))
    for line in noted(source, notes):
        progress.say(line)
    if not texts:
        raise DataError("there are no pairs", where=source)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(texts))
        texts, asked = ([each[number] for number in order] if each else [] for each in (texts, asked))
    targets = _tokenised([target for _, target in texts], tokenizer, end, "text_target")
    folder, inputs = Path(source.removeprefix(PREFIX)).parent, [given for given, _ in texts]
    read: Sequence[Ids | Clip | Passages]
    if reader:
        read = [Clip(folder / each, reader) for each in inputs]
    elif asked:
        passages = _tokenised([text for each in asked for text in each.inputs()], tokenizer, end, "text")
        read = Passages.grouped(passages, [len(each.passages) for each in asked])
    else:
        read = _tokenised(inputs, tokenizer, end, "text")
    pairs: list[Row] = list(zip(read, targets, strict=True))
    if max_tokens is not None:
        before = np.cumsum([0, *(len(given) + len(target) for given, target in pairs)])
        count = max(1, int((before < max_tokens).sum()))
        pairs, texts, asked = pairs[:count], texts[:count], asked[:count]
    lines = [each.document() for each in asked] or ["\t".join(pair) for pair in texts]
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()
    largest = max(int(ids.max()) for pair in pairs for side in pair for ids in _ids(side))
    clips = [each for each, _ in pairs if isinstance(each, Clip)]
    sounds = [hashlib.sha256(read_bytes(clip.path, error=DataError)).hexdigest() for clip in clips]
    identity = fingerprint(["pairs", digest, tokenizer_hash(tokenizer), *sounds])
    vocabulary = max(int(tokenizer.vocab_size), largest + 1)
    return PairFile(pairs, texts, source, identity, vocabulary, [each.answers for each in asked])


def _ids(side: Ids | Clip | Passages) -> Sequence[Ids]:
    """The ids of one side of a pair: none of sound."""
    if isinstance(side, Passages):
        return side.ids
    return () if isinstance(side, Clip) else (side,)


def _tokenised(texts: Iterable[str], tokenizer: Any, end: int, side: str) -> list[Ids]:
    """The ids of texts; Marian's tokenizers have other pieces for a `text_target` than for a `text`."""
    rows = tokenizer(**{side: list(texts)}, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.append(np.asarray(row, dtype=np.int64), end) for row in rows]
