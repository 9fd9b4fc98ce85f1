"""Calibration: the teacher reads a little text once, and answers what a method requested of it.

Every answer is a sum over tokens of bounded size, taken in float64 while the teacher runs: raw activations are never
kept. Rows of text are read one at a time, so the answers do not depend on how rows are batched. They are kept in
kvfold's cache folder, by the hashes of teacher, text, settings and requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvfold.checkpoint import Checkpoint
from kvfold.data import TokenFile
from kvfold.errors import CheckpointError, SettingError
from kvfold.output import cache_folder, disk_errors, fingerprint
from kvfold.progress import SILENT, Progress
from kvfold.roofline import processor_memory
from kvfold.shape import (
    DTYPE_BYTES,
    Answers,
    Attention,
    AttentionGram,
    CrossGram,
    InputGram,
    QueryGram,
    Request,
    SampledPairs,
    Shape,
    Site,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1  # of the kept answers
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
        default=None, metadata={"help": "Memory that teacher and answers may take; 80% of the device's."}
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
    tokens: TokenFile,
    settings: CalibrationSettings = CalibrationSettings(),
    *,
    progress: Progress = SILENT,
) -> Answers:
    """Answer the requests from one pass of the teacher over all tokens of a file, or from the cache folder.

    Raises SettingError when teacher and answers do not fit into memory or a request cannot be answered, DataError
    when the text does not suit the model, CheckpointError when an answer is not finite.
    """
    asked = sorted(set(requests), key=repr)
    tokens.check(batch_size=1, length=1, vocab_size=source.shape.vocab_size)
    device = _device(settings)
    identity = [FORMAT, source.hash(progress), calibration_hash(tokens, settings), device, [repr(r) for r in asked]]
    path = cache_folder() / "calibration" / f"{fingerprint(identity)[:32]}.safetensors"
    kept = _recall(path, asked)
    if kept is None:
        length = min(settings.length, source.shape.max_positions)
        rows = (
            torch.from_numpy(tokens.tokens[at : at + length].astype("int64"))[None]
            for at in range(0, len(tokens), length)
        )
        kept = read(source, asked, rows, settings, total=len(tokens), progress=progress)
        _keep(path, asked, kept)
    return kept


def calibration_hash(tokens: TokenFile, settings: CalibrationSettings = CalibrationSettings()) -> str:
    """What a calibration reads and how, whatever the machine: known before it is done."""
    how = {name: value for name, value in asdict(settings).items() if name not in ("device", "max_bytes")}
    return fingerprint([tokens.hash, len(tokens), how])


def memory_bytes(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings) -> int:
    """Bytes that a calibration needs: the teacher, the answers, and what one row of text leaves behind."""
    asked, itemsize = set(requests), DTYPE_BYTES[settings.dtype]
    length = min(settings.length, shape.max_positions)
    held = {site for request in asked if isinstance(request, CrossGram) for site in (request.first, request.second)}
    row = length * shape.hidden_size * (len(held) + 16) * itemsize
    if any(isinstance(request, AttentionGram) for request in asked):
        heads = max(attention.num_attention_heads for attention in shape.sites.values())
        row += 3 * heads * length**2 * itemsize  # logits, their float32 softmax, and the probabilities
    return shape.parameters * itemsize + sum(request.bytes(shape) for request in asked) + row


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

    Raises SettingError and CheckpointError as `calibrate` does.
    """
    from kvfold import hf  # loads transformers: what is kept is answered without it

    device = _device(settings)
    _check_memory(source.shape, requests, settings, device)
    wanted = max((request.count for request in requests if isinstance(request, SampledPairs)), default=0)
    if wanted > total:
        raise SettingError(
            f"{wanted:,} sampled tokens were asked for",
            where="calibrate",
            got=f"{total:,} tokens of text",
            next="give more text, or more calibration tokens",
        )
    probabilities = any(isinstance(request, AttentionGram) for request in requests)
    model = hf.load(source.path, dtype=settings.dtype, device=device, attention="eager" if probabilities else "sdpa")
    reading = _Reading(source, requests, settings.seed, device)
    reading.listen(model)
    progress.start("calibrating", total, "tokens")
    try:
        with torch.inference_mode():
            for ids_BT in batches:
                for ids_T in ids_BT:
                    reading.begin(len(ids_T))
                    cast(Any, model).base_model(ids_T[None].to(device), use_cache=False)
                    reading.end()
                    progress.advance(len(ids_T))
    finally:
        progress.stop()
    return reading.answers()


