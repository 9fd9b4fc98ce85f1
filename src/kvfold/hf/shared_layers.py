"""Attention in layers that share keys and values: an owner shows what it cached, consumers read it.

Owners put their keys (normed and rotated) and values into a container that one forward of the model makes and every
layer is handed, as transformers' own models that share do. They never pass through the cache object, which is not
there without a cache and under activation checkpointing. The container is no `dict`: FSDP2 rebuilds those on their way.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import KVSharingDict
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.errors import SettingError

STATES = "shared_kv_states"
"""The name under which the container goes through a forward, by layer: `(k_BGSE, v_BGSE)`."""


class SharedAttention:
    """In front of a stock attention class with q, k, v and o apart: the attention of an owner or of a consumer.

    A consumer has no `k_proj`, `v_proj` and `k_norm`. What is computed is the stock class's forward step by step.
    """

    architecture: ModuleType  # of the stock class: its rotation and its eager attention

    def __init__(self, config: Any, layer_idx: int, source: int) -> None:
        """Build the stock attention; `source` is the layer whose keys and values are read, its own for an owner."""
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
        """`hidden_states` (B, T, D) -> `(output_BTD, weights)`; a static cache's S is longer than what was read."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        owns = self.kv_source_layer == self.layer_idx
        query = normed_heads(self, "q_norm", self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = query[:, :0]  # rotated beside the queries: no head of a consumer's
        if owns:
            key = normed_heads(self, "k_norm", self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        query, key = self.architecture.apply_rotary_pos_emb(query, key, *position_embeddings)
        if owns:
            value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            shared_kv_states[self.layer_idx] = key, value
        else:
            key, value = shared_kv_states[self.kv_source_layer]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.architecture.eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def normed_heads(attention: nn.Module, name: str, heads: Tensor) -> Tensor:
    """Heads behind the norm of this name, or as they are where the attention has none."""
    norm: Any = getattr(attention, name, None)
    if norm is None:
        return heads
    over_all = norm.weight.numel() > heads.shape[-1]
    return norm(heads.flatten(-2)).view(heads.shape) if over_all else norm(heads)  # type: ignore[no-any-return]


def sharing_modes(sources: list[int] | None) -> list[str | None] | None:
    """What each layer does with keys and values, in transformers' words: `store`, `reuse`, None for its own alone."""
    if sources is None:
        return None
    read = {source for layer, source in enumerate(sources) if source != layer}
    return ["reuse" if source != layer else "store" if layer in read else None for layer, source in enumerate(sources)]


def hand_out(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward of a model without its head: hand it an empty container, unless it is given one.

    Raises SettingError when its layers are checkpointed reentrantly.
    """
    if body.training and getattr(body, "gradient_checkpointing", False):
        refuse_reentrant(getattr(body._gradient_checkpointing_func, "keywords", {}))
    if kwargs.get(STATES) is None:
        kwargs = {**kwargs, STATES: KVSharingDict()}
    return args, kwargs


def refuse_reentrant(settings: Mapping[str, Any]) -> None:
    """Raise SettingError for reentrant checkpointing: it would lose the gradient of what layers share, silently."""
    if settings.get("use_reentrant") is not False:
        raise SettingError(
            "layers share keys and values, and reentrant checkpointing loses the gradient of those",
            got=f"use_reentrant={settings.get('use_reentrant')}",
            next="say use_reentrant=False",
        )
