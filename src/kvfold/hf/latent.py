"""Decoders with latent keys and values: `kvfold_latent_llama`, `kvfold_latent_qwen2` and their like.

A stock model in which every layer's attention is `LatentAttention`; all else, forwards and tensor names included, is
the stock classes' own. `config.json` says what each layer keeps: `rope_chunks`, rotated planes of each key head, and
`latent_dims`. A cache layer is one of transformers' own: its keys are the rotated planes of all heads side by side, its
values the latent, each a single head, so that a growing, a static, a sliding and a quantised cache take them as they
are. Importing this module registers the classes with transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from kvfold.attention.latent import absorbed_attention, absorbs, chosen, turn, written_out
from kvfold.contracts.runtimes import LATENT, STEMS
from kvfold.hf.attention import NAME, NAME_FP8, through_fp8
from kvfold.hf.subclass import attentions, derive, register_decoder


class LatentAttention(nn.Module):
    """The attention of one layer, in place of a stock one, whose q and o it takes over.

    Prompts and training write keys and values out and hand them to the model's attention implementation; a step that
    decodes is absorbed, whatever the implementation. `eager` alone is always written out: it shows its weights.
    """

    planes: Tensor

    def __init__(self, config: Any, stock: Any) -> None:
        nn.Module.__init__(self)  # and not the stock attention's, behind which a derived class puts this one
        self.config, self.layer_idx = config, stock.layer_idx
        self.head_dim, self.scaling = stock.head_dim, stock.scaling
        self.groups, self.num_key_value_groups = config.num_key_value_heads, stock.num_key_value_groups
        self.attention_dropout, self.is_causal = stock.attention_dropout, True
        self.sliding_window = getattr(stock, "sliding_window", getattr(config, "sliding_window", None))
        chunks, width = config.rope_chunks[self.layer_idx], config.latent_dims[self.layer_idx]
        self.rotated, hidden = 2 * chunks, config.hidden_size
        free = self.head_dim - self.rotated
        self.q_proj, self.o_proj = stock.q_proj, stock.o_proj
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
        """Cosines and sines `(H, T, P)` by which the first coordinates of each query head are turned."""
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
        if mask is None and tokens > 1:  # a static cache that is being prefilled has an empty tail
            rotated_BSM, latent_BSR = rotated_BSM[:, :tokens], latent_BSR[:, :tokens]
        if name == NAME_FP8:
            rotated_BSM, latent_BSR, name = through_fp8(rotated_BSM), through_fp8(latent_BSR), NAME
        keys, width = latent_BSR.shape[1:]
        ups = (
            latent_BSR.new_zeros(self.groups, 0, width) if self.k_up is None else self._by_head(self.k_up.weight),
            self._by_head(self.v_up.weight),
            self.v_up.bias.view(self.groups, self.head_dim),
        )
        drops = self.training and self.attention_dropout > 0
        if (
            name != "eager"
            and not drops
            and absorbs(tokens, tokens == keys, self.groups, heads, self.head_dim, self.rotated, width)
        ):
            o_BHTE = absorbed_attention(q_BHTE, rotated_BSM, latent_BSR, *ups, mask=mask, scale=self.scaling)
            return o_BHTE.transpose(1, 2), None
        implementation: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        o_BTHE, weights = implementation(
            self,
            q_BHTE,
            *written_out(rotated_BSM, latent_BSR, *ups),
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return o_BTHE, weights


class _Latent:
    """In front of a stock model class: every layer's attention becomes latent."""

    latent_attention: type[LatentAttention]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for path, stock in attentions(model):
            model.base_model.set_submodule(path, self.latent_attention(config, stock))
        model.post_init()  # draws the weights of what is new


_ABOUT = "with latent keys and values"


def _register(model_type: str, name: str) -> None:
    """Derive the classes of one stock architecture and tell transformers of them."""
    stock: Any = getattr(transformers, f"{name}Model")
    # a kind of the stock attention: by its class a model finds what it is asked to show
    attention = derive(
        __name__, _ABOUT, stock._can_record_outputs["attentions"], f"KvfoldLatent{name}Attention", LatentAttention
    )
    names = (name, f"KvfoldLatent{name}")
    register_decoder(
        __name__, _ABOUT, LATENT.model_type(model_type), names, _Latent, fields={}, latent_attention=attention
    )


for _model_type in sorted(LATENT.models):
    _register(_model_type, STEMS[_model_type])
