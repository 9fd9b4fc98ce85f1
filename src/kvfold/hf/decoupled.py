"""Attention whose value heads are grouped apart from its key heads, as decoupled-head attention has them.

    o_h = softmax(scale * q_h k_g^T + mask) v_u,    g = h // (H / G),  u = value_heads[h]    (arXiv 2406.06567)

A stock attention gets a map of values of its own width, and something in the place of its cache. transformers' caches
(growing, static, sliding or quantised) hold the keys and the values each as a single head: a static cache gives keys
and values equal numbers of heads, but not equal widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvfold.hf.attention import NAME


def decouple(attention: Any, value_heads: Sequence[int]) -> None:
    """Let the query heads of a stock attention read these value heads."""
    stock: nn.Linear = attention.v_proj
    wide = (1 + max(value_heads)) * attention.head_dim
    attention.v_proj = nn.Linear(stock.in_features, wide, bias=stock.bias is not None)
    attention.value_heads, attention.key_groups = value_heads, attention.num_key_value_groups
    attention.num_key_value_groups = 1  # what other implementations than kvfold's read is written out
    attention.register_forward_pre_hook(_before, with_kwargs=True)


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "past_key_values": _Single(kwargs.get("past_key_values"), module)}


@dataclass(frozen=True)
class _Single:
    """In place of an attention's cache: caches all heads as one, and returns what the attention reads."""

    cache: Any
    attention: Any

    def update(self, k_BGTE: Tensor, v_BUTE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, `k_BGSE` and `v_BUSE`; for other implementations, those of each query head."""
        width, held = k_BGTE.shape[-1], (k_BGTE, v_BUTE)
        if self.cache is not None:
            joined = (each.transpose(1, 2).flatten(2)[:, None] for each in held)
            held = self.cache.update(*joined, layer)
            held = tuple(each[:, 0].unflatten(-1, (-1, width)).transpose(1, 2) for each in held)
        k_BGSE, v_BUSE = held
        if self.attention.config._attn_implementation.startswith(NAME):
            return k_BGSE, v_BUSE
        k_BHSE = k_BGSE.repeat_interleave(self.attention.key_groups, dim=1)
        return k_BHSE, v_BUSE[:, self.attention.value_heads]