class _Reading:
    """The sums of one pass. What a site shows of a row is used as soon as the site is done, and dropped."""

    def __init__(self, source: Checkpoint, requests: Sequence[Request], seed: int, device: str) -> None:
        self.source, self.device = source, device
        self.sums = {request: _SUMS[type(request)](request, source.shape, device) for request in requests}
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = 0
        self.row: dict[tuple[Site, str], Tensor] = {}  # what this row has shown so far

    def listen(self, model: nn.Module) -> None:
        """Put hooks on the modules whose inputs and outputs the sums look at."""
        looks = {look for request in self.sums for look in _looks(request)}
        for site, what in looks:
            attention, family = self.source.shape.sites[site], self.source.family
            if what == "x":
                module = model.get_submodule(family.tensor(site, "k").removesuffix(".weight"))
                module.register_forward_pre_hook(self._input(site))
            elif what == "p":
                model.get_submodule(family.module(site)).register_forward_hook(self._output(site, what, part=1))
            else:
                role = f"{what}_norm" if attention.norms == "pre_rope" else what
                module = model.get_submodule(family.tensor(site, role).removesuffix(".weight"))
                module.register_forward_hook(self._output(site, what))
        for site in {site for site, _ in looks}:  # after the hooks above: a module calls its hooks in order
            model.get_submodule(self.source.family.module(site)).register_forward_hook(self._done(site))

    def _input(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.row[site, "x"] = inputs[0][0]

        return hook

    def _output(self, site: Site, what: str, part: int | None = None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            self.row[site, what] = (output if part is None else output[part])[0]

        return hook

    def _done(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            self._add(request for request in self.sums if getattr(request, "site", None) == site)
            for what in "qkp":
                self.row.pop((site, what), None)

        return hook

    def _add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.sums[request].add(*(self.row[look] for look in _looks(request)), sample=self.sample)

    def begin(self, length: int) -> None:
        """A row of this length begins: draw a number for each of its tokens, by which some are sampled."""
        self.sample = torch.rand(length, generator=self.generator, dtype=torch.float64)

    def end(self) -> None:
        """A row has been read."""
        self._add(request for request in self.sums if isinstance(request, CrossGram))
        self.tokens += len(self.sample)
        self.row.clear()

    def answers(self) -> Answers:
        """The answers, on the processor. Raises CheckpointError when one is not finite."""
        found = {}
        for request, total in self.sums.items():
            found[request] = {name: tensor.cpu() for name, tensor in total.answer(self.tokens).items()}
            if not all(bool(tensor.isfinite().all()) for tensor in found[request].values()):
                raise CheckpointError(
                    "the teacher's activations are not finite", where=self.source.path, got=request, next="try float32"
                )
        return found


def _looks(request: Request) -> tuple[tuple[Site, str], ...]:
    """What a request looks at: a site's input `x`, its queries `q` and keys `k` before rotation, its attention `p`."""
    match request:
        case InputGram(site):
            return ((site, "x"),)
        case QueryGram(site):
            return ((site, "q"),)
        case AttentionGram(site):
            return ((site, "x"), (site, "p"))
        case CrossGram(first, second):
            return ((first, "x"), (second, "x"))
        case SampledPairs(site):
            return ((site, "q"), (site, "k"))


# --- the sums, one class per request --------------------------------------------------------------------------------


class _InputSum:
    """Sums of `x x^T` and `x`."""

    def __init__(self, request: InputGram, shape: Shape, device: str) -> None:
        width = shape.sites[request.site].hidden_size
        self.gram_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x_TD: Tensor, *, sample: Tensor) -> None:
        x_TD = x_TD.double()
        self.gram_DD.addmm_(x_TD.T, x_TD)
        self.sum_D += x_TD.sum(0)

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_DD": self.gram_DD / tokens, "mean_D": self.sum_D / tokens}


class _CrossSum:
    """Sum of `x_first x_second^T`."""

    def __init__(self, request: CrossGram, shape: Shape, device: str) -> None:
        sides = (shape.sites[site].hidden_size for site in (request.first, request.second))
        self.gram_DD = torch.zeros(*sides, dtype=torch.float64, device=device)

    def add(self, first_TD: Tensor, second_TD: Tensor, *, sample: Tensor) -> None:
        self.gram_DD.addmm_(first_TD.double().T, second_TD.double())

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_DD": self.gram_DD / tokens}


class _QuerySum:
    """Sum of `q q^T` by head."""

    def __init__(self, request: QueryGram, shape: Shape, device: str) -> None:
        self.site = shape.sites[request.site]
        heads, width = self.site.num_attention_heads, self.site.head_dim
        self.gram_HEE = torch.zeros(heads, width, width, dtype=torch.float64, device=device)

    def add(self, q: Tensor, *, sample: Tensor) -> None:
        q_HTE = _heads(q, self.site).double().transpose(0, 1)
        self.gram_HEE.baddbmm_(q_HTE.mT, q_HTE)

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_HEE": self.gram_HEE / tokens}


class _AttentionSum:
    """Sum of `y y^T` by head, `y` being the inputs averaged by the head's attention."""

    def __init__(self, request: AttentionGram, shape: Shape, device: str) -> None:
        site = shape.sites[request.site]
        width = site.hidden_size
        self.gram_HDD = torch.zeros(site.num_attention_heads, width, width, dtype=torch.float64, device=device)

    def add(self, x_TD: Tensor, p_HTT: Tensor, *, sample: Tensor) -> None:
        x_TD = x_TD.double()
        for gram_DD, p_TT in zip(self.gram_HDD, p_HTT, strict=True):  # one head at a time bounds the memory
            y_TD = p_TT.double() @ x_TD
            gram_DD.addmm_(y_TD.T, y_TD)

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_HDD": self.gram_HDD / tokens}


class _Sample:
    """The tokens with the `count` smallest of the numbers drawn, a uniform sample; all sites see the same tokens."""

    def __init__(self, request: SampledPairs, shape: Shape, device: str) -> None:
        self.request, self.site, self.seen = request, shape.sites[request.site], 0
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, q: Tensor, k: Tensor, *, sample: Tensor) -> None:
        chosen = sample.topk(min(self.request.count, len(sample)), largest=False).indices
        q_NHE, k_NGE = (_heads(part, self.site)[chosen.to(part.device)].float().cpu() for part in (q, k))
        self.parts.append((sample[chosen], self.seen + chosen, chosen, q_NHE, k_NGE))
        self.seen += len(sample)
        if sum(len(part[0]) for part in self.parts) > 2 * self.request.count:
            self._shrink()

    def _shrink(self) -> None:
        drawn, *rest = (torch.cat(pieces) for pieces in zip(*self.parts, strict=True))
        best = drawn.topk(min(self.request.count, len(drawn)), largest=False).indices
        self.parts = [tuple(piece[best] for piece in (drawn, *rest))]

    def answer(self, tokens: int) -> dict[str, Tensor]:
        self._shrink()
        _, index, position, q_NHE, k_NGE = self.parts[0]
        order = index.argsort()
        return {"q_NHE": q_NHE[order], "k_NGE": k_NGE[order], "position_N": position[order]}


_SUMS: dict[type[Any], Callable[[Any, Shape, str], Any]] = {
    InputGram: _InputSum,
    CrossGram: _CrossSum,
    QueryGram: _QuerySum,
    AttentionGram: _AttentionSum,
    SampledPairs: _Sample,
}


def _heads(tensor: Tensor, site: Attention) -> Tensor:
    """Split `(T, heads E)` into `(T, heads, E)`; a module that splits already is left as it is."""
    return tensor.reshape(len(tensor), -1, site.head_dim)


# --- memory and the kept answers ------------------------------------------------------------------------------------


def _device(settings: CalibrationSettings) -> str:
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def _check_memory(shape: Shape, requests: Iterable[Request], settings: CalibrationSettings, device: str) -> None:
    """Refuse what would not fit, before anything is loaded."""
    whole = processor_memory() if device == "cpu" else int(torch.cuda.get_device_properties(0).total_memory)
    limit = settings.max_bytes or int(MEMORY_SHARE * whole)
    needed = memory_bytes(shape, requests, settings)
    if needed > limit:
        raise SettingError(
            "the teacher and its answers do not fit into memory",
            where="calibrate",
            got=f"{needed:,} bytes",
            allowed=f"{limit:,}",
            next="calibrate on a larger machine, or raise max_bytes",
        )


def _keep(path: Path, requests: Sequence[Request], answers: Answers) -> None:
    flat = {f"{n}.{name}": t.contiguous() for n, request in enumerate(requests) for name, t in answers[request].items()}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sibling = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(flat, sibling)
        os.replace(sibling, path)


def _recall(path: Path, requests: Sequence[Request]) -> Answers | None:
    """The answers that were kept, or None when there are none or the file is damaged."""
    if not path.exists():
        return None
    found: dict[Request, dict[str, Tensor]] = {request: {} for request in requests}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                number, name = key.split(".")
                found[requests[int(number)]][name] = file.get_tensor(key)
    except SafetensorError:
        return None
    return found
