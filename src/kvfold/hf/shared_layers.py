"""Attention in layers that share keys and values: an owner passes on what it caches, consumers read it.

Owners put their keys (normed and rotated) and values into a container that one forward of the model creates and passes
to every layer, as transformers' own sharing models do. The container does not go through the cache object, which is
absent without a cache and under activation checkpointing. It is not a `dict`, because FSDP2 copies those.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.errors import SettingError

STATES = "shared_kv_states"
"""The keyword that passes the container through a forward: layer -> `(k_BGSE, v_BGSE)`."""


class SharedStates(UserDict[int, tuple[Tensor, Tensor]]):
    """The container. transformers has a `KVSharingDict` like it, but not before 5.20, and vLLM requires older ones."""

    def to(self, device: torch.device, non_blocking: bool = False) -> SharedStates:
        """Move what it holds, in place: accelerate moves the arguments of a layer to the layer's device."""
        for layer, states in self.items():
            key, value = (each.to(device=device, non_blocking=non_blocking) for each in states)
            self[layer] = key, value
        return self


class SharedAttention:
    """In front of a stock attention with separate q, k, v and o: the attention of an owner or of a consumer.

    A consumer has no weights of keys and values. The forward is the stock class's own, with `_Handed` for its cache.
    """

    def __init__(self, config: Any, layer_idx: int, source: int) -> None:
        """Build the stock attention. `source` is the layer whose keys and values are read: an owner's is its own."""
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.kv_source_layer = source
        if source != layer_idx:
            for name in ("k_proj", "v_proj"):
                setattr(self, name, _Unread(self.head_dim))  # type: ignore[attr-defined]
            if hasattr(self, "k_norm"):
                self.k_norm = nn.Identity()

    def forward(
        self: Any,
        *args: Any,
        past_key_values: Any = None,
        shared_kv_states: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        handed = _Handed(past_key_values, shared_kv_states, self.kv_source_layer)
        found: tuple[Tensor, Tensor | None] = super().forward(*args, past_key_values=handed, **kwargs)  # type: ignore[misc]
        return found


class _Unread(nn.Module):
    """In place of a consumer's k and v: one head of zeros, which nothing reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """`hidden_BTD` -> zeros (B, T, E)."""
        return hidden_BTD.new_zeros(*hidden_BTD.shape[:-1], self.width)


@dataclass(frozen=True)
class _Handed:
    """In place of an attention's cache: an owner's keys and values also enter the container, consumers get those."""

    cache: Any
    states: Any
    source: int

    def update(self, key_BGTE: Tensor, value_BGTE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values that the attention reads."""
        if layer == self.source:
            new = key_BGTE, value_BGTE
            self.states[layer] = new if self.cache is None else self.cache.update(*new, layer)
        found: tuple[Tensor, Tensor] = self.states[self.source]
        return found


def hand_out(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a model without its head: passes an empty container, unless the caller passes one.

    Raises SettingError if its layers use reentrant checkpointing.
    """
    if body.training and getattr(body, "gradient_checkpointing", False):
        refuse_reentrant(getattr(body._gradient_checkpointing_func, "keywords", {}))
    if kwargs.get(STATES) is None:
        kwargs = {**kwargs, STATES: SharedStates()}
    return args, kwargs


def refuse_reentrant(settings: Mapping[str, Any]) -> None:
    """Raise SettingError for reentrant checkpointing, which silently loses the gradient of shared keys and values."""
    if settings.get("use_reentrant") is not False:
        raise SettingError(
            "reentrant checkpointing loses the gradients of shared keys and values",
            got=f"use_reentrant={settings.get('use_reentrant')}",
            next="set use_reentrant=False",
        )
