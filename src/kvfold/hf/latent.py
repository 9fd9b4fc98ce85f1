"""Decoders with latent keys and values: `kvfold_latent_llama`, `kvfold_latent_qwen2` and others.

A stock model in which the attention of every layer is `LatentAttention`; everything else, forwards and tensor names
included, is the stock class's own. `config.json` has the sizes of each layer: `rope_chunks`, the number of rotated
planes of a key head, and `latent_dims`. The cache is transformers' own (growing, static, sliding or quantised): its
keys are the rotated planes of all heads, its values the latent, each stored as a single head. Importing this module
registers the classes with transformers' Auto classes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.attention.latent import absorbed_attention, absorbs, chosen, turn, written_out
from kvfold.contracts.runtimes import LATENT
from kvfold.hf.attention import NAME, ROUNDINGS, implementation
from kvfold.hf.subclass import Replacement, attentions, register_decoders


class LatentAttention(Replacement):
    """Attention over cached latents (EliteKV, arXiv 2503.01586), in place of a stock one whose q and o it takes over.

    Per token and layer it caches the rotated planes of all key heads (M numbers) and one latent of width R for all
    other coordinates of the keys and for the values. Prefill and training expand keys and values and pass them to the
    model's attention implementation. A decoding step folds the expansion into the query and the output instead, with
    any implementation but `eager`, which returns attention weights.
    """

    architecture: ModuleType
    planes: Tensor
    q_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, config: Any, stock: Any) -> None:
        super().__init__(config, stock, "q_proj", "o_proj")
        self.sliding_window = getattr(stock, "sliding_window", getattr(config, "sliding_window", None))
        chunks, width = config.rope_chunks[self.layer_idx], config.latent_dims[self.layer_idx]
        self.rotated, hidden = 2 * chunks, config.hidden_size
        free = self.head_dim - self.rotated
        self.k_rope = nn.Linear(hidden, self.groups * self.rotated, bias=stock.k_proj.bias is not None)
        self.kv_down = nn.Linear(hidden, width, bias=False)
        self.k_up = nn.Linear(width, self.groups * free, bias=False) if free else None
        self.v_up = nn.Linear(width, self.groups * self.head_dim)
        self.register_buffer("planes", torch.arange(chunks).repeat(self.groups, 1))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        cos_BTE, sin_BTE = position_embeddings
        q_BTHE = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        turned = turn(q_BTHE[..., : self.rotated], cos_BTE, sin_BTE, self._planes_of_queries())
        q_BHTE = torch.cat([turned, q_BTHE[..., self.rotated :]], dim=-1).transpose(1, 2)
        key_BTGP = self.k_rope(hidden_states).unflatten(-1, (self.groups, -1))
        rotated_BSM = turn(key_BTGP, cos_BTE, sin_BTE, self.planes).flatten(2)
        latent_BSR = self.kv_down(hidden_states)
        if past_key_values is not None:
            kept = past_key_values.update(rotated_BSM[:, None], latent_BSR[:, None], self.layer_idx)
            rotated_BSM, latent_BSR = (each.squeeze(1) for each in kept)
        heads_BTHE, weights = self._attend(q_BHTE, rotated_BSM, latent_BSR, attention_mask, **kwargs)
        return self.o_proj(heads_BTHE.flatten(2).contiguous()), weights

    def rotation(self, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(H, T, P)` of the rotation of each query head's first coordinates."""
        cos_BTHP, sin_BTHP = chosen(cos_TE[None], sin_TE[None], self._planes_of_queries())
        return cos_BTHP[0].transpose(0, 1), sin_BTHP[0].transpose(0, 1)

    def _planes_of_queries(self) -> Tensor:
        return self.planes.repeat_interleave(self.num_key_value_groups, dim=0)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(self.groups, -1, weight.shape[-1])

    def _attend(
        self, q_BHTE: Tensor, rotated_BSM: Tensor, latent_BSR: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        name, (heads, tokens) = self.config._attn_implementation, q_BHTE.shape[1:3]
        if mask is None and tokens > 1:  # the unused end of a static cache during prefill
            rotated_BSM, latent_BSR = rotated_BSM[:, :tokens], latent_BSR[:, :tokens]
        if rounded := ROUNDINGS.get(name):
            rotated_BSM, latent_BSR, name = rounded(rotated_BSM), rounded(latent_BSR), NAME
        keys, width = latent_BSR.shape[1:]
        ups = (
            latent_BSR.new_zeros(self.groups, 0, width) if self.k_up is None else self._by_head(self.k_up.weight),
            self._by_head(self.v_up.weight),
            self.v_up.bias.view(self.groups, self.head_dim),
        )
        expands = name == "eager" or (self.training and self.attention_dropout > 0)
        sizes = (self.groups, heads, self.head_dim, self.rotated, width)
        if not expands and absorbs(tokens, tokens == keys, *sizes):
            o_BHTE = absorbed_attention(q_BHTE, rotated_BSM, latent_BSR, *ups, mask=mask, scale=self.scaling)
            return o_BHTE.transpose(1, 2), None
        k_BGSE, v_BGSE = written_out(rotated_BSM, latent_BSR, *ups)
        attend = implementation(self, name)
        return attend(q_BHTE, k_BGSE, v_BGSE, mask, sliding_window=self.sliding_window, **kwargs)


class _Latent:
    """In front of a stock model class: the attention of every layer becomes latent."""

    own_attention: type[LatentAttention]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for path, stock in attentions(model):
            model.base_model.set_submodule(path, self.own_attention(config, stock))
        model.post_init()  # initialises the new weights


register_decoders(__name__, "with latent keys and values", LATENT, _Latent, lambda stock: LatentAttention)
