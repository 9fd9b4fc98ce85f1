"""Calibration of a decoder, one layer at a time.

All of the text passes through one layer and then through the next. One layer is in memory, hidden states wait on disk,
and the teacher may be larger than memory. Every answer is a sum over tokens of bounded size. Answers are kept in
kvfold's cache folder, by the hashes of teacher, text, settings and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvfold import ranks
from kvfold.calibrate import CalibrationSettings
from kvfold.calibrate.statistics import SEED, Signal, Sums, signals, watch
from kvfold.contracts.family import MLP
from kvfold.contracts.requests import Answers, AttentionGram, CrossGram, InputGram, Question, Request, SampledPairs
from kvfold.contracts.site import DTYPE_BYTES, Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, replacing
from kvfold.disk.spool import Spool, check_room, spool_bytes
from kvfold.errors import SettingError
from kvfold.machine import best_device, device_memory
from kvfold.progress import SILENT, Progress, task
from kvfold.text.pairs import Corpus
from kvfold.text.tokens import TokenFile

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.hf import Layers

FORMAT = 4  # of the kept answers
BATCH = 2048  # tokens of one batch: neighbouring rows of one length
MEMORY_SHARE = 0.8  # of the device's memory, unless the settings give a limit


def calibrate(
    source: Checkpoint,
    requests: Sequence[Request],
    tokens: TokenFile | Corpus,
    settings: CalibrationSettings = CalibrationSettings(),
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests by one pass of the teacher over `moment_tokens` tokens, or from the cache folder.

    An encoder-decoder reads all of its text.

    Raises SettingError if a layer (of an encoder-decoder: the model) and the answers do not fit into memory, or if a
    request cannot be answered; OutputError if the disk has no room for the hidden states; DataError if the text does
    not suit the model; CheckpointError if an answer is not finite.
    """
    asked = sorted(set(requests), key=repr)
    length, device = min(settings.length, source.known_length), best_device()
    paired = not isinstance(tokens, TokenFile)
    tokens.check(batch_size=1, length=length if paired else 1, vocab_size=source.shape.vocab_size)
    path = kept_at(source, asked, tokens, settings, progress)
    kept = _load(path, asked)
    if kept is None:
        _check_memory(source.shape, asked, settings, device)
        kept = ranks.everywhere(_read, source, asked, tokens, settings, progress=progress)
        _save(path, asked, kept)
    return kept


def kept_at(
    source: Checkpoint,
    requests: Iterable[Request],
    tokens: TokenFile | Corpus,
    settings: CalibrationSettings,
    progress: Progress = SILENT,
) -> Path:
    """The file of the cache folder that has the answers to these requests, once they are measured."""
    part = [settings.moment_tokens] if settings.moment_tokens < len(tokens) else []
    text = [calibration_hash(tokens, settings), *part, best_device()]
    identity = [FORMAT, source.hash(progress), *text, sorted({repr(each) for each in requests})]
    return cache_folder() / "calibration" / f"{fingerprint(identity)[:32]}.safetensors"


def _read(
    source: Checkpoint,
    requests: Sequence[Request],
    tokens: TokenFile | Corpus,
    settings: CalibrationSettings,
    *,
    progress: Progress,
) -> Answers:
    """Answer the requests on all ranks, by one pass over their shares of the text; rank 0 has the answers."""
    length = min(settings.length, source.known_length)
    if isinstance(tokens, TokenFile):
        sampled = [request.count for request in requests if isinstance(request, SampledPairs)]
        read_N = tokens.tokens[: max(settings.moment_tokens, *sampled, 0)]
        rows = torch.split(torch.from_numpy(read_N.astype("int64")), length)
        return read(source, requests, rows, settings, progress=progress)
    from kvfold.calibrate import encoder_decoder

    pairs = tokens.rows(length, SEED)
    return encoder_decoder.read(source, requests, pairs, dtype=settings.dtype, device=best_device(), progress=progress)


def calibration_hash(tokens: TokenFile | Corpus, settings: CalibrationSettings = CalibrationSettings()) -> str:
    """The hash of a text and of how it is read, on any machine."""
    how = {"length": settings.length, "dtype": settings.dtype, "seed": SEED}
    return fingerprint([tokens.hash, len(tokens), how])


