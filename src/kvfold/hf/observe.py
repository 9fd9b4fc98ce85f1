"""Observes attentions: their inputs, rotated queries and keys, outputs, and attention probabilities."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvfold.attention.grouped import masked_softmax, with_causal
from kvfold.hf.attention import biased, forward
from kvfold.hf.hooks import hooked
from kvfold.hf.layers import Layer

WATCHED = "kvfold_watched"
"""The attention implementation that a model must have to be observed."""

_SEEN: ContextVar[dict[str, Any]] = ContextVar("seen")
_LOOKS: ContextVar[Mapping[nn.Module, Callable[[Tensor], None]]] = ContextVar("looks")


@dataclass(frozen=True)
class Attended:
    """The tensors of one attention on rows of text.

    `mask` is boolean (True: visible); None is causal in self-attention, and every key in cross-attention.
    """

    input_BTD: Tensor
    query_BHTE: Tensor  # normed and rotated
    key_BGSE: Tensor
    mask: Tensor | None
    scale: float
    cos_TE: Tensor | None  # of the rotation, by coordinate; (H, T, E) if heads rotate differently; None without one
    sin_TE: Tensor | None
    heads_BTN: Tensor  # the input of `o`: all heads, concatenated
    output_BTD: Tensor
    softcap: float | None = None
    sinks_H: Tensor | None = None
    bias_1HTS: Tensor | None = None  # of the distance, added to the logits

    def rows(self, first: int, count: int) -> Attended:
        """Some of the rows. All rows have the same mask."""
        by_row = ("input_BTD", "query_BHTE", "key_BGSE", "heads_BTN", "output_BTD")
        return replace(self, **{name: getattr(self, name)[first : first + count] for name in by_row})

    def probabilities(self) -> Tensor:
        """The softmax over keys of every query head of a self-attention, `p_BHTS`; sinks take a part of it."""
        heads, groups = self.query_BHTE.shape[1], self.key_BGSE.shape[1]
        logits_BHTS = self.scale * (self.query_BHTE @ self.key_BGSE.repeat_interleave(heads // groups, dim=1).mT)
        if self.softcap is not None:
            logits_BHTS = self.softcap * torch.tanh(logits_BHTS / self.softcap)
        if self.bias_1HTS is not None:
            logits_BHTS = logits_BHTS + self.bias_1HTS
        tokens, keys = logits_BHTS.shape[2:]
        mask = with_causal(None, tokens, keys, logits_BHTS.device) if self.mask is None else self.mask
        return masked_softmax(logits_BHTS, mask, sinks_H=self.sinks_H)


class _Done(Exception):
    """The attention has been observed: the rest of the layer need not be computed."""


def attend(
    layer: Layer,
    attention: nn.Module,
    output: nn.Module,
    hidden_BTD: Tensor,
    row: int = 0,
    rotated: int | None = None,
) -> Attended:
    """Run a layer up to the end of its attention, whose output projection is `output`, and return its tensors.

    `row` is as in `Layer.run`. `rotated` is the number of a head's coordinates that are rotated; by default as many as
    the cosines that the model computes.
    """
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["rotation"] = kwargs.get("position_embeddings")

    def heads(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["heads"] = args[0]

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        seen["output"] = result[0] if isinstance(result, tuple) else result
        raise _Done

    handles = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        output.register_forward_pre_hook(heads),
        attention.register_forward_hook(after),
    ]
    token = _SEEN.set(seen)
    try:
        with hooked(*handles), suppress(_Done):
            layer.run(hidden_BTD, row)
    finally:
        _SEEN.reset(token)
    turned = seen["rotation"] is not None and rotated != 0
    turns: Any = getattr(attention, "rotation", None)  # of kvfold's latent attention, whose heads rotate differently
    part = rotated if turns is None else None
    cos, sin = _by_coordinate(attention, seen["rotation"], part) if turned else (None, None)
    if turns is not None:
        cos, sin = turns(cos, sin)
    query, key, mask, scale = (seen[name] for name in ("query", "key", "mask", "scale"))
    more = (seen["heads"], seen["output"], seen["softcap"], seen["sinks"], seen["bias"])
    return Attended(seen["input"], query, key, mask, scale, cos, sin, *more)


def _by_coordinate(attention: nn.Module, rotation: Sequence[Tensor], rotated: int | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) of a head's coordinates: some models reorder them as they rotate, or compute half."""
    stock: Any = getattr(attention, "architecture", sys.modules[type(attention).__module__])
    cos_BTE = rotation[0]
    one = cos_BTE.new_ones(1, 1, cos_BTE.shape[1], cos_BTE.shape[-1] if rotated is None else rotated)
    cos, sin = (stock.apply_rotary_pos_emb(one, one, each[:1], torch.zeros_like(each[:1]))[0] for each in rotation)
    return cos[0, 0], sin[0, 0]


