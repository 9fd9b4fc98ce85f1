"""What a method may ask of calibration, as typed requests with bounded bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
from kvfold.contracts.site import Shape, Site


@dataclass(frozen=True)
class InputGram:
    """Second moments `E[x x^T]` of the input of the site's k and v, q's too but in cross-attention: `gram_DD`, with
    `mean_D`."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8 * (shape.sites[self.site].input_width + 1) * shape.sites[self.site].input_width


@dataclass(frozen=True)
class QueryGram:
    """Second moments of each query head before rotation: `gram_HEE`."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        attention = shape.sites[self.site]
        return 8 * attention.num_attention_heads * attention.head_dim**2


@dataclass(frozen=True)
class AttentionGram:
    """Second moments of the inputs averaged by attention, by that of each head in turn: `gram_DD`, with `mean_D`.

    Heads apart would be `H` times the memory, and made no student better (docs/log.md).
    """

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8 * (shape.sites[self.site].input_width + 1) * shape.sites[self.site].input_width


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
    """`count` sampled tokens of a site before rotation: `q_NHE`, `k_NGE`, `row_N` of the text and `position_N` in
    it."""

    site: Site
    count: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float32 answer, rows and positions included."""
        attention = shape.sites[self.site]
        heads = attention.num_attention_heads + attention.num_key_value_heads
        return self.count * (4 * heads * attention.head_dim + 16)


Request = InputGram | QueryGram | AttentionGram | CrossGram | SampledPairs

"""What one pass over a text answers."""


@dataclass(frozen=True)
class FoldedKL:
    """KL to the teacher in nats per token when this site alone is folded to `heads` key/value heads: `kl`.

    For methods that have `with_heads`; measured once the requests are answered.
    """

    site: Site
    heads: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


@dataclass(frozen=True)
class ConvertedKL:
    """KL to the teacher in nats per token when these sites are converted together, and no others: `kl`.

    For methods that have `alone(config, shape, sites)`; measured once the requests are answered.
    """

    sites: tuple[Site, ...]

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


@dataclass(frozen=True)
class Reckoned:
    """What a method itself reckons of a site, from its tensors and the answers: what its `reckon` returns."""

    site: Site

    def bytes(self, shape: Shape) -> int:
        """Bytes of the answer: a table of a few numbers for each coordinate of the input."""
        attention = shape.sites[self.site]
        return 8 * attention.hidden_size * attention.head_dim


@dataclass(frozen=True)
class RecallDrop:
    """How much worse copies are when this site sees `window` tokens and the first `sinks` alone: `drop`, nats a token.

    Measured on rows whose end repeats their beginning, `tokens` in all, once the requests are answered.
    """

    site: Site
    window: int
    sinks: int
    tokens: int

    def bytes(self, shape: Shape) -> int:
        """Bytes of the float64 answer."""
        return 8


Question = Request | FoldedKL | ConvertedKL | Reckoned | RecallDrop


Answers = Mapping[Question, Mapping[str, "Tensor"]]
