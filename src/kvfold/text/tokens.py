"""Packed token files, memory-mapped, and their batches. `kvfold.text.documents` reads the texts.

A token file is one row of token ids, with the tokenizer's end token between documents. It is divided into windows of
fixed length. Each epoch sees every window once, in an order that depends on seed and epoch alone. So the batch of step
`n` is a function of (seed, n), and a stopped run continues exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic
import torch

from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, read_json, replacing, write_json
from kvfold.errors import DataError, SettingError
from kvfold.inputs import LARGE, read_bytes
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress, task
from kvfold.text.documents import chat_of, limited, read_texts, text_facts

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
PIECE = 1 << 20  # characters that are tokenised at a time; the tokenizer needs about a hundred times the memory
WHOLE = 1 << 24  # characters: a text up to this length is tokenised as a whole
SPREAD = 1 << 28  # characters of a text from which pieces are drawn; they are held in memory
DRAWN = 1 << 12  # characters of a drawn piece: some rows of a calibration
SAMPLED, LONGEST_SAMPLE = 32, 512  # documents sampled at a time, and tokens of each


# --- token files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """A row of token ids on disk; its largest possible id is `vocab_size - 1`."""

    path: Path
    tokens: np.ndarray[Any, Any] = field(repr=False)
    vocab_size: int
    hash: str  # of the text, or of the teacher and settings that it was sampled with
    source: str

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it by its path: the process that unpickles it maps the same file."""
        return open_token_file, (self.path, self.source, len(self))

    @property
    def read_tokens(self) -> int:
        """Number of tokens that a model reads."""
        return len(self.tokens)

    def windows(self, length: int) -> int:
        """Number of windows of `length` tokens that have a next token to predict."""
        return (len(self.tokens) - 1) // length

    def check(self, *, batch_size: int, length: int, vocab_size: int) -> None:
        """Raise DataError for a text shorter than one batch, and for ids without an embedding in the model."""
        if self.windows(length) < batch_size:
            raise DataError(
                "the text is shorter than one batch",
                where=self.source,
                got=f"{len(self):,} tokens",
                allowed=f"at least {batch_size * length + 1:,}",
                next="give more text, or a smaller batch or sequence length",
            )
        check_vocabulary(self.source, self.vocab_size, vocab_size)

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Tensor:
        """The `ids_BT` of a step, with T = `length + 1`: inputs and targets overlap by `length - 1` tokens."""
        places = batch_places(step, batch_size, self.windows(length), seed)
        rows = [self.tokens[place * length : (place + 1) * length + 1] for _, place in places]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def check_vocabulary(source: str, tokens: int, embeddings: int) -> None:
    """Raise DataError if a text has more kinds of tokens than the model has embeddings."""
    if tokens > embeddings:
        raise DataError(
            "the tokenizer knows more tokens than the model has embeddings",
            where=source,
            got=f"{tokens:,}",
            allowed=f"at most {embeddings:,}",
            next="use the tokenizer that the model was trained with",
        )


@lru_cache(maxsize=4)
def order(windows: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """The permutation in which an epoch sees the windows."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def batch_places(step: int, batch_size: int, windows: int, seed: int) -> Iterator[tuple[int, int]]:
    """Epoch and window of each row of a step's batch."""
    for row in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(row, windows)
        yield epoch, int(order(windows, seed, epoch)[index])


def token_file(
    source: str | Path,
    tokenizer_dir: str | Path,
    *,
    max_tokens: int | None = None,
    enough: int | None = None,
    spread: bool = False,
    teacher: str | Path | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: Progress = SILENT,
) -> TokenFile:
    """The packed tokens of a text, at most `max_tokens`. Each text is tokenised once for each tokenizer.

    With `enough`, reading stops after the characters that so many tokens need at most. With `spread`, the `max_tokens`
    tokens are pieces drawn from the whole text with `seed`, instead of its beginning. The source `self` is `max_tokens`
    tokens sampled from `teacher` with `seed`. Raises DataError if there is no text or no tokenizer, SettingError if
    `self` lacks a teacher or a number of tokens, and OutputError if the cache cannot be written.
    """
    from kvfold import hf  # imports transformers, which reading text does not need

    tokenizer = hf.load_tokenizer(tokenizer_dir)
    # only in tables and blanks are tokens longer than 32 characters
    wanted = max_tokens or enough
    limit = SPREAD if spread else None if wanted is None else max(32 * wanted, WHOLE)
    if str(source) == "self":
        if teacher is None or wanted is None:
            raise SettingError("text `self` needs a teacher and a number of tokens", next="give both")
        from kvfold.disk.checkpoint import Checkpoint

        identity = f"self:{Checkpoint.open(teacher).hash()}:{seed}:{wanted}"
        rows = _sample(teacher, tokenizer, wanted, seed, progress)
    else:
        chat = chat_of(tokenizer)
        facts = text_facts(source, limit, chat=chat)
        for line in facts.notes:
            progress.say(line)
        texts = limited(read_texts(source, chat=chat), limit)
        if spread:
            assert wanted is not None
            identity = f"{facts.hash}:{wanted}:{seed}"
            rows = _draw(texts, tokenizer, wanted, seed, progress)
        else:
            identity = facts.hash
            rows = _tokenise(texts, tokenizer, facts.characters, progress)
    key = fingerprint([FORMAT, identity, tokenizer_hash(tokenizer)])[:32]
    path = Path(cache_dir or cache_folder()) / "tokens" / f"{key}.bin"
    if read_json(path.with_suffix(".json")) is None:
        with disk_errors(path):
            prepare_cache(path.parent)
            _write(path, rows, tokenizer, identity)
    return open_token_file(path, str(source), max_tokens)


class _Facts(pydantic.BaseModel):
    """The JSON file beside a token file."""

    model_config = pydantic.ConfigDict(strict=True)
    tokens: pydantic.PositiveInt
    dtype: Literal["uint16", "uint32"]
    vocab_size: pydantic.PositiveInt
    hash: str


def open_token_file(path: Path, source: str, max_tokens: int | None = None) -> TokenFile:
    """Map a token file into memory. Raises DataError if it is damaged."""
    damaged = DataError("a token file of the cache is damaged", where=path, next="delete it; kvfold makes it again")
    try:
        facts = _Facts.model_validate(read_json(path.with_suffix(".json")))
        size = path.stat().st_size
    except (pydantic.ValidationError, OSError) as error:
        raise damaged from error
    if size != facts.tokens * np.dtype(facts.dtype).itemsize:
        raise damaged
    tokens = np.memmap(path, dtype=facts.dtype, mode="r")
    return TokenFile(path, tokens[:max_tokens], facts.vocab_size, facts.hash, source)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that affects the ids of a text: definition, tokens put around texts, splitting of specials.

    The definition of a tokenizer without a backend is its vocabulary and the file that it was read from.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = getattr(tokenizer, "vocab_file", None)
    if backend is not None:
        definition = backend.to_str()
    else:
        words = read_bytes(Path(file), limit=LARGE, error=DataError) if file and Path(file).is_file() else b""
        definition = [tokenizer.get_vocab(), hashlib.sha256(words).hexdigest()]
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "cls")]
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    return fingerprint([definition, tokenizer("")["input_ids"], special, split])


