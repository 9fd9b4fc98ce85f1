"""Attention in layers that share keys and values: an owner passes on what it caches, consumers read it.

Owners put their keys (normed and rotated) and values into a container that one forward of the model creates and passes
to every layer, as transformers' own sharing models do. The container does not go through the cache object, which is
absent without a cache and under activation checkpointing. It is not a `dict`, because FSDP2 copies those.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import KVSharingDict

from kvfold.errors import SettingError
from kvfold.hf.attention import implementation

STATES = "shared_kv_states"
"""The keyword that passes the container through a forward: layer -> `(k_BGSE, v_BGSE)`."""


class SharedAttention:
    """In front of a stock attention with separate q, k, v and o: the attention of an owner or of a consumer.

    A consumer has no `k_proj`, `v_proj` and `k_norm`. The forward follows the stock class step by step.
    """

    architecture: ModuleType  # the stock class's module: its rotation and its eager attention
    output: str  # name of the output projection

    def __init__(self, config: Any, layer_idx: int, source: int) -> None:
        """Build the stock attention. `source` is the layer whose keys and values are read: an owner's is its own."""
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.kv_source_layer = source
        if source != layer_idx:
            for name in ("k_proj", "v_proj", "k_norm"):
                if hasattr(self, name):
                    delattr(self, name)

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        shared_kv_states: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        owns = self.kv_source_layer == self.layer_idx
        query = projected(self, hidden_states, "q")
        key = projected(self, hidden_states, "k") if owns else query[:, :0]  # a consumer rotates queries alone
        turn = position_embeddings[0].shape[-1]
        turned = self.architecture.apply_rotary_pos_emb(query[..., :turn], key[..., :turn], *position_embeddings)
        query, key = (torch.cat([new, old[..., turn:]], dim=-1) for new, old in zip(turned, (query, key), strict=True))
        if owns:
            value = projected(self, hidden_states, "v")
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            shared_kv_states[self.layer_idx] = key, value
        else:
            key, value = shared_kv_states[self.kv_source_layer]
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        attend = implementation(self, self.config._attn_implementation)
        output, weights = attend(query, key, value, attention_mask, sliding_window=window, **kwargs)
        return getattr(self, self.output)(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def projected(attention: Any, hidden_BTD: Tensor, role: str) -> Tensor:
    """The heads (B, H, T, E) of the projection for a role (`q`, `k`, `v`), after its norm if it has one."""
    rows_BTN: Tensor = getattr(attention, f"{role}_proj")(hidden_BTD)
    heads_BTHE = rows_BTN.view(*rows_BTN.shape[:-1], -1, attention.head_dim)
    norm: Any = getattr(attention, f"{role}_norm", None)
    if norm is not None:
        over_all = norm.weight.numel() > attention.head_dim
        heads_BTHE = norm(rows_BTN).view(heads_BTHE.shape) if over_all else norm(heads_BTHE)
    return heads_BTHE.transpose(1, 2)


def hand_out(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a model without its head: passes an empty container, unless the caller passes one.

    Raises SettingError if its layers use reentrant checkpointing.
    """
    if body.training and getattr(body, "gradient_checkpointing", False):
        refuse_reentrant(getattr(body._gradient_checkpointing_func, "keywords", {}))
    if kwargs.get(STATES) is None:
        kwargs = {**kwargs, STATES: KVSharingDict()}
    return args, kwargs


def refuse_reentrant(settings: Mapping[str, Any]) -> None:
    """Raise SettingError for reentrant checkpointing, which silently loses the gradient of shared keys and values."""
    if settings.get("use_reentrant") is not False:
        raise SettingError(
            "reentrant checkpointing loses the gradients of shared keys and values",
            got=f"use_reentrant={settings.get('use_reentrant')}",
            next="set use_reentrant=False",
        )
