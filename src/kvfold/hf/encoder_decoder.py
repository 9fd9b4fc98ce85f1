"""Encoder-decoders with fewer key/value heads than query heads, or one latent for all cross-attentions: `kvfold_t5`.

transformers' T5 and BART have one number of heads and ignore any other in the config; its T5Gemma has one number of
key/value heads for all attentions of the decoder. The classes here are the stock ones with narrower k and v in the
decoder's attentions: the config has one number for self-attention and one for cross-attention, for all layers or for
each. Modules, tensor names and caches are the stock ones. So are the forwards of T5, mT5 and T5Gemma; elsewhere it is
that of `GroupedAttention`, because the stock one gives keys the shape of queries, or has an `eager` that cannot share
heads.

If the config has `cross_attention_layers`, the other layers have no cross-attention, as in FiDO (de Jong et al. 2022,
arXiv 2212.08153): it and the norms of its branch are modules without parameters that add nothing to the residual
stream. The branches of `fading_cross_attention_layers` are multiplied by the decoder's `gate`, 1 in a loaded model.

If the config has a `cross_latent_dim`, every cross-attention is a `LatentCrossAttention`. The first one computes the
latent of the encoder's output and caches it; the others read it. It is stored in the cross-attention cache as the keys
of its layer, a single head, with values of width 0, so that growing and static caches, beam search and assisted
generation work unchanged. Importing this module registers the classes with transformers; they are made when needed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.attention.latent import absorbed_attention, absorbs
from kvfold.contracts.family import Family
from kvfold.contracts.paired_fields import CROSSING, FADING
from kvfold.contracts.runtimes import PAIRS, PAIRS_STOCK
from kvfold.contracts.site import Attention, Site
from kvfold.contracts.stock import STEMS
from kvfold.errors import UnsupportedModel
from kvfold.families import family_of
from kvfold.families._encoder_decoder import END
from kvfold.hf.shared_layers import STATES, hand_out
from kvfold.hf.subclass import awaited, derive, register_config


class _Replacing:
    """In front of a stock attention: takes over its modules and settings."""

    looked_at: str  # the stock attention's name for the encoder's output
    architecture: ModuleType  # the module of the stock class
    scales_first: bool  # whether queries are scaled before attention, as Whisper rounds

    def __init__(self, stock: Any, shape: Attention, names: Mapping[str, str]) -> None:
        """Replace a stock attention; `names` maps the roles `q`, `k`, `v` and `o` to its modules."""
        vars(self).update(vars(stock))  # the stock attention is not used again
        self.shape, self.names = shape, names


class GroupedAttention(_Replacing):
    """In front of a stock attention without rotation: query heads share key/value heads."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        encoded_BSD, past = kwargs.pop(self.looked_at, None), past_key_values
        crosses = encoded_BSD is not None
        cache = past and (past.cross_attention_cache if crosses else past.self_attention_cache)
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place
        if crosses and past is not None and past.is_updated.get(self.layer_idx):
            k_BGSE, v_BGSE = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            k_BGSE, v_BGSE = (self._heads(role, encoded_BSD if crosses else hidden_states) for role in "kv")
            if cache is not None:
                k_BGSE, v_BGSE = cache.update(k_BGSE, v_BGSE, self.layer_idx)
            if crosses and past is not None:
                past.is_updated[self.layer_idx] = True
        q_BHTE = self._heads("q", hidden_states)
        if getattr(self, "has_relative_attention_bias", False):
            sizes = (q_BHTE.shape[2], k_BGSE.shape[2])
            kwargs["position_bias"] = self.compute_bias(*sizes, device=q_BHTE.device, past_seen_tokens=seen)
        name = self.config._attn_implementation
        if name == "eager":  # the only one that cannot share heads
            k_BGSE, v_BGSE = (each.repeat_interleave(self.shape.query_group, dim=1) for each in (k_BGSE, v_BGSE))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.architecture.eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        scale = self.shape.logit_scale
        if self.scales_first:
            q_BHTE, scale = q_BHTE * scale, 1.0
        o_BTHE, weights = attend(self, q_BHTE, k_BGSE, v_BGSE, attention_mask, dropout=dropout, scaling=scale, **kwargs)
        return getattr(self, self.names["o"])(o_BTHE.flatten(2)), weights

    def _heads(self: Any, role: str, x_BTD: Tensor) -> Tensor:
        """The heads `(B, H, T, E)` of the projection for a role."""
        rows_BTN: Tensor = getattr(self, self.names[role])(x_BTD)
        return rows_BTN.view(*rows_BTN.shape[:-1], -1, self.shape.head_dim).transpose(1, 2)


