"""The sums of a calibration, one class per request: fed with batches of rows, they end as the request's answer.

What is summed over tokens is summed in float64, whatever the teacher computes in: a Gram matrix is positive
semidefinite to the last bit that way, and does not depend on the order of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvfold.contracts.requests import AttentionGram, CrossGram, InputGram, QueryGram, Request, SampledPairs
from kvfold.contracts.site import Attention, Shape, Site


class Moment(Protocol):
    """The unfinished answer to one request."""

    @property
    def add(self) -> Callable[..., None]:
        """Take the next rows of the text, one tensor for each of the request's `looks`, B and T in front."""

    def answer(self, tokens: int) -> dict[str, Tensor]:
        """The answer after that many tokens, by name."""


def looks(request: Request) -> tuple[tuple[Site, str], ...]:
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


def start(request: Request, shape: Shape, device: str, sampling: Sampling) -> Moment:
    """An empty sum for a request."""
    match request:
        case InputGram(site):
            return _InputSum(shape.sites[site], device)
        case QueryGram(site):
            return _QuerySum(shape.sites[site], device)
        case AttentionGram(site):
            return _AttentionSum(shape.sites[site], device)
        case CrossGram(first, second):
            return _CrossSum(shape.sites[first], shape.sites[second], device)
        case SampledPairs(site, count):
            return _Sample(shape.sites[site], *sampling.choose(count))


class Sampling:
    """Which tokens of the text are sampled: every site is asked about the same ones."""

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths, self.seed = lengths, seed

    def choose(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`index_N` of `count` tokens in the text, ascending, their `row_N`, and their `position_N` in it.

        A number is drawn for each token; those with the smallest are a uniform sample.
        """
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.cat([torch.rand(length, generator=generator, dtype=torch.float64) for length in self.lengths])
        index_N = drawn.topk(count, largest=False).indices.sort().values
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        row_N = torch.searchsorted(starts, index_N, right=True) - 1
        return index_N, row_N, index_N - starts[row_N]


class _InputSum:
    """Sums of `x x^T` and `x`."""

    def __init__(self, site: Attention, device: str) -> None:
        self.gram_DD = _zeros(site.input_width, site.input_width, device=device)
        self.sum_D = _zeros(site.input_width, device=device)

    def add(self, x_BTD: Tensor) -> None:
        x_ND = x_BTD.flatten(0, 1).double()
        self.gram_DD.addmm_(x_ND.T, x_ND)
        self.sum_D += x_ND.sum(0)

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_DD": self.gram_DD / tokens, "mean_D": self.sum_D / tokens}


class _CrossSum:
    """Sum of `x_first x_second^T`."""

    def __init__(self, first: Attention, second: Attention, device: str) -> None:
        self.gram_DD = _zeros(first.input_width, second.input_width, device=device)

    def add(self, first_BTD: Tensor, second_BTD: Tensor) -> None:
        self.gram_DD.addmm_(first_BTD.flatten(0, 1).double().T, second_BTD.flatten(0, 1).double())

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_DD": self.gram_DD / tokens}


class _QuerySum:
    """Sum of `q q^T` by head."""

    def __init__(self, site: Attention, device: str) -> None:
        self.site = site
        self.gram_HEE = _zeros(site.num_attention_heads, site.head_dim, site.head_dim, device=device)

    def add(self, q: Tensor) -> None:
        q_HNE = _heads(q, self.site).double().transpose(0, 1)
        self.gram_HEE.baddbmm_(q_HNE.mT, q_HNE)

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return {"gram_HEE": self.gram_HEE / tokens}


class _AttentionSum:
    """Sums of `y y^T` and `y`, `y` being the inputs averaged by attention: token t by that of head `t mod H`.

    All heads at all tokens would be `H` times the work for sums that differ by the noise of a sample. The average is
    taken in the teacher's format, float32 at least, in which its attention is exact to begin with.
    """

    def __init__(self, site: Attention, device: str) -> None:
        self.sum = _InputSum(site, device)

    def add(self, x_BSD: Tensor, p_BHTS: Tensor) -> None:
        format = torch.promote_types(x_BSD.dtype, torch.float32)
        token_T = torch.arange(p_BHTS.shape[2], device=p_BHTS.device)
        self.sum.add(p_BHTS[:, token_T % p_BHTS.shape[1], token_T].to(format) @ x_BSD.to(format))

    def answer(self, tokens: int) -> dict[str, Tensor]:
        return self.sum.answer(tokens)


class _Sample:
    """Queries and keys of chosen tokens, in the order of the text."""

    def __init__(self, site: Attention, index_N: Tensor, row_N: Tensor, position_N: Tensor) -> None:
        self.site, self.index_N, self.row_N, self.position_N, self.seen = site, index_N, row_N, position_N, 0
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, q: Tensor, k: Tensor) -> None:
        tokens = q.shape[0] * q.shape[1]
        here = self.index_N[(self.index_N >= self.seen) & (self.index_N < self.seen + tokens)] - self.seen
        q_NHE, k_NGE = (_heads(part, self.site)[here.to(part.device)].float().cpu() for part in (q, k))
        self.parts.append((q_NHE, k_NGE))
        self.seen += tokens

    def answer(self, tokens: int) -> dict[str, Tensor]:
        q_NHE, k_NGE = (torch.cat(pieces) for pieces in zip(*self.parts, strict=True))
        return {"q_NHE": q_NHE, "k_NGE": k_NGE, "row_N": self.row_N, "position_N": self.position_N}


def finite(answer: Mapping[str, Tensor]) -> bool:
    """Is every number of an answer one?"""
    return all(bool(tensor.isfinite().all()) for tensor in answer.values())


def _zeros(*size: int, device: str) -> Tensor:
    return torch.zeros(*size, dtype=torch.float64, device=device)


def _heads(tensor: Tensor, site: Attention) -> Tensor:
    """Split `(B, T, heads E)` into `(N, heads, E)`; a module that splits already is left as it is."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1, site.head_dim)