@contextmanager
def probabilities(takers: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Pass the probabilities `p_BTS` of each of these attention modules to its function, as the modules run.

    At token t they are those of head `t mod H`. The model must be loaded with the attention `WATCHED`.
    """
    token = _LOOKS.set(takers)
    try:
        yield
    finally:
        _LOOKS.reset(token)


def _probabilities(
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The softmax over keys at each token t of head `t mod H`, in float32 or wider; sinks take a part of it."""
    heads, tokens = query_BHTE.shape[1:3]
    key_BHSE = key_BGSE.repeat_interleave(heads // key_BGSE.shape[1], dim=1)
    query_BHNE = _in_turn(query_BHTE, heads)  # N: the tokens of a head
    logits_BHNS = scale * (query_BHNE @ key_BHSE.mT).to(torch.promote_types(query_BHTE.dtype, torch.float32))
    if softcap is not None:
        logits_BHNS = softcap * torch.tanh(logits_BHNS / softcap)
    if mask is not None:
        mask = _in_turn(mask, heads)
        logits_BHNS = logits_BHNS.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits_BHNS + mask
    if causal:
        visible_TS = torch.ones(tokens, key_BHSE.shape[2], dtype=torch.bool, device=logits_BHNS.device).tril()
        logits_BHNS = logits_BHNS.masked_fill(~_in_turn(visible_TS[None, None], heads), -torch.inf)
    return masked_softmax(logits_BHNS, None, sinks_H=sinks_H).transpose(1, 2).flatten(1, 2)[:, :tokens]


def _in_turn(rows_BHTN: Tensor, heads: int) -> Tensor:
    """Of each head h the rows of the tokens t with `t mod H = h`, `(B, H, ceil(T / H), N)`."""
    whole_BHTN = pad(rows_BHTN, (0, 0, 0, -rows_BHTN.shape[2] % heads)).expand(-1, heads, -1, -1)
    turns_BHRHN = whole_BHTN.reshape(len(rows_BHTN), heads, -1, heads, rows_BHTN.shape[3])
    return turns_BHRHN.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _watched(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """kvfold's attention, which records its inputs for `attend` and `probabilities`."""
    seen = _SEEN.get(None)
    if seen is not None:
        scaling = kwargs.get("scaling")
        scale = query_BHTE.shape[-1] ** -0.5 if scaling is None else scaling
        seen |= {"query": query_BHTE, "key": key_BGSE, "mask": attention_mask, "scale": scale}
        seen |= {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux"), "bias": kwargs.get("position_bias")}
    taker = _LOOKS.get({}).get(module)
    if taker is not None:
        mask, bias = attention_mask, kwargs.get("position_bias")
        causal = bool(getattr(module, "is_causal", True)) and mask is None and query_BHTE.shape[2] > 1
        if bias is not None:
            mask, causal = biased(bias, mask, causal), False
        scale, softcap = float(kwargs["scaling"]), kwargs.get("softcap")
        taker(_probabilities(query_BHTE, key_BGSE, mask, causal, scale, softcap, kwargs.get("s_aux")))
    return forward(module, query_BHTE, key_BGSE, value_BGSE, attention_mask, **kwargs)


AttentionInterface.register(WATCHED, _watched)
AttentionMaskInterface.register(WATCHED, sdpa_mask)
