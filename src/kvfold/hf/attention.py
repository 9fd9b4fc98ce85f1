"""The attention `kvfold` for transformers' models, and functions that observe and switch a model's attention.

An attention has two registrations. Without the second, transformers builds no mask for an implementation that it does
not know, and left-padded rows silently attend to their padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.attention.grouped import grouped_attention
from kvfold.errors import SettingError
from kvfold.hf.quantised import through_hqq

NAME = "kvfold"
"""Its name in `attn_implementation`."""

NAME_FP8, NAME_Q4 = "kvfold_fp8", "kvfold_q4_0"
"""The same attention over a quantised cache, as engines offer it: measures what that option costs."""


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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature -> `(o_BTHE, None)`: no attention weights are computed.

    The mask includes a sliding window. `position_bias` (1, H, T, S) is added to the logits, `softcap` caps them, and
    `s_aux` (H,) are the logits of sinks. A module with `value_heads` groups its value heads apart from its key heads.
    """
    tokens = query_BHTE.shape[2]
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and attention_mask is None
    if causal and tokens > 1:
        # no mask and more keys than queries: the unused end of a static cache during prefill
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
        sinks_H=s_aux,
        value_heads=getattr(module, "value_heads", None),
    )
    return o_BHTE.transpose(1, 2).contiguous(), None


def biased(bias_1HTS: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Position bias and mask as one float mask.

    Masked entries have the lowest finite number, not -inf: a padding row that sees nothing stays finite, as in
    transformers' own attention.
    """
    lowest = torch.finfo(bias_1HTS.dtype).min
    if mask is not None:
        return bias_1HTS.masked_fill(~mask, lowest) if mask.dtype == torch.bool else bias_1HTS + mask
    if not causal or bias_1HTS.shape[2] == 1:
        return bias_1HTS
    seen_TS = torch.ones(bias_1HTS.shape[2:], dtype=torch.bool, device=bias_1HTS.device).tril()
    return bias_1HTS.masked_fill(~seen_TS, lowest)


def through_fp8(heads_BGSE: Tensor) -> Tensor:
    """Round to float8 (4 bits of exponent, 3 of mantissa) with one scale for the whole tensor."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (heads_BGSE.abs().amax().float() / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return ((heads_BGSE.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(heads_BGSE.dtype)


def through_q4(heads_BGSE: Tensor) -> Tensor:
    """Round to 4 bits in blocks of 32 numbers (of fewer, if a head's width asks for it), as llama.cpp's q4_0.

    A block has one float16 scale, by which its number of the largest magnitude becomes -8.
    """
    blocks = heads_BGSE.float().reshape(*heads_BGSE.shape[:-1], -1, math.gcd(32, heads_BGSE.shape[-1]))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0, -8 / largest)
    steps = (blocks * inverse).round().clamp(-8, 7)
    return (steps * (largest / -8).half().float()).flatten(-2).to(heads_BGSE.dtype)


ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    NAME_FP8: through_fp8,
    NAME_Q4: through_q4,
    **{f"{NAME}_int{bits}": partial(through_hqq, bits) for bits in (4, 2)},
}
"""By attention: how it rounds what is cached."""

QUANTISED: Mapping[str, tuple[str, float]] = {"fp8": (NAME_FP8, 8.0), "q4_0": (NAME_Q4, 4.5)}
"""By quantised cache: the attention that rounds alike, and the bits of a cached number with its part of a scale."""


def _over(
    rounded: Callable[[Tensor], Tensor],
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    return forward(module, query_BHTE, rounded(key_BGSE), rounded(value_BGSE), *args, **kwargs)


for _name, _function in ((NAME, forward), *((name, partial(_over, rounded)) for name, rounded in ROUNDINGS.items())):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


def implementation(module: Any, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function `name` with a module's scale and dropout: `(q_BHTE, k_BGSE, v_BGSE, mask, ...)`.

    `eager` is that of `module.architecture`, the module of the stock class.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, module.architecture.eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    return partial(function, module, dropout=dropout, scaling=module.scaling)


@runtime_checkable
class Removable(Protocol):
    """An attention with removable parts: an ablation shows how much a student depends on one."""

    def removable(self) -> Sequence[str]:
        """The names of the parts."""

    def without(self, part: str) -> AbstractContextManager[None]:
        """Remove a part inside the `with` block."""


def removable(model: nn.Module) -> list[str]:
    """The names of all removable parts of a model's attentions."""
    return sorted({part for each in model.modules() if isinstance(each, Removable) for part in each.removable()})


@contextmanager
def without(model: nn.Module, part: str) -> Iterator[None]:
    """Remove a part from every attention that has it, inside the `with` block."""
    with ExitStack() as stack:
        for each in model.modules():
            if isinstance(each, Removable) and part in each.removable():
                stack.enter_context(each.without(part))
        yield


@contextmanager
def attention_outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs `o_BTD` of the attention modules at these paths, after `o`, with their gradients.

    Each forward of the model replaces the entries of the mapping. Raises SettingError for an unknown path.
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
    """Switch a model to another attention (`kvfold`, `sdpa`, `eager`) inside the `with` block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
