"""Calibration: the teacher reads a little text once, and answers what a method requested of it.

It reads layer by layer, all of the text through one layer and then the next: one layer is in memory at a time, hidden
states wait on disk, and the teacher may be larger than memory. Every answer is a sum over tokens of bounded size, taken
in float64; raw activations do not outlive the pass. Answers are kept in kvfold's cache folder, by the hashes of
teacher, text, settings and requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvfold.calibrate.statistics import Sampling, finite, looks, start
from kvfold.contracts.family import MLP
from kvfold.contracts.requests import Answers, AttentionGram, CrossGram, InputGram, Question, Request, SampledPairs
from kvfold.contracts.site import DTYPE_BYTES, Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.disk.lineage import known_length
from kvfold.disk.output import cache_folder, disk_errors, fingerprint, prepare_cache, replacing
from kvfold.disk.spool import Spool, check_room, spool_bytes
from kvfold.errors import CheckpointError, SettingError
from kvfold.machine import best_device, device_memory
from kvfold.progress import SILENT, Progress
from kvfold.text.pairs import Corpus
from kvfold.text.tokens import TokenFile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvfold.hf import Layer, Layers

FORMAT = 4  # of the kept answers
BATCH = 512  # tokens: neighbouring rows of one length are read together up to here
MEMORY_SHARE = 0.8  # of the device's memory, when max_bytes says nothing


@dataclass(frozen=True)
class CalibrationSettings:
    """How the teacher reads."""

    length: int = field(default=512, metadata={"help": "Tokens of a row; each row is read from its own beginning."})
    seed: int = field(default=0, metadata={"help": "Seed of the tokens that are sampled."})
    dtype: Literal["float32", "bfloat16", "float64"] = field(
        default="float32", metadata={"help": "Format in which the teacher computes; sums are float64."}
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "Where it computes."})
    max_bytes: int | None = field(
        default=None, metadata={"help": "Memory that a layer and the answers may take; 80% of the device's."}
    )

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be, with SettingError."""
        for name in ("length", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1", where="calibrate", got=value)


def calibrate(
    source: Checkpoint,
    requests: Sequence[Request],
    tokens: TokenFile | Corpus,
    settings: CalibrationSettings = CalibrationSettings(),
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests from one pass of the teacher over all tokens of a file, or from the cache folder.

    An encoder-decoder reads a corpus of pairs, all of it in memory at once.

    Raises SettingError when one layer and the answers do not fit into memory or a request cannot be answered,
    OutputError when the disk has no room for the hidden states of the text, DataError when the text does not suit the
    model, CheckpointError when an answer is not finite.
    """
    asked = sorted(set(requests), key=repr)
    length = min(settings.length, known_length(source))
    paired = not isinstance(tokens, TokenFile)
    tokens.check(batch_size=1, length=length if paired else 1, vocab_size=source.shape.vocab_size)
    device = _device(settings)
    identity = [FORMAT, source.hash(progress), calibration_hash(tokens, settings), device, [repr(r) for r in asked]]
    path = cache_folder() / "calibration" / f"{fingerprint(identity)[:32]}.safetensors"
    kept = _recall(path, asked)
    if kept is None:
        if isinstance(tokens, TokenFile):
            rows = (
                torch.from_numpy(tokens.tokens[at : at + length].astype("int64"))[None]
                for at in range(0, len(tokens), length)
            )
            kept = read(source, asked, rows, settings, total=len(tokens), progress=progress)
        else:
            from kvfold.calibrate import encoder_decoder

            _check_memory(source.shape, asked, settings, device)
            pairs = tokens.rows(length, settings.seed)
            kept = encoder_decoder.read(source, asked, pairs, dtype=settings.dtype, device=device, progress=progress)
        _keep(path, asked, kept)
    return kept


def calibration_hash(tokens: TokenFile | Corpus, settings: CalibrationSettings = CalibrationSettings()) -> str:
    """What a calibration reads and how, whatever the machine: known before it is done."""
    how = {name: value for name, value in asdict(settings).items() if name not in ("device", "max_bytes")}
    return fingerprint([tokens.hash, len(tokens), how])


def check_enough(
    source: Checkpoint, questions: Iterable[Question], repaired: Iterable[str], tokens: TokenFile | Corpus
) -> None:
    """Refuse fewer tokens than the inputs that are read have directions, with SettingError.

    A second moment of N tokens has rank N at most, and one less about its mean: of what was not read, no fit knows
    anything, and a regression on it is not determined.
    """
    widths = [
        source.shape.sites[site].input_width + 1
        for each in questions
        if isinstance(each, InputGram | AttentionGram | CrossGram)
        for site, _ in looks(each)
    ]
    for role in repaired:
        if role in MLP and role not in source.family.body.mlp:
            continue  # the repair refuses it
        widths.append(source.spec(source.family.tensor(Site(0), role)).shape[1])
    needed = max(widths, default=0)
    if tokens.read_tokens < needed:
        raise SettingError(
            "so few calibration tokens do not determine what is fitted: inputs have more directions",
            where="convert",
            got=f"{tokens.read_tokens:,} tokens",
            allowed=f"at least {needed:,}",
            next="raise --calibration-tokens, or give a longer text",
        )


def memory_bytes(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings) -> int:
    """Bytes that a calibration needs: the embedding, the largest layer, the answers, and what a batch leaves behind.

    An encoder-decoder is in memory whole.
    """
    asked, itemsize = set(requests), DTYPE_BYTES[settings.dtype]
    embedding = shape.vocab_size * shape.hidden_size
    if shape.encoder_parameters:
        layer = shape.parameters - embedding
    else:
        attentions = [0] * shape.num_layers
        for site, attention in shape.sites.items():
            attentions[site.layer] += attention.parameters
        rest = shape.parameters - sum(attentions) - embedding  # what is not of layers is counted as if it were
        layer = max(attentions) + -(-rest // shape.num_layers)
    length = min(settings.length, shape.max_positions)
    tokens = max(length, BATCH)
    batch = tokens * shape.hidden_size * (20 * itemsize + 16)  # activations, and inputs in float64
    if any(isinstance(request, AttentionGram) for request in asked):
        heads = max(attention.num_attention_heads for attention in shape.sites.values())
        batch += 3 * heads * tokens * length * itemsize  # logits, their float32 softmax, and the probabilities
    return (embedding + layer) * itemsize + sum(request.bytes(shape) for request in asked) + batch


def disk_bytes(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings, tokens: int) -> int:
    """Bytes on disk that a calibration of that many tokens needs: hidden states, inputs kept for later layers, and
    keys and values that layers share.
    """
    width = (1 + len(_waiting(requests))) * shape.hidden_size + sum(shape.owners.values())
    return spool_bytes(tokens, width, settings.dtype)


# --- the pass -------------------------------------------------------------------------------------------------------


def read(
    source: Checkpoint,
    requests: Sequence[Request],
    batches: Iterable[Tensor],
    settings: CalibrationSettings,
    *,
    total: int,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests from one pass of the teacher over batches `ids_BT` of `total` tokens, keeping nothing.

    Raises SettingError, CheckpointError and OutputError as `calibrate` does.
    """
    from kvfold import hf  # loads transformers: what is kept is answered without it

    device = _device(settings)
    _check_memory(source.shape, requests, settings, device)
    check_room(disk_bytes(source.shape, requests, settings, total))
    wanted = max((request.count for request in requests if isinstance(request, SampledPairs)), default=0)
    if wanted > total:
        raise SettingError(
            f"{wanted:,} sampled tokens were asked for",
            where="calibrate",
            got=f"{total:,} tokens of text",
            next="give more text, or more calibration tokens",
        )
    probabilities = any(isinstance(request, AttentionGram) for request in requests)
    attention = "eager" if probabilities else "sdpa"
    rows = [ids_T for ids_BT in batches for ids_T in ids_BT]
    lengths = [len(ids_T) for ids_T in rows]
    needed = 1 + max((_layer(request) for request in requests), default=-1)
    with (
        hf.Layers(source, dtype=settings.dtype, device=device, attention=attention, lengths=lengths) as layers,
        _Reading(layers, rows, settings) as reading,
        torch.inference_mode(),
    ):
        progress.start("calibrating", total * needed, "tokens")
        try:
            for number in range(needed):
                asked = [request for request in requests if _layer(request) == number]
                ahead = [request for request in requests if _layer(request) > number]
                note = f"layer {number + 1} of {needed}"
                for tokens in reading.read(number, asked, ahead):
                    progress.advance(tokens, note)
        finally:
            progress.stop()
    return {request: reading.found[request] for request in requests}


class _Reading:
    """One pass over the text, layer after layer: hidden states wait on disk, the sums of a layer end with it."""

    def __init__(self, layers: Layers, rows: Sequence[Tensor], settings: CalibrationSettings) -> None:
        self.layers, self.rows, self.dtype = layers, rows, settings.dtype
        self.shape, self.family = layers.source.shape, layers.source.family
        self.sampling = Sampling([len(ids_T) for ids_T in rows], settings.seed)
        self.found: dict[Request, dict[str, Tensor]] = {}
        self.open = ExitStack()
        self.kept: dict[Site, Spool] = {}  # inputs of earlier sites, which later ones are compared with

    def __enter__(self) -> _Reading:
        self.hidden = self._spool()
        return self

    def __exit__(self, *error: object) -> None:
        self.open.close()

    def _spool(self) -> Spool:
        return self.open.enter_context(Spool(self.sampling.lengths, self.shape.hidden_size, self.dtype))

    def read(self, number: int, asked: Sequence[Request], ahead: Sequence[Request]) -> Iterator[int]:
        """Run all rows through a layer and answer what is asked of it, keeping what later layers ask for.

        Yields the tokens of each batch. Raises CheckpointError when an answer is not finite.
        """
        device = str(self.layers.device)
        sums = {request: start(request, self.shape, device, self.sampling) for request in asked}
        waiting = _waiting(ahead)
        keep = {site: self._spool() for site in sorted(waiting) if site.layer == number}
        self.kept |= keep
        seen: dict[tuple[Site, str], Tensor] = {}
        layer = self.layers.open(number)
        here = {look for request in asked for look in looks(request)} | {(site, "x") for site in keep}
        self._listen(layer, {look for look in here if look[0].layer == number}, seen)
        for row, count in self.hidden.batches(BATCH):
            hidden_BTD = (
                self.layers.embed(torch.stack(list(self.rows[row : row + count])))
                if number == 0
                else self.hidden.read(row, count)
            )
            hidden_BTD = layer.run(hidden_BTD, row)
            for look in here - seen.keys():
                seen[look] = self.kept[look[0]].read(row, count).to(self.layers.device)
            for request, total in sums.items():
                total.add(*(seen[look] for look in looks(request)))
            for site, spool in keep.items():
                spool.write(row, seen[site, "x"])
            if ahead:
                self.hidden.write(row, hidden_BTD)
            seen.clear()
            yield count * self.sampling.lengths[row]
        for request, total in sums.items():
            answer = {name: tensor.cpu() for name, tensor in total.answer(sum(self.sampling.lengths)).items()}
            if not finite(answer):
                raise CheckpointError(
                    "the teacher's activations are not finite",
                    where=self.layers.source.path,
                    got=request,
                    next="try float32",
                )
            self.found[request] = answer
        for site in self.kept.keys() - waiting:
            self.kept.pop(site).close()

    def _listen(self, layer: Layer, wanted: Iterable[tuple[Site, str]], seen: dict[tuple[Site, str], Tensor]) -> None:
        """Put hooks on the modules of a layer whose inputs and outputs are looked at."""

        def show(look: tuple[Site, str]) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
                packed = self.family.packed(look[1]) if look[1] in "qk" else None
                if packed is not None:
                    output = packed.part(output.movedim(-1, 0), look[1], self.shape.sites[look[0]]).movedim(0, -1)
                seen[look] = inputs[0] if look[1] == "x" else output[1] if look[1] == "p" else output

            return hook

        for site, what in wanted:
            if what == "p":
                name = self.family.module(site)
            elif what == "x":
                name = self.family.tensor(site, "q" if self.shape.sites[site].source is not None else "k")
            else:
                role = f"{what}_norm" if self.shape.sites[site].norms != "none" else what
                name = self.family.tensor(site, role)
            layer.owner(name).register_forward_hook(show((site, what)))


def _layer(request: Request) -> int:
    """The layer at which a request can be answered."""
    return max(site.layer for site, _ in looks(request))


def _waiting(requests: Iterable[Request]) -> set[Site]:
    """The sites whose inputs are kept until a later layer, which they are compared with."""
    return {site for request in requests for site, _ in looks(request) if site.layer < _layer(request)}


# --- memory and the kept answers ------------------------------------------------------------------------------------


def _device(settings: CalibrationSettings) -> str:
    if settings.device == "auto":
        return best_device()
    return settings.device


def _check_memory(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings, device: str) -> None:
    """Refuse what would not fit, before anything is loaded."""
    limit = settings.max_bytes or int(MEMORY_SHARE * device_memory(device))
    needed = memory_bytes(shape, requests, settings)
    if needed > limit:
        raise SettingError(
            "a layer of the teacher and the answers do not fit into memory",
            where="calibrate",
            got=f"{needed:,} bytes",
            allowed=f"{limit:,}",
            next="calibrate on a larger machine, or raise max_bytes",
        )


def _keep(path: Path, requests: Sequence[Request], answers: Answers) -> None:
    flat = {f"{n}.{name}": t.contiguous() for n, request in enumerate(requests) for name, t in answers[request].items()}
    with disk_errors(path):
        prepare_cache(path.parent)
        with replacing(path) as sibling:
            save_file(flat, sibling)


def _recall(path: Path, requests: Sequence[Request]) -> Answers | None:
    """The answers that were kept, or None when there are none or the file is damaged."""
    if not path.exists():
        return None
    found: dict[Question, dict[str, Tensor]] = {request: {} for request in requests}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                number, name = key.split(".")
                found[requests[int(number)]][name] = file.get_tensor(key)
    except (SafetensorError, ValueError, IndexError):  # the latter two for names that are others than were written
        return None
    return found
