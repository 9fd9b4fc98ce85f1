"""The attention `kvfold` for transformers' models, and ways to look at and switch a model's attention.

Two registrations belong together. Without the second, transformers builds no mask for a name that it does not know,
and left-padded rows attend to their padding without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvfold.attention.grouped import grouped_attention
from kvfold.errors import SettingError

NAME = "kvfold"
"""What `attn_implementation` calls it."""

NAME_FP8 = "kvfold_fp8"
"""The same attention over a cache of fp8, as engines keep one when they are told to: for measuring what that costs."""

_REFUSED = ("s_aux",)


def forward(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention signature -> `(o_BTHE, None)`: attention weights are never made.

    A window is in the mask already. `position_bias` (1, H, T, S) is added to the logits, `softcap` caps them. Raises
    SettingError for what this attention cannot honour.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise SettingError(f"attention `{NAME}` has no {name}", next="load the model with attention sdpa or eager")
    tokens = query_BHTE.shape[2]
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and attention_mask is None
    if causal and tokens > 1:
        # no mask and more keys than queries: the empty tail of a static cache that is being prefilled
        key_BGSE, value_BGSE = key_BGSE[:, :, :tokens], value_BGSE[:, :, :tokens]
        position_bias = None if position_bias is None else position_bias[..., :tokens]
    if position_bias is not None:
        attention_mask, causal = biased(position_bias, attention_mask, causal), False
    o_BHTE = grouped_attention(
        query_BHTE,
        key_BGSE,
        value_BGSE,
        mask=attention_mask,
        causal=causal,
        scale=scaling,
        dropout=dropout,
        softcap=softcap,
    )
    return o_BHTE.transpose(1, 2).contiguous(), None


def biased(bias_1HTS: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """A bias of positions and a mask as one float mask; what may not be seen has the lowest number, and not -inf.

    A row of padding that sees nothing then stays finite, as it does in transformers' own attention.
    """
    lowest = torch.finfo(bias_1HTS.dtype).min
    if mask is not None:
        return bias_1HTS.masked_fill(~mask, lowest) if mask.dtype == torch.bool else bias_1HTS + mask
    if not causal or bias_1HTS.shape[2] == 1:
        return bias_1HTS
    seen_TS = torch.ones(bias_1HTS.shape[2:], dtype=torch.bool, device=bias_1HTS.device).tril()
    return bias_1HTS.masked_fill(~seen_TS, lowest)


def _forward_fp8(
    module: nn.Module, query_BHTE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The same, reading keys and values as an fp8 cache keeps them."""
    return forward(module, query_BHTE, through_fp8(key_BGSE), through_fp8(value_BGSE), *args, **kwargs)


def through_fp8(heads_BGSE: Tensor) -> Tensor:
    """Rounded to float8 (4 bits of exponent, 3 of mantissa), under one scale for all that is there."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (heads_BGSE.abs().amax().float() / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return ((heads_BGSE.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(heads_BGSE.dtype)


for _name, _function in ((NAME, forward), (NAME_FP8, _forward_fp8)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


@runtime_checkable
class Removable(Protocol):
    """An attention that can do without a part of itself: what a student owes to it shows when it is left out."""

    def removable(self) -> Sequence[str]:
        """The names of such parts."""

    def without(self, part: str) -> AbstractContextManager[None]:
        """Leave one out for a while."""


def removable(model: nn.Module) -> list[str]:
    """Parts that the attention of a model's layers can do without, by name."""
    return sorted({part for each in model.modules() if isinstance(each, Removable) for part in each.removable()})


@contextmanager
def without(model: nn.Module, part: str) -> Iterator[None]:
    """The same model with this part left out of every attention that has it."""
    with ExitStack() as stack:
        for each in model.modules():
            if isinstance(each, Removable) and part in each.removable():
                stack.enter_context(each.without(part))
        yield


@contextmanager
def attention_outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the attention modules at these paths return, after `o`, by path: `o_BTD`, with its gradient.

    Each forward of the model fills the mapping anew. Raises SettingError for a path that the model does not have.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    for path in paths:
        if path not in modules:
            raise SettingError("the model has no module of this name", where=path)
    handles = [modules[path].register_forward_hook(keep(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.clear()


@contextmanager
def with_attention(model: Any, name: str) -> Iterator[None]:
    """Switch a model to another attention (`kvfold`, `sdpa`, `eager`) for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
