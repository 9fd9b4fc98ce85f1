"""Text in, batches out: packed token files that are memory-mapped. `texts` says what a text is.

A token file is one long row of token ids, documents separated by the tokenizer's own end token. It is cut into
windows of fixed length, each seen once per epoch in an order that depends on seed and epoch alone: the batch of step
`n` is a function of (seed, n), so a run that was stopped continues exactly by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, read_json, replacing, write_json
from kvfold.errors import DataError, SettingError
from kvfold.inputs import LARGE, read_bytes
from kvfold.machine import best_device
from kvfold.progress import SILENT, Progress
from kvfold.text.documents import chat_of, limited, read_texts, text_facts

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
PIECE = 1 << 20  # characters handed to the tokenizer at once: its memory is some hundred times that
WHOLE = 1 << 24  # characters: a text up to here is tokenised whole, whatever part of it is asked for
SPREAD = 1 << 28  # characters of a text from which pieces are drawn, and held in memory for it
DRAWN = 1 << 12  # characters of such a piece: some rows of a calibration
SAMPLED, LONGEST_SAMPLE = 32, 512  # documents sampled at a time, and tokens of one


# --- token files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """A row of token ids on disk: `vocab_size` is one more than the largest id that it may hold."""

    path: Path
    tokens: np.ndarray[Any, Any] = field(repr=False)
    vocab_size: int
    hash: str  # of the text, or of what it was sampled from
    source: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def read_tokens(self) -> int:
        """Tokens that a model reads of it."""
        return len(self.tokens)

    def windows(self, length: int) -> int:
        """Windows of `length` tokens that each have a next token to predict."""
        return (len(self.tokens) - 1) // length

    def check(self, *, batch_size: int, length: int, vocab_size: int) -> None:
        """Refuse a text shorter than one batch, and ids that the model has no embedding for, with DataError."""
        if self.windows(length) < batch_size:
            raise DataError(
                "the text is shorter than one batch",
                where=self.source,
                got=f"{len(self):,} tokens",
                allowed=f"at least {batch_size * length + 1:,}",
                next="give more text, or a smaller batch or sequence length",
            )
        if self.vocab_size > vocab_size:
            raise DataError(
                "the tokenizer knows more tokens than the model has embeddings",
                where=self.source,
                got=f"{self.vocab_size:,}",
                allowed=f"at most {vocab_size:,}",
                next="use the tokenizer that the model was trained with",
            )

    def batch(self, step: int, *, seed: int, batch_size: int, length: int) -> Tensor:
        """The `ids_BT` of a step, `length + 1` wide: inputs and targets overlap by `length - 1` tokens."""
        windows = self.windows(length)
        rows = np.empty((batch_size, length + 1), dtype=np.int64)
        for row in range(batch_size):
            epoch, index = divmod(step * batch_size + row, windows)
            start = int(order(windows, seed, epoch)[index]) * length
            rows[row] = self.tokens[start : start + length + 1]
        return torch.from_numpy(rows)


@lru_cache(maxsize=4)
def order(windows: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """The order in which an epoch sees its windows: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


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
    """A text as tokens, or the first `max_tokens` of them, packed; tokenised once for each text and tokenizer.

    Of a text that is longer than what `enough` tokens surely take, the rest is not read. With `spread`, `max_tokens`
    are pieces drawn from all over the text with `seed`, and not its beginning. `self` is that many tokens sampled from
    `teacher` with `seed`. Raises DataError when there is no text or no tokenizer, SettingError when `self` lacks what
    it needs, OutputError when the cache cannot be written.
    """
    from kvfold import hf  # loads transformers: not for those who only read text

    tokenizer = hf.load_tokenizer(tokenizer_dir)
    sampled = str(source) == "self"
    # a token is longer than this only in tables and blanks: reading stops there, however long the source is
    wanted = max_tokens or enough
    limit = SPREAD if spread else None if wanted is None else max(32 * wanted, WHOLE)
    if sampled:
        if teacher is None or wanted is None:
            raise SettingError("text `self` is a number of tokens sampled from a teacher", next="give both")
        from kvfold.disk.checkpoint import Checkpoint

        identity = f"self:{Checkpoint.open(teacher).hash()}:{seed}:{wanted}"
    else:
        chat = chat_of(tokenizer)
        facts = text_facts(source, limit, chat=chat)
        for line in facts.told:
            progress.say(line)
        identity = f"{facts.hash}:{wanted}:{seed}" if spread else facts.hash
    key = fingerprint([FORMAT, identity, tokenizer_hash(tokenizer)])[:32]
    path = Path(cache_dir or cache_folder()) / "tokens" / f"{key}.bin"
    if read_json(path.with_suffix(".json")) is None:
        with disk_errors(path):
            prepare_cache(path.parent)
            if sampled:
                assert teacher is not None
                assert wanted is not None
                rows = _sample(teacher, tokenizer, wanted, seed, progress)
            elif spread:
                assert wanted is not None
                rows = _draw(limited(read_texts(source, chat=chat), limit), tokenizer, wanted, seed, progress)
            else:
                rows = _tokenise(limited(read_texts(source, chat=chat), limit), tokenizer, facts.characters, progress)
            _write(path, rows, tokenizer, identity)
    return open_token_file(path, str(source), max_tokens)


