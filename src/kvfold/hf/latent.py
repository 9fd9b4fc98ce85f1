"""Decoders with latent keys and values: `kvfold_latent_llama`, `kvfold_latent_qwen2` and others.

A stock model in which the attention of every layer is `LatentAttention`; everything else, forwards and tensor names
included, is the stock class's own. `config.json` has the sizes of each layer: `rope_chunks`, the number of rotated
planes of a key head, and `latent_dims`. The cache is transformers' own (growing, static, sliding or quantised): its
keys are the rotated planes of all heads, its values the latent, each stored as a single head. Importing this module
registers the classes with transformers' Auto classes.

Stock `deepseek_v3` writes out the keys and values of its latent at each step. `kvfold_deepseek_v3` is the same model
with `SharedLatentAttention`; `kvfold.hf.load` builds it for checkpoints of the stock class.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kvfold.attention.latent import absorbed_attention, absorbs, chosen, turn, written_out
from kvfold.contracts.runtimes import ABSORBED, LATENT, stock_type
from kvfold.hf.attention import NAME, ROUNDINGS, implementation
from kvfold.hf.subclass import Replacement, attentions, awaited, register_decoders
from kvfold.solve.rope import rotate


class _Attention(Replacement):
    """Attention over a cache of rotated coordinates of keys, and a latent of width R for all else."""

    architecture: ModuleType
    o_proj: nn.Module
    rotated: int  # coordinates of a head that are rotated
    width: int  # R
    shared = False  # whether all heads have the same rotated coordinates
    sliding_window: int | None = None

    def ups(self) -> tuple[Tensor, Tensor, Tensor]:
        """The maps from the latent: `k_up_GNR`, `v_up_GER`, and the bias of values `v_bias_GE`."""
        raise NotImplementedError

    def attend(
        self, q_BHTE: Tensor, rotated_BSM: Tensor, latent_BSR: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Queries over a cache -> the output `(o_BTD, weights or None)`."""
        name, (heads, tokens) = self.config._attn_implementation, q_BHTE.shape[1:3]
        if mask is None and tokens > 1:  # the unused end of a static cache during prefill
            rotated_BSM, latent_BSR = rotated_BSM[:, :tokens], latent_BSR[:, :tokens]
        if rounded := ROUNDINGS.get(name):
            rotated_BSM, latent_BSR, name = rounded(rotated_BSM), rounded(latent_BSR), NAME
        ups, keys = self.ups(), latent_BSR.shape[1]
        groups, value = ups[-1].shape
        expands = name == "eager" or (self.training and self.attention_dropout > 0)
        sizes = (groups, heads, (q_BHTE.shape[-1] + value) // 2, self.rotated, self.width)
        if not expands and absorbs(tokens, tokens == keys, *sizes):
            options: dict[str, Any] = {"mask": mask, "scale": self.scaling, "shared": self.shared}
            o_BHTE = absorbed_attention(q_BHTE, rotated_BSM, latent_BSR, *ups, **options)
            heads_BTHE, weights = o_BHTE.transpose(1, 2), None
        else:
            k_BGSE, v_BGSE = written_out(rotated_BSM, latent_BSR, *ups, shared=self.shared)
            if (wider := k_BGSE.shape[-1] - value) > 0:  # PyTorch's kernels that hold no logits want one width
                v_BGSE = pad(v_BGSE, (0, wider))
            function = implementation(self, name)
            heads_BTHE, weights = function(q_BHTE, k_BGSE, v_BGSE, mask, sliding_window=self.sliding_window, **kwargs)
            heads_BTHE = heads_BTHE[..., :value]
        return self.o_proj(heads_BTHE.flatten(2).contiguous()), weights


class LatentAttention(_Attention):
    """Attention over cached latents (EliteKV, arXiv 2503.01586), in place of a stock one whose q and o it takes over.

    Per token and layer it caches the rotated planes of all key heads (M numbers) and one latent of width R for all
    other coordinates of the keys and for the values. Prefill and training expand keys and values and pass them to the
    model's attention implementation. A decoding step folds the expansion into the query and the output instead, with
    any implementation but `eager`, which returns attention weights.
    """

    planes: Tensor
    q_proj: nn.Module

    def __init__(self, config: Any, stock: Any) -> None:
        super().__init__(config, stock, "q_proj", "o_proj")
        self.sliding_window = getattr(stock, "sliding_window", getattr(config, "sliding_window", None))
        chunks, self.width = config.rope_chunks[self.layer_idx], config.latent_dims[self.layer_idx]
        self.rotated, hidden = 2 * chunks, config.hidden_size
        free = self.head_dim - self.rotated
        self.k_rope = nn.Linear(hidden, self.groups * self.rotated, bias=stock.k_proj.bias is not None)
        self.kv_down = nn.Linear(hidden, self.width, bias=False)
        self.k_up = nn.Linear(self.width, self.groups * free, bias=False) if free else None
        self.v_up = nn.Linear(self.width, self.groups * self.head_dim)
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
        return self.attend(q_BHTE, rotated_BSM, latent_BSR, attention_mask, **kwargs)

    def rotation(self, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(H, T, P)` of the rotation of each query head's first coordinates."""
        cos_BTHP, sin_BTHP = chosen(cos_TE[None], sin_TE[None], self._planes_of_queries())
        return cos_BTHP[0].transpose(0, 1), sin_BTHP[0].transpose(0, 1)

    def _planes_of_queries(self) -> Tensor:
        return self.planes.repeat_interleave(self.num_key_value_groups, dim=0)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(self.groups, -1, weight.shape[-1])

    def ups(self) -> tuple[Tensor, Tensor, Tensor]:
        """The maps from the latent, by key head."""
        none_GNR = self.v_up.weight.new_zeros(self.groups, 0, self.width)
        k_up_GNR = none_GNR if self.k_up is None else self._by_head(self.k_up.weight)
        return k_up_GNR, self._by_head(self.v_up.weight), self.v_up.bias.view(self.groups, self.head_dim)


class SharedLatentAttention(_Attention):
    """Multi-head latent attention (arXiv 2405.04434) in place of DeepSeek-V3's, all of whose tensors it takes over.

    A decoding step attends to the cached latent and the rotated key of all heads as they are.
    """

    shared = True
    queries: tuple[str, ...]  # the modules between the input and the queries
    kv_a_proj_with_mqa: nn.Module
    kv_a_layernorm: nn.Module
    kv_b_proj: nn.Linear

    def __init__(self, config: Any, stock: Any) -> None:
        stock.head_dim = stock.qk_head_dim
        queries = ("q_proj",) if config.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
        super().__init__(config, stock, *queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        self.queries = queries
        self.rotated, self.width, self.free = stock.qk_rope_head_dim, stock.kv_lora_rank, stock.qk_nope_head_dim

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        cos_B1TE, sin_B1TE = (each[:, None] for each in self.rotation(*position_embeddings))
        query: Any = hidden_states
        for name in self.queries:
            query = self.get_submodule(name)(query)
        q_BHTE = query.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q_BHTE = rotate(q_BHTE, cos_B1TE, sin_B1TE, half_split=False)
        latent, key = self.kv_a_proj_with_mqa(hidden_states)[:, None].split([self.width, self.rotated], dim=-1)
        latent_B1SR = self.kv_a_layernorm(latent)
        key_B1SP = rotate(key, cos_B1TE[..., self.free :], sin_B1TE[..., self.free :], half_split=False)
        if past_key_values is not None:
            latent_B1SR, key_B1SP = past_key_values.update(latent_B1SR, key_B1SP, self.layer_idx)
        return self.attend(q_BHTE, key_B1SP.squeeze(1), latent_B1SR.squeeze(1), attention_mask, **kwargs)

    def rotation(self, cos_TE: Tensor, sin_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a head's coordinates: neighbours rotate together, and the first ones by no angle."""
        still = cos_TE.new_zeros(*cos_TE.shape[:-1], self.free)
        cos, sin = (each[..., : self.rotated // 2].repeat_interleave(2, dim=-1) for each in (cos_TE, sin_TE))
        return torch.cat([still + 1, cos], dim=-1), torch.cat([still, sin], dim=-1)

    def ups(self) -> tuple[Tensor, Tensor, Tensor]:
        """The maps from the latent, by head. Values have no bias."""
        up_HXR = self.kv_b_proj.weight.view(self.heads, -1, self.width)
        k_up_HNR, v_up_HER = up_HXR[:, : self.free], up_HXR[:, self.free :]
        return k_up_HNR, v_up_HER, v_up_HER.new_zeros(v_up_HER.shape[:2])


class _Latent:
    """In front of a stock model class: the attention of every layer becomes latent."""

    own_attention: type[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for path, stock in attentions(model):
            model.base_model.set_submodule(path, self.own_attention(config, stock))
        model.post_init()  # initialises the new weights


class _SavedAsStock:
    """In front of a stock config class: what is saved is a checkpoint of the stock class."""

    def to_dict(self) -> dict[str, Any]:
        """The fields of the stock config.json."""
        made: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        names = made.get("architectures") or []
        stock = stock_type(made)
        return {**made, "model_type": stock, "architectures": [name.removeprefix(ABSORBED.stem) for name in names]}


ABOUT = "with latent keys and values"
register_decoders(__name__, ABOUT, LATENT, _Latent, lambda stock: LatentAttention)
register_decoders(__name__, ABOUT, ABSORBED, _Latent, lambda stock: SharedLatentAttention, config=(_SavedAsStock,))

__getattr__ = partial(awaited, __name__)