def directions(source: Checkpoint, questions: Iterable[Question], repaired: Iterable[str]) -> tuple[int, int]:
    """The directions of the widest input that is regressed on, and the tokens that are sampled."""
    asked = list(questions)
    widths = [
        source.shape.sites[site].input_width + 1
        for each in asked
        if isinstance(each, InputGram | AttentionGram | CrossGram)
        for site, _ in signals(each)
    ]
    for role in repaired:
        if role in MLP and role not in source.family.body.mlp:
            continue  # the repair refuses it
        widths.append(source.spec(source.family.tensor(Site(0), role)).shape[1])
    samples = (each.count for each in asked if isinstance(each, SampledPairs))
    return max(widths, default=0), max(samples, default=0)


def check_enough(needed: int, tokens: TokenFile | Corpus) -> None:
    """Raise SettingError for fewer tokens than the inputs have directions.

    A second moment of N tokens has at most rank N, one less about its mean, and does not determine a larger regression.
    """
    if tokens.read_tokens < needed:
        raise SettingError(
            "there are too few calibration tokens to determine what is fitted",
            where="calibration",
            got=f"{tokens.read_tokens:,} tokens",
            allowed=f"at least {needed:,}, the directions of an input",
            next="give a longer text, or raise --calibration-tokens of a conversion",
        )


# --- the pass -------------------------------------------------------------------------------------------------------