def open_token_file(path: Path, source: str, max_tokens: int | None = None) -> TokenFile:
    """Map a token file into memory. Raises DataError when it is not what was written."""
    facts = _facts(path)
    if facts is None:
        raise DataError("a token file of the cache is damaged", where=path, next="delete it; it is made anew")
    tokens = np.memmap(path, dtype=facts["dtype"], mode="r")
    return TokenFile(path, tokens[:max_tokens], int(facts["vocab_size"]), str(facts["hash"]), source)


def _facts(path: Path) -> dict[str, Any] | None:
    """What is known of a token file; None when it is not there, or not what was written."""
    facts = read_json(path.with_suffix(".json"))
    if not isinstance(facts, dict) or facts.get("dtype") not in ("uint16", "uint32") or not path.is_file():
        return None
    counts = facts.get("tokens"), facts.get("vocab_size")
    if any(type(count) is not int or count < 1 for count in counts) or not isinstance(facts.get("hash"), str):
        return None
    return facts if path.stat().st_size == facts["tokens"] * np.dtype(facts["dtype"]).itemsize else None


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of everything that decides the ids of a text: definition, tokens put around texts, and how it splits them.

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
    """Write rows of ids one after the other, and the facts last: without them the file does not exist."""
    written, largest = 0, 0
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    with replacing(path) as sibling, sibling.open("wb") as file:
        for row in rows:
            ids = np.asarray(row, dtype=dtype)
            file.write(ids.tobytes())
            written, largest = written + len(ids), max(largest, int(ids.max(initial=0)))
    # tokens that were added to a vocabulary, and that no model has an embedding for, count when the text uses them
    vocabulary = max(int(tokenizer.vocab_size), largest + 1)
    write_json(
        path.with_suffix(".json"), {"tokens": written, "dtype": dtype, "vocab_size": vocabulary, "hash": identity}
    )


def _tokenise(texts: Iterable[str], tokenizer: Any, characters: int, progress: Progress) -> Iterator[list[int]]:
    """Ids of each document: what the tokenizer itself puts before a text, the text, the end token."""
    end = tokenizer.eos_token_id
    before = [token for token in tokenizer("")["input_ids"] if token != end]
    progress.start("tokenise", characters, "characters")
    try:
        for text in texts:
            yield before
            for piece in _pieces(text, PIECE):
                yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                progress.advance(len(piece))
            if end is not None:
                yield [end]
    finally:
        progress.stop()


def _draw(texts: Iterable[str], tokenizer: Any, tokens: int, seed: int, progress: Progress) -> Iterator[list[int]]:
    """Ids of pieces of the documents in an order drawn with `seed`, until there are enough."""
    end = tokenizer.eos_token_id
    before = [token for token in tokenizer("")["input_ids"] if token != end]
    pieces = [piece for text in texts for piece in _pieces(text, DRAWN)]
    written = 0
    progress.start("tokenise", tokens, "tokens")
    try:
        for index in np.random.default_rng(seed).permutation(len(pieces)):
            ids = [*before, *tokenizer(pieces[index], add_special_tokens=False, verbose=False)["input_ids"]]
            ids = ids[: tokens - written]
            written += len(ids)
            progress.advance(len(ids))
            yield ids
            if written == tokens:
                return
    finally:
        progress.stop()


def _pieces(text: str, size: int) -> Iterator[str]:
    """A text in pieces of about `size` characters that end at a line's end where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line = text.rfind("\n", start, end)
            end = line + 1 if line > start else end
        yield text[start:end]
        start = end


def _sample(teacher: str | Path, tokenizer: Any, tokens: int, seed: int, progress: Progress) -> Iterator[list[int]]:
    """Documents that a model writes from its first token on, at temperature 1, `SAMPLED` at a time."""
    from kvfold import hf

    end = tokenizer.eos_token_id
    first = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise DataError("the tokenizer has neither a first nor an end token to sample from", where=teacher)
    device = best_device()
    model = hf.load(teacher, device=device)
    length = min(int(model.config.max_position_embeddings), LONGEST_SAMPLE) - 1  # type: ignore[union-attr,arg-type]
    start_B1 = torch.full((SAMPLED, 1), first, device=device)
    written = 0
    progress.start("sample from the teacher", tokens, "tokens")
    try:
        with torch.random.fork_rng():
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
    finally:
        progress.stop()
