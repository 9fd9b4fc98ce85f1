"""The attention of a GPT-BigCode with any number of key/value heads, whose stock class has one or all."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from kvfold.hf.attention import implementation


class GroupedAttention:
    """In front of the stock attention: q, k and v in one map, `[its queries.., k, v]` for each key/value head."""

    architecture: ModuleType

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        """Build the stock attention, with the key/value heads of `config`."""
        super().__init__(config, layer_idx=layer_idx)  # type: ignore[call-arg]
        self.kv_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.kv_heads
        self.c_attn = nn.Linear(self.embed_dim, self.embed_dim + 2 * self.kv_heads * self.head_dim)
        self.attention_dropout = self.attn_pdrop

    def forward(
        self: Any,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        rows = hidden_states.shape[:-1]
        packed = self.c_attn(hidden_states).view(*rows, self.kv_heads, self.num_key_value_groups + 2, self.head_dim)
        query = packed[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = (packed[..., place, :].transpose(1, 2) for place in (-2, -1))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attend = implementation(self, self.config._attn_implementation)
        output, weights = attend(query, key, value, attention_mask, **kwargs)
        return self.resid_dropout(self.c_proj(output.reshape(*rows, -1).contiguous())), weights
