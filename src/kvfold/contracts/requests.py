"""What a method can request from calibration. Every request bounds the bytes of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.contracts.site import Shape, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Moments:
    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer: a matrix and a mean."""
        width = shape.sites[self.site].input_width
        return 8 * (width + 1) * width


class InputGram(_Moments):
    """Second moments `E[x x^T]` of the input that keys and values are made of: `gram_DD`, with `mean_D`.

    It is the input of the queries too, except in cross-attention.
    """


class AttentionGram(_Moments):
    """Second moments of the inputs averaged by attention, over all heads: `gram_DD`, with `mean_D`.

    One matrix for each head would take `H` times the memory, and improved no student (docs/log.md).
    """


@dataclass(frozen=True)
class QueryGram:
    """Second moments of each query head before rotation: `gram_HEE`."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        attention = shape.sites[self.site]
        return 8 * attention.num_attention_heads * attention.head_dim**2


@dataclass(frozen=True)
class CrossGram:
    """Second moments `E[x_first x_second^T]` between the inputs of two sites: `gram_DD`."""

    first: Site
    second: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8 * shape.sites[self.first].input_width * shape.sites[self.second].input_width


@dataclass(frozen=True)
class SampledPairs:
    """`count` sampled tokens before rotation: `q_NHE`, `k_NGE`, `row_N` of the text and `position_N` in the row."""

    site: Site
    count: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float32 answer, rows and positions included."""
        attention = shape.sites[self.site]
        heads = attention.num_attention_heads + attention.num_key_value_heads
        return self.count * (4 * heads * attention.head_dim + 16)


Request = InputGram | QueryGram | AttentionGram | CrossGram | SampledPairs
"""What one pass over the calibration text answers. The other questions are answered after it."""


class _Number:
    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


class _OneSite(_Number):
    site: Site

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site that changes."""
        return (self.site,)


@dataclass(frozen=True)
class FoldedKL(_OneSite):
    """KL to the teacher in nats per token with this site alone at `heads` key/value heads: `kl`. See `with_heads`."""

    site: Site
    heads: int


@dataclass(frozen=True)
class UniformKL(_Number):
    """KL to the teacher in nats per token with all of these sites at `heads` key/value heads: `kl`."""

    sites: tuple[Site, ...]
    heads: int


@dataclass(frozen=True)
class ConvertedKL(_Number):
    """KL to the teacher in nats per token with these sites alone converted, together: `kl`. See `Method.alone`."""

    sites: tuple[Site, ...]


@dataclass(frozen=True)
class RecallDrop(_Number):
    """How much the loss of copying rises when this site sees a window and sinks alone: `drop`, in nats per token.

    It is measured on `tokens` tokens, in rows whose end repeats their beginning.
    """

    site: Site
    window: int
    sinks: int
    tokens: int


@dataclass(frozen=True)
class HeadKL(_OneSite):
    """KL to the teacher in nats per token without the query heads that read one key/value head: `kl`.

    Their outputs are replaced by their means. The text is one whose rows end in a copy of their beginning.
    """

    site: Site
    head: int


@dataclass(frozen=True)
class AblatedKL(_OneSite):
    """KL to the teacher in nats per token of text, without the query heads that read one key/value head: `kl`."""

    site: Site
    head: int


@dataclass(frozen=True)
class AblatedRecall(_OneSite):
    """How much the loss of copying rises without the query heads that read one key/value head: `rise`."""

    site: Site
    head: int


@dataclass(frozen=True)
class FoldedRecall(_OneSite):
    """How much the loss of copying rises with this site alone at `heads` key/value heads: `rise`, nats per token."""

    site: Site
    heads: int


@dataclass(frozen=True)
class Computed:
    """What `Method.compute` returns for a site, from its tensors and the other answers."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the answer: a few numbers for each coordinate of the input."""
        attention = shape.sites[self.site]
        return 8 * attention.hidden_size * attention.head_dim


Ablated = HeadKL | AblatedKL | AblatedRecall
"""What is measured with the outputs of one key/value head's readers replaced by their means."""

Folded = FoldedKL | FoldedRecall | UniformKL
"""What is measured with sites at fewer key/value heads. See `Method.with_heads`."""

Alone = Folded | ConvertedKL | Ablated
"""What is measured by changing some sites of the teacher and no others."""

COPIED: Mapping[type, int] = {HeadKL: 384, FoldedRecall: 768, AblatedRecall: 1536}  # a KL has less noise than a loss
"""Tokens of the rows whose ends repeat their beginnings, on which these are measured."""

Question = Request | Alone | Computed | RecallDrop

Answers = Mapping[Question, Mapping[str, "Tensor"]]
