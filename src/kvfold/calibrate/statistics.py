"""The sums of a calibration, one for each request.

Sums over tokens are float64, whatever the dtype of the teacher. A Gram matrix is then positive semidefinite to the last
bit, and does not depend on the order of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvfold import ranks
from kvfold.contracts.requests import AttentionGram, CrossGram, InputGram, QueryGram, Question, Request, SampledPairs
from kvfold.contracts.site import Attention, Shape, Site
from kvfold.disk.checkpoint import Checkpoint
from kvfold.errors import CheckpointError

SEED = 0  # of the sampled tokens

Signal = tuple[Site, str]
"""What a request reads of a site: the input `x`, queries `q` and keys `k` before rotation, or the attention `p`."""


def signals(request: Request) -> tuple[Signal, ...]:
    """The signals that a request reads, in the order of the arguments of its sum."""
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


def watch(source: Checkpoint, signal: Signal, seen: dict[Signal, Tensor]) -> tuple[str, Callable[..., None]]:
    """A forward hook that puts a signal into `seen`, and the tensor or module whose module it belongs on."""
    (site, what), family = signal, source.family
    attention = source.shape.sites[site]
    normed = attention.norms != "none"

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if what in ("q", "k") and normed and family.heads_first:
            output = output.transpose(1, 2)
        seen[signal] = inputs[0] if what == "x" else output[1] if what == "p" else output

    if what == "p":
        return family.module(site), hook
    if what == "x":
        return family.alone(site, "k" if attention.source is None else "q"), hook
    return family.alone(site, f"{what}_norm" if normed else what), hook


class Sum(Protocol):
    """The unfinished answer to a request."""

    @property
    def add(self) -> Callable[..., None]:
        """Add the next rows of the text: one tensor `(B, T, ...)` for each signal."""

    def gather(self) -> None:
        """Take in the sums of the other ranks, on rank 0."""

    def answer(self, tokens: int) -> dict[str, Tensor]:
        """The answer after this number of tokens, by name."""


class Sums:
    """The sums of several requests on rows of these lengths, of which this rank reads those from token `start` on."""

    def __init__(
        self, requests: Iterable[Request], shape: Shape, device: str, lengths: Sequence[int] = (), start: int = 0
    ) -> None:
        self.of = {request: _start(request, shape, device, lengths, start) for request in requests}

    def add(self, seen: Mapping[Signal, Tensor]) -> None:
        """Add the next rows of the text to every sum."""
        for request, total in self.of.items():
            total.add(*(seen[signal] for signal in signals(request)))

    def answers(self, tokens: Callable[[Request], int], where: object) -> dict[Question, Mapping[str, Tensor]]:
        """All answers, on rank 0, after this number of tokens on all ranks.

        Raises CheckpointError if one is not finite.
        """
        found: dict[Question, Mapping[str, Tensor]] = {}
        for request, total in self.of.items():
            total.gather()
            if not ranks.current().main:
                continue
            found[request] = {name: tensor.cpu() for name, tensor in total.answer(tokens(request)).items()}
            if not all(bool(tensor.isfinite().all()) for tensor in found[request].values()):
                raise CheckpointError(
                    "the teacher's activations are not finite",
                    where=where,
                    got=request,
                    next="try --calibration-dtype float32",
                )
        return found


def _start(request: Request, shape: Shape, device: str, lengths: Sequence[int], start: int) -> Sum:
    sites = shape.sites
    match request:
        case InputGram(site) | AttentionGram(site):
            operands = _rows if isinstance(request, InputGram) else _averaged
            return _Gram("gram_DD", (sites[site].input_width,) * 2, device, operands, mean=True)
        case CrossGram(first, second):
            return _Gram("gram_DD", (sites[first].input_width, sites[second].input_width), device, _rows)
        case QueryGram(site):
            heads, width = sites[site].num_attention_heads, sites[site].head_dim
            return _Gram("gram_HEE", (heads, width, width), device, lambda q: [_heads(q, width).transpose(0, 1)])
        case SampledPairs(site, count):
            return _Sample(sites[site], *choose(lengths, count), start)


class _Gram:
    """The sum of `x^T y`, by head for operands `(H, N, E)`, or of `x^T x` for a single operand; `mean`: and of `x`."""

    def __init__(
        self,
        name: str,
        size: Sequence[int],
        device: str,
        operands: Callable[..., Sequence[Tensor]],
        *,
        mean: bool = False,
    ) -> None:
        self.name, self.operands = name, operands
        self.gram = torch.zeros(*size, dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(size[-1], dtype=torch.float64, device=device) if mean else None

    def add(self, *seen: Tensor) -> None:
        operands = [each.double() for each in self.operands(*seen)]
        left, right = operands[0], operands[-1]
        if left.dim() == 3:
            self.gram.baddbmm_(left.mT, right)
        else:
            self.gram.addmm_(left.T, right)
        if self.sum_D is not None:
            self.sum_D += left.sum(0)

    def gather(self) -> None:
        for total in (self.gram, self.sum_D):
            if total is not None:
                ranks.sum_to_main(total)

    def answer(self, tokens: int) -> dict[str, Tensor]:
        mean = {} if self.sum_D is None else {"mean_D": self.sum_D / tokens}
        return {self.name: self.gram / tokens, **mean}


def _rows(*inputs_BTD: Tensor) -> Sequence[Tensor]:
    return [each.flatten(0, 1) for each in inputs_BTD]


def _averaged(x_BSD: Tensor, p_BHTS: Tensor) -> Sequence[Tensor]:
    """Inputs averaged by attention: token t by that of head `t mod H`.

    All heads at all tokens would be `H` times the work, for sums that differ by the noise of a sample. The average is
    taken in the teacher's format, float32 at least, in which its attention is exact to begin with.
    """
    format = torch.promote_types(x_BSD.dtype, torch.float32)
    token_T = torch.arange(p_BHTS.shape[2], device=p_BHTS.device)
    return _rows(p_BHTS[:, token_T % p_BHTS.shape[1], token_T].to(format) @ x_BSD.to(format))


def _heads(tensor: Tensor, head_dim: int) -> Tensor:
    """`(B, T, heads E)` as `(N, heads, E)`. The output of a norm by head has its heads split already."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1, head_dim)


