"""Encoder-decoders with fewer key/value heads than query heads, or one latent for all cross-attentions: `kvfold_t5`.

transformers' T5 has one number of heads, and ignores any other that a config names. The classes here are the stock
ones, in which the k and v of the decoder's attentions are as narrow as the config says: one number for self-attention
and one for cross-attention, for all layers or for each. The stock forwards take the heads as they come, and so do the
caches: modules, tensor names and forwards are theirs.

Where the config has a `cross_latent_dim`, every cross-attention is a `LatentCrossAttention`: the first layer's makes
the latent of the encoder's output and caches it, the others are shown it. It lies in the cross-attention cache as the
keys of layer 0, a single head with values of no width, so that growing and static caches, beams and assisted generation
take it as it is. Importing this module registers the classes with transformers.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from kvfold.attention.latent import absorbed_attention, absorbs
from kvfold.families import own_type
from kvfold.families.t5 import CLASSES, HEADS, LATENT
from kvfold.hf.deriving import derive
from kvfold.hf.sharing import STATES, hand_out


class LatentCrossAttention:
    """In front of a stock T5 attention: reads its keys and values off the latent that the first layer makes.

    A step that decodes is absorbed, whatever the attention implementation: no keys and values are written out. `eager`
    alone, which shows its weights, and training with dropout always write them out, as a whole target does.
    """

    def __init__(self, stock: Any, width: int) -> None:
        """Take the place of a cross-attention of as many heads; `width` is the latent's."""
        super().__init__(stock.config, layer_idx=stock.layer_idx)  # type: ignore[call-arg]
        attention: Any = self
        attention.num_key_value_groups = stock.num_key_value_groups
        for name in ("k", "v"):
            rows, beside = stock.k.out_features, name == "v" and width < stock.d_model
            setattr(self, name, nn.Linear(width, rows, bias=beside))
        if stock.layer_idx == 0 and width < stock.d_model:
            attention.kv_down = nn.Linear(stock.d_model, width, bias=False)

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, position_bias, weights or None)`."""
        shared = kwargs.pop(STATES)
        if self.layer_idx == 0:
            shared[0] = self._latent(key_value_states, past_key_values)
        latent_BSR, fresh = shared[0]
        if self._writes_out(hidden_states.shape[1], fresh, latent_BSR.shape[-1]):
            told = {"key_value_states": latent_BSR, "position_bias": position_bias}
            return super().forward(hidden_states, mask, **told, **kwargs)  # type: ignore[misc, no-any-return]
        width = self.key_value_proj_dim
        k_up_GER, v_up_GER = (each.weight.unflatten(0, (-1, width)) for each in (self.k, self.v))
        v_bias_GE = v_up_GER.new_zeros(1, width) if self.v.bias is None else self.v.bias.view(-1, width)
        q_BHTE = self.q(hidden_states).unflatten(-1, (-1, width)).transpose(1, 2)
        rotated_BSM = latent_BSR[..., :0]  # nothing is
        how = {"mask": mask, "scale": self.scaling, "causal": False}
        o_BHTE = absorbed_attention(q_BHTE, rotated_BSM, latent_BSR, k_up_GER, v_up_GER, v_bias_GE, **how)
        return self.o(o_BHTE.transpose(1, 2).flatten(2)), position_bias, None

    def _latent(self: Any, encoded_BSD: Tensor, past: Any) -> tuple[Tensor, bool]:
        """The latent `(B, S, R)`, and whether it is new: made of what the encoder put out, or out of the cache."""
        if past is not None and past.is_updated.get(0):
            return past.cross_attention_cache.layers[0].keys[:, 0], False
        latent_BSR = self.kv_down(encoded_BSD) if hasattr(self, "kv_down") else encoded_BSD
        if past is not None:
            one_B1SR = latent_BSR[:, None]
            latent_BSR = past.cross_attention_cache.update(one_B1SR, one_B1SR[..., :0], 0)[0][:, 0]
            past.is_updated[0] = True
        return latent_BSR, True

    def _writes_out(self: Any, tokens: int, fresh: bool, latent: int) -> bool:
        """Whether the stock attention is to make keys and values of the latent, for all of its tokens."""
        if self.config._attn_implementation == "eager" or (self.training and self.dropout > 0):
            return True
        groups, width = self.n_heads // self.num_key_value_groups, self.key_value_proj_dim
        return not absorbs(tokens, fresh, groups, self.n_heads, width, 0, latent)


class _Fewer:
    """In front of a stock model class: narrows k and v of the decoder's attentions, and lets them read a latent."""

    latent_attention: type

    def __init__(self, config: Any) -> None:
        """Build the stock model, then what is narrower. Raises ValueError for numbers that cannot be."""
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for kind, name in HEADS.items():
            said = getattr(config, name, None)
            common = config.num_heads if said is None else said
            found = common if isinstance(common, list) else [common] * config.num_decoder_layers
            for block, heads in zip(model.decoder.block, found, strict=True):
                narrow(block.layer[0].SelfAttention if kind == "self" else block.layer[1].EncDecAttention, heads)
        width = getattr(config, LATENT, None)
        if width is not None:
            if not 1 <= width <= config.d_model:
                raise ValueError(f"{LATENT} {width} is not one of 1 to {config.d_model}")
            for block in model.decoder.block:
                block.layer[1].EncDecAttention = self.latent_attention(block.layer[1].EncDecAttention, width)
            model.decoder.register_forward_pre_hook(hand_out, with_kwargs=True)
        model.post_init()  # draws the weights of what is new


def narrow(attention: Any, heads: int) -> None:
    """Give an attention of T5 so many key/value heads, their weights anew; ValueError for a number that cannot be."""
    if heads < 1 or attention.n_heads % heads:
        raise ValueError(f"{heads} key/value heads do not divide {attention.n_heads} query heads")
    attention.num_key_value_groups = attention.n_heads // heads  # by this, transformers' own attention knows of groups
    if heads < attention.n_heads:
        for name in ("k", "v"):
            setattr(attention, name, nn.Linear(attention.d_model, heads * attention.key_value_proj_dim, bias=False))


_derived = partial(derive, __name__, "with fewer key/value heads in the decoder, or a latent")


def _register(model_type: str, name: str) -> None:
    """Derive the classes of one stock architecture and tell transformers of them."""
    ours = own_type(model_type)
    config = _derived(getattr(transformers, f"{name}Config"), f"Kvfold{name}Config", model_type=ours)
    AutoConfig.register(ours, config)
    module = sys.modules[getattr(transformers, f"{name}Model").__module__]
    attention = _derived(getattr(module, f"{name}Attention"), f"KvfoldLatent{name}Attention", LatentCrossAttention)
    for end, auto in (("Model", AutoModel), ("ForConditionalGeneration", AutoModelForSeq2SeqLM)):
        stock, fields = getattr(transformers, f"{name}{end}"), {"config_class": config, "latent_attention": attention}
        auto.register(config, _derived(stock, f"Kvfold{name}{end}", _Fewer, **fields))


for _model_type, _name in CLASSES.items():
    _register(_model_type, _name)