def _write(path: Path, rows: Iterator[list[int]], tokenizer: Any, identity: str) -> None:
    """Write rows of ids, and the facts last: without them, the token file does not count as written."""
    written, largest = 0, 0
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    with replacing(path) as sibling, sibling.open("wb") as file:
        for row in rows:
            ids = np.asarray(row, dtype=dtype)
            file.write(ids.tobytes())
            written, largest = written + len(ids), max(largest, int(ids.max(initial=0)))
    # added tokens, for which a model may have no embedding, count if the text uses them
    vocabulary = max(int(tokenizer.vocab_size), largest + 1)
    facts = {"tokens": written, "dtype": dtype, "vocab_size": vocabulary, "hash": identity}
    write_json(path.with_suffix(".json"), facts)


def _tokenise(texts: Iterable[str], tokenizer: Any, characters: int, progress: Progress) -> Iterator[list[int]]:
    """Ids of each document: the tokens that the tokenizer puts before a text, the text, the end token."""
    end = tokenizer.eos_token_id
    before = [token for token in tokenizer("")["input_ids"] if token != end]
    with task(progress, "tokenise", characters, "characters"):
        for text in texts:
            yield before
            for piece in _pieces(text, PIECE):
                yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                progress.advance(len(piece))
            if end is not None:
                yield [end]


def _draw(texts: Iterable[str], tokenizer: Any, tokens: int, seed: int, progress: Progress) -> Iterator[list[int]]:
    """Ids of pieces of the documents, in a random order, until there are `tokens` ids."""
    end = tokenizer.eos_token_id
    before = [token for token in tokenizer("")["input_ids"] if token != end]
    pieces = [piece for text in texts for piece in _pieces(text, DRAWN)]
    written = 0
    with task(progress, "tokenise", tokens, "tokens"):
        for index in np.random.default_rng(seed).permutation(len(pieces)):
            ids = [*before, *tokenizer(pieces[index], add_special_tokens=False, verbose=False)["input_ids"]]
            ids = ids[: tokens - written]
            written += len(ids)
            progress.advance(len(ids))
            yield ids
            if written == tokens:
                return


def _pieces(text: str, size: int) -> Iterator[str]:
    """Split a text into pieces of about `size` characters, at ends of lines where possible."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line = text.rfind("\n", start, end)
            end = line + 1 if line > start else end
        yield text[start:end]
        start = end


def _sample(teacher: str | Path, tokenizer: Any, tokens: int, seed: int, progress: Progress) -> Iterator[list[int]]:
    """Documents sampled from a model at temperature 1, from its first token on, `SAMPLED` at a time."""
    from kvfold import hf

    end = tokenizer.eos_token_id
    first = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise DataError("the tokenizer has neither a start nor an end token to sample from", where=teacher)
    device = best_device()
    model = hf.load(teacher, device=device)
    length = min(int(model.config.max_position_embeddings), LONGEST_SAMPLE) - 1  # type: ignore[union-attr,arg-type]
    start_B1 = torch.full((SAMPLED, 1), first, device=device)
    written = 0
    with task(progress, "sample from the teacher", tokens, "tokens"), torch.random.fork_rng():
        torch.manual_seed(seed)
        while written < tokens:
            ids_BT = hf.generate(
                model, start_B1, max_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
            )
            for row in ids_BT.tolist():
                stop = row.index(end, 1) + 1 if end in row[1:] else len(row)
                kept = row[:stop][: tokens - written]
                written += len(kept)
                progress.advance(len(kept), f"{written:,} of {tokens:,}")
                yield kept