def choose(lengths: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A uniform sample of `count` tokens: ascending `index_N` in the text, `row_N`, and `position_N` in the row.

    It depends on lengths and count alone, so every site samples the same tokens: those with the smallest of as many
    random numbers.
    """
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.cat([torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths])
    index_N = drawn.topk(count, largest=False).indices.sort().values
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    row_N = torch.searchsorted(starts, index_N, right=True) - 1
    return index_N, row_N, index_N - starts[row_N]


class _Sample:
    """Queries and keys of chosen tokens, in the order of the text."""

    def __init__(self, site: Attention, index_N: Tensor, row_N: Tensor, position_N: Tensor, start: int) -> None:
        self.site, self.index_N, self.row_N, self.position_N, self.seen = site, index_N, row_N, position_N, start
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, q: Tensor, k: Tensor) -> None:
        tokens = q.shape[0] * q.shape[1]
        here = self.index_N[(self.index_N >= self.seen) & (self.index_N < self.seen + tokens)] - self.seen
        q_NHE, k_NGE = (_heads(part, self.site.head_dim)[here.to(part.device)].float().cpu() for part in (q, k))
        self.parts.append((q_NHE, k_NGE))
        self.seen += tokens

    def gather(self) -> None:
        self.parts = [part for parts in ranks.gather_in_order(self.parts) for part in parts]

    def answer(self, tokens: int) -> dict[str, Tensor]:
        q_NHE, k_NGE = (torch.cat(pieces) for pieces in zip(*self.parts, strict=True))
        return {"q_NHE": q_NHE, "k_NGE": k_NGE, "row_N": self.row_N, "position_N": self.position_N}