class LatentCrossAttention(_Replacing):
    """In front of a stock cross-attention: keys and values are linear in one latent of the encoder's output (B, S, R).

    A decoding step folds the expansion of the latent into the query and the output: no keys and values are computed. A
    whole target, training with dropout, and `eager`, which returns attention weights, expand them.
    """

    def __init__(self, stock: Any, shape: Attention, names: Mapping[str, str]) -> None:
        """Replace a stock cross-attention."""
        super().__init__(stock, shape, names)
        for role in ("k", "v"):
            rows, width = shape.roles()[role]
            setattr(self, names[role], nn.Linear(width, rows, bias=f"{role}_bias" in shape.roles()))
        if "kv_down" in shape.roles():
            self.kv_down = nn.Linear(shape.input_width, width, bias=False)

    def forward(
        self: Any, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor | None, ...]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `o_BTD` and the other outputs."""
        shared, encoded_BSD = kwargs.pop(STATES), kwargs.pop(self.looked_at)
        if self.shape.source is None:
            shared[self.layer_idx] = self._latent(encoded_BSD, past_key_values)
        latent_BSR, fresh = shared[self.layer_idx if self.shape.source is None else self.shape.source]
        if self._writes_out(hidden_states.shape[1], fresh):
            kwargs[self.looked_at] = latent_BSR
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc,no-any-return]
        width = self.shape.head_dim
        q, k, v, o = (getattr(self, self.names[role]) for role in "qkvo")
        k_up_GER, v_up_GER = (each.weight.unflatten(0, (-1, width)) for each in (k, v))
        v_bias_GE = v_up_GER.new_zeros(1, width) if v.bias is None else v.bias.view(-1, width)
        q_BHTE = q(hidden_states).unflatten(-1, (-1, width)).transpose(1, 2)
        softcap = self.shape.softcap
        biased = softcap is not None and k.bias is not None  # without a cap, softmax ignores a bias of the keys
        o_BHTE = absorbed_attention(
            q_BHTE,
            latent_BSR[..., :0],  # nothing is rotated
            latent_BSR,
            k_up_GER,
            v_up_GER,
            v_bias_GE,
            mask=kwargs.get("mask", kwargs.get("attention_mask")),
            scale=self.scaling,
            causal=False,
            softcap=softcap,
            k_bias_GN=k.bias.view(-1, width) if biased else None,
        )
        o_BTD = o(o_BHTE.transpose(1, 2).flatten(2))
        return (o_BTD, kwargs["position_bias"], None) if "position_bias" in kwargs else (o_BTD, None)

    def _latent(self: Any, encoded_BSD: Tensor, past: Any) -> tuple[Tensor, bool]:
        """The latent `(B, S, R)`, and whether it was computed now or comes from the cache."""
        if past is not None and past.is_updated.get(self.layer_idx):
            return past.cross_attention_cache.layers[self.layer_idx].keys[:, 0], False
        latent_BSR = self.kv_down(encoded_BSD) if hasattr(self, "kv_down") else encoded_BSD
        if past is not None:
            one_B1SR = latent_BSR[:, None]
            latent_BSR = past.cross_attention_cache.update(one_B1SR, one_B1SR[..., :0], self.layer_idx)[0][:, 0]
            past.is_updated[self.layer_idx] = True
        return latent_BSR, True

    def _writes_out(self: Any, tokens: int, fresh: bool) -> bool:
        """Whether the stock attention expands keys and values of the latent, for all tokens."""
        dropout = self.attention_dropout if hasattr(self, "attention_dropout") else self.dropout
        if self.config._attn_implementation == "eager" or (self.training and dropout > 0):
            return True
        shape, latent = self.shape, self.shape.kept["latent"]
        heads, groups = shape.num_attention_heads, shape.num_key_value_heads
        return not absorbs(tokens, fresh, groups, heads, shape.head_dim, 0, latent)


class Silent(nn.Module):
    """In place of a cross-attention that is removed: adds nothing to the residual stream, and caches nothing."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """`hidden_states` (B, T, D) -> zeros, and the other outputs of the stock attention."""
        none_BTD = torch.zeros_like(hidden_states)
        return (none_BTD, kwargs["position_bias"], None) if "position_bias" in kwargs else (none_BTD, None)


def silence(decoder: nn.Module, family: Family, site: Site) -> None:
    """Remove a cross-attention and the norms of its branch from a decoder."""
    for path in family.branch(site):
        decoder.set_submodule(inside_decoder(path), Silent() if path == family.module(site) else nn.Identity())


@contextmanager
def silenced(decoder: nn.Module, family: Family, sites: Collection[Site]) -> Iterator[None]:
    """A context in which these cross-attentions are removed."""
    paths = [inside_decoder(path) for site in sites for path in family.branch(site)]
    before = {path: decoder.get_submodule(path) for path in paths}
    for site in sites:
        silence(decoder, family, site)
    try:
        yield
    finally:
        for path, module in before.items():
            decoder.set_submodule(path, module)


def fade(decoder: nn.Module, family: Family, site: Site) -> None:
    """Multiply what the branch of a cross-attention adds to the residual stream by the `gate` of the decoder."""
    body, attention = family.body, decoder.get_submodule(inside_decoder(family.module(site)))
    norm = body.after.get("cross")
    last = attention if norm is None else decoder.get_submodule(inside_decoder(body.inside(site.layer, norm)))
    stream = list[Tensor]()
    if body.post_norm:  # it puts out the stream behind the branch
        attention.register_forward_pre_hook(partial(_keep, stream), with_kwargs=True)
    last.register_forward_hook(partial(_gated, decoder, stream))


def _keep(stream: list[Tensor], module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
    stream[:] = [args[0] if args else kwargs["hidden_states"]]


def _gated(decoder: Any, stream: list[Tensor], module: nn.Module, args: Any, result: Any) -> Any:
    if isinstance(result, tuple):
        return (decoder.gate * result[0], *result[1:])
    return torch.lerp(stream.pop().to(result), result, decoder.gate) if stream else decoder.gate * result


def inside_decoder(path: str) -> str:
    """The path of a module below the decoder."""
    return path.partition("decoder.")[2]


class _Fewer:
    """In front of a stock model class: narrows k and v of the decoder's attentions, or makes them read a latent."""

    latent_attention: type
    grouped_attention: type | None  # None: the stock one can share heads

    def __init__(self, config: Any) -> None:
        """Build the stock model, then replace modules. Raises ValueError for impossible numbers of heads."""
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        decoder = model.get_decoder()
        try:
            family = family_of(config.to_dict())
            shape = family.shape(config.to_dict())
        except UnsupportedModel as error:  # transformers' own models raise ValueError
            raise ValueError(str(error)) from error
        for layer in set(range(shape.num_layers)) - {site.layer for site in shape.crossed}:
            silence(decoder, family, Site(layer, "cross"))
        for site, attention in shape.sites.items():
            if site.kind == "encoder":
                continue
            path, _, name = inside_decoder(family.module(site)).rpartition(".")
            holder = decoder.get_submodule(path)
            module = getattr(holder, name)
            module.num_key_value_groups = attention.query_group  # read by transformers' attention
            names = {role: family.tensor(site, role).split(".")[-2] for role in "qkvo"}
            for role in ("k", "v"):
                narrow(module, names[role], attention)
            made = self.grouped_attention if attention.kept is None else self.latent_attention
            if made is not None:
                setattr(holder, name, made(module, attention, names))
        if any(attention.kept is not None for attention in shape.sites.values()):
            decoder.register_forward_pre_hook(hand_out, with_kwargs=True)
        decoder.gate = 1.0
        for site in shape.crossed:
            if shape.sites[site].fades:
                fade(decoder, family, site)
        model.post_init()  # initialises the new weights

    def remove_faded(self: Any) -> None:
        """Remove the cross-attentions that fade, as their gate is closed."""
        family = family_of(self.config.to_dict())
        shape = family.shape(self.config.to_dict())
        removed = [site for site in shape.crossed if shape.sites[site].fades]
        for site in removed:
            silence(self.get_decoder(), family, site)
        setattr(self.config, CROSSING, [site.layer for site in shape.crossed if site not in removed])
        setattr(self.config, FADING, None)