def read(
    source: Checkpoint,
    requests: Sequence[Request],
    rows: Sequence[Tensor],
    settings: CalibrationSettings,
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests by one pass of the teacher over rows `ids_T`, without the cache.

    Each rank reads its share of the rows; rank 0 has the answers. Raises SettingError, CheckpointError and OutputError
    as `calibrate` does.
    """
    from kvfold import hf  # loads transformers, which answers from the cache do not need

    lengths = [len(ids_T) for ids_T in rows]
    total = sum(lengths)
    check_room(disk_bytes(source.shape, requests, settings, total))
    wanted = max((request.count for request in requests if isinstance(request, SampledPairs)), default=0)
    if wanted > total:
        raise SettingError(
            f"{wanted:,} tokens cannot be sampled",
            where="calibrate",
            got=f"{total:,} tokens of text",
            next="give more text, or more calibration tokens",
        )
    device, needed = best_device(), 1 + max(map(_layer, requests), default=-1)
    own = _share(rows)
    mine = [len(ids_T) for ids_T in rows[own]]
    with (
        hf.Layers(
            source, dtype=settings.dtype, device=device, attention=hf.WATCHED, lengths=mine, in_turn=needed
        ) as layers,
        _Pass(layers, rows, own, settings) as work,
        torch.inference_mode(),
        task(progress, "calibrating", total * needed, "tokens"),
    ):
        for number in range(needed):
            for tokens in work.layer(number, requests):
                progress.advance(tokens * total / sum(mine), f"layer {number + 1} of {needed}")
    return work.found


def _share(rows: Sequence[Tensor]) -> slice:
    """The rows of this rank: whole batches in a row, as one rank would read them."""
    batch = max(1, BATCH // len(rows[0]))
    own = ranks.current().share(-(-len(rows) // batch))
    return slice(own.start * batch, own.stop * batch)


class _Pass(ExitStack):
    """Layer after layer, this rank's `own` rows: the hidden states between layers are on disk."""

    def __init__(self, layers: Layers, rows: Sequence[Tensor], own: slice, settings: CalibrationSettings) -> None:
        super().__init__()
        self.layers, self.rows, self.dtype, self.source = layers, rows[own], settings.dtype, layers.source
        self.all_lengths = [len(ids_T) for ids_T in rows]
        self.lengths, self.first = self.all_lengths[own], sum(self.all_lengths[: own.start])
        self.found: dict[Question, Mapping[str, Tensor]] = {}
        self.inputs: dict[Site, Spool] = {}  # of sites below, for CrossGram with a site above
        self.hidden = self._spool()

    def _spool(self) -> Spool:
        return self.enter_context(Spool(self.lengths, self.source.shape.hidden_size, self.dtype))

    def layer(self, number: int, requests: Sequence[Request]) -> Iterator[int]:
        """Pass the rows through a layer and answer its requests. Yields the tokens of each batch.

        Raises CheckpointError if an answer is not finite.
        """
        from kvfold import hf

        device, ahead = self.layers.device, [request for request in requests if _layer(request) > number]
        asked = [request for request in requests if _layer(request) == number]
        sums = Sums(asked, self.source.shape, str(device), self.all_lengths, self.first)
        waiting = _waiting(ahead)
        kept = {site: self._spool() for site in sorted(waiting) if site.layer == number}
        self.inputs |= kept
        seen: dict[Signal, Tensor] = {}
        layer, takers = self.layers.open(number), {}
        wanted = {signal for request in asked for signal in signals(request)} | {(site, "x") for site in kept}
        for signal in wanted:
            if signal[0].layer == number:
                name, hook = watch(self.source, signal, seen)
                if signal[1] == "p":
                    takers[layer.owner(name)] = partial(seen.__setitem__, signal)
                else:
                    layer.owner(name).register_forward_hook(hook)
        for row, count in self.hidden.batches(BATCH):
            if number == 0:
                hidden_BTD = self.layers.embed(torch.stack(list(self.rows[row : row + count])))
            else:
                hidden_BTD = self.hidden.read(row, count)
            with hf.probabilities(takers):
                hidden_BTD = layer.run(hidden_BTD, row)
            for signal in wanted - seen.keys():
                seen[signal] = self.inputs[signal[0]].read(row, count).to(device)
            sums.add(seen)
            for site, spool in kept.items():
                spool.write(row, seen[site, "x"])
            if ahead:
                self.hidden.write(row, hidden_BTD)
            seen.clear()
            yield count * self.lengths[row]
        self.found |= sums.answers(lambda request: sum(self.all_lengths), self.source.path)
        for site in self.inputs.keys() - waiting:
            self.inputs.pop(site).close()


def _layer(request: Request) -> int:
    """The layer at which a request can be answered."""
    return max(site.layer for site, _ in signals(request))


def _waiting(requests: Iterable[Request]) -> set[Site]:
    """The sites whose inputs are kept for the requests of a later layer."""
    return {site for request in requests for site, _ in signals(request) if site.layer < _layer(request)}


# --- memory and the cache folder ------------------------------------------------------------------------------------


def memory_bytes(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings) -> int:
    """Bytes of memory of a calibration: the embedding, the largest layer, the answers, and the activations of a batch.

    Of an encoder-decoder, the whole model.
    """
    asked, itemsize = set(requests), DTYPE_BYTES[settings.dtype]
    embedding = shape.vocab_size * shape.hidden_size
    if shape.encoder_parameters:
        layer = shape.parameters - embedding
    else:
        attentions = [0] * shape.num_layers
        for site, attention in shape.sites.items():
            attentions[site.layer] += attention.parameters
        rest = shape.parameters - sum(attentions) - embedding  # an output projection counts as if it lay in layers
        layer = max(attentions) + -(-rest // shape.num_layers)
    length = min(settings.length, shape.max_positions)
    tokens = max(length, BATCH)
    batch = tokens * shape.hidden_size * (20 * itemsize + 16)  # activations, and inputs in float64
    if any(isinstance(request, AttentionGram) for request in asked):
        batch += 3 * tokens * length * itemsize  # of one head at each token: logits, their softmax, and a mask
    return (embedding + layer) * itemsize + sum(request.bytes(shape) for request in asked) + batch


def _check_memory(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings, device: str) -> None:
    """Raise SettingError if a calibration does not fit into memory."""
    limit = settings.max_bytes or int(MEMORY_SHARE * device_memory(device))
    needed = memory_bytes(shape, requests, settings)
    if needed > limit:
        raise SettingError(
            "a layer of the teacher and the answers do not fit into memory",
            where="calibrate",
            got=f"{needed:,} bytes",
            allowed=f"{limit:,}",
            next="calibrate on a larger machine, or raise --calibration-memory",
        )


def disk_bytes(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings, tokens: int) -> int:
    """Bytes on disk of a calibration: hidden states, inputs kept for later layers, keys and values shared by layers."""
    width = (1 + len(_waiting(requests))) * shape.hidden_size + sum(shape.owners.values())
    return spool_bytes(tokens, width, settings.dtype)


def _save(path: Path, requests: Sequence[Request], answers: Answers) -> None:
    flat = {f"{n}.{name}": t.contiguous() for n, request in enumerate(requests) for name, t in answers[request].items()}
    with disk_errors(path):
        prepare_cache(path.parent)
        with replacing(path) as sibling:
            save_file(flat, sibling)


def _load(path: Path, requests: Sequence[Request]) -> Answers | None:
    """The answers of a file; None if there is none or it is damaged."""
    if not path.exists():
        return None
    found: dict[Question, dict[str, Tensor]] = {request: {} for request in requests}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                number, name = key.split(".")
                found[requests[int(number)]][name] = file.get_tensor(key)
    except (SafetensorError, ValueError, IndexError):  # the latter two for names that were not written here
        return None
    return found