def narrow(module: nn.Module, name: str, attention: Attention) -> None:
    """Replace a linear module that has more rows than the key/value heads need by a new, narrower one."""
    linear, rows = getattr(module, name), attention.num_key_value_heads * attention.head_dim
    if rows < linear.out_features:
        setattr(module, name, nn.Linear(linear.in_features, rows, bias=linear.bias is not None))


SHARING = ("t5", "mt5", "t5gemma")
"""Architectures whose stock attention takes fewer key/value heads as they are; T5's `eager` does not."""

ENCODED = ("key_value_states", "encoder_hidden_states")
"""The names of the encoder's output in stock attentions."""

_ABOUT = "with fewer key/value heads in the decoder, or a latent"


def _register_models(model_type: str, name: str, config: type) -> None:
    """Derive the model classes of one architecture and register them for their config class."""
    module = sys.modules[getattr(transformers, f"{name}Model").__module__]
    crossed = getattr(module, f"{name}Attention", None) or getattr(module, f"{name}CrossAttention")  # T5Gemma's
    looked_at = next(each for each in ENCODED if each in signature(crossed.forward).parameters)
    named: dict[str, Any] = {"looked_at": looked_at, "architecture": module, "scales_first": model_type == "whisper"}
    front = () if model_type in SHARING else (GroupedAttention,)
    derived = partial(derive, __name__, _ABOUT)
    classes: dict[str, Any] = {
        "config_class": config,
        "grouped_attention": derived(crossed, f"Kvfold{name}Attention", *front, **named) if front else None,
        "latent_attention": derived(crossed, f"KvfoldLatent{name}Attention", LatentCrossAttention, *front, **named),
    }
    headed = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    for stock, auto in ((f"{name}Model", AutoModel), (PAIRS_STOCK.architecture(model_type, END), headed)):
        auto.register(config, derived(getattr(transformers, stock), f"Kvfold{stock}", _Fewer, **classes))


def _register(model_type: str, name: str) -> None:
    stock, ours = getattr(transformers, f"{name}Config"), PAIRS.model_type(model_type)
    parts = [f"Latent{name}Attention", f"{name}Model", PAIRS_STOCK.architecture(model_type, END)]
    if model_type not in SHARING:
        parts.append(f"{name}Attention")
    makes, make = [f"Kvfold{part}" for part in parts], partial(_register_models, model_type, name)
    register_config(__name__, _ABOUT, stock, f"Kvfold{name}Config", makes=makes, make=make, model_type=ours)


for _model_type in sorted(PAIRS.models):
    _register(_model_type, STEMS[_model_type])

__getattr__ = partial(awaited, __name__)
