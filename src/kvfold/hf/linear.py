"""Decoders with linear attention behind a window: `kvfold_linear_llama`, `kvfold_linear_qwen2` and their like.

A stock model in which the attention of some layers is `LinearAttention`; all else, forwards and tensor names included,
is the stock classes' own. `config.json` says which layers (`layer_types`) and how (`linear_attention`). While nothing
has left the window, such a layer is the softmax attention of the model's own implementation, to the bit.

The cache layer is ours, found by transformers' caches through `layer_types`: the last tokens, the sinks, and the sums
of all that is older, whose size no text changes. What has entered the sums cannot be taken out again, so while a past
is recorded (assisted generation) tokens wait beside them until they are known to stay. Importing this module registers
the classes with transformers' Auto classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.attention.linear import (
    Past,
    Sinks,
    Sums,
    Weights,
    absorbed,
    decode,
    linear_attention,
    normed,
    slopes,
)
from kvfold.contracts.runtimes import LINEAR, LINEAR_LAYER, STEMS
from kvfold.errors import SettingError
from kvfold.hf.attention import NAME_FP8, through_fp8
from kvfold.hf.shared_layers import normed_heads
from kvfold.hf.subclass import attentions, derive, register_decoder

SEEN = "kvfold_seen"
"""The name under which the mask of a batch with padding goes through a forward: `(B, S)`, False for padding."""


class LinearLayer(CacheLayerMixin):  # type: ignore[misc]
    """What one layer of linear attention keeps of a text, in tensors that are replaced and never written into."""

    _layer_type = LINEAR_LAYER
    is_sliding = True  # so that masks are sized by the layers that keep everything, where there are any
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.window, self.length = 0, 0  # tokens: of softmax, and read
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.state: Tensor | None = None
        self.mass: Tensor | None = None
        self.record_past, self.settled = False, 0  # settled: of the kept tokens, those that are known to stay

    @property
    def sums(self) -> Sums | None:
        """What is no longer kept as tokens."""
        return None if self.state is None else Sums(self.state, self.mass)

    @sums.setter
    def sums(self, made: Sums | None) -> None:
        self.state, self.mass = (None, None) if made is None else (made.state_BGFE, made.mass_BGF)

    def with_kept(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values behind those that are kept."""
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def keep(self, keys: Tensor, values: Tensor, left: int, count: int) -> None:
        """Keep all but the first `left` tokens, in storage of their own, after `count` more were read."""
        self.keys, self.values = (each[:, :, left:].clone() if left else each for each in (keys, values))
        self.length += count
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is laid out before it is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise SettingError: what is kept is decided by `LinearAttention`."""
        raise SettingError("a cache of linear attention is not filled from outside")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of a mask, and the first of them: all while nothing has left the window, and else no more than queries.

        Then nobody reads it, and it does not grow with the text.
        """
        whole = self.length + query_length
        return (whole, 0) if whole <= self.window else (query_length, self.length)

    def get_seq_length(self) -> int:
        """Tokens read."""
        return self.length

    def get_max_length(self) -> int:
        """None is the last."""
        return -1

    def activate_past_recording(self) -> None:
        """Let tokens wait for `crop` before they enter the sums."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; what is left is known to stay. Raises SettingError for what is in the sums."""
        count = abs(tokens_to_remove)
        kept = 0 if self.keys is None else self.keys.shape[2]
        if count > kept - min(self.window, self.length - count) and count and kept < self.length:
            raise SettingError(f"{count} tokens cannot be taken back", next="call activate_past_recording first")
        if count and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, : kept - count], self.values[:, :, : kept - count]
            self.length -= count
        if self.sink_keys is not None and self.sink_values is not None:
            self.sink_keys, self.sink_values = (
                self.sink_keys[:, :, : self.length],
                self.sink_values[:, :, : self.length],
            )
        self.settled = max(0, kept - count - self.window)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row what another has kept."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda tensor: tensor[indices])

    def _each(self, change: Any) -> None:
        for name in ("keys", "values", "sink_keys", "sink_values", "state", "mass"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))


STATIC_LAYER_TYPE_MAPPING[LINEAR_LAYER] = LinearLayer  # nothing grows: a static cache is the same


class Maps(nn.Module):
    """A linear map of each head: `(B, H, T, E) -> (B, H, T, F)`; weights lie as of one Linear, (H F, E)."""

    def __init__(self, heads: int, width: int, made: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.eye(made, width).repeat(heads, 1))
        self.bias = nn.Parameter(torch.zeros(heads * made)) if bias else None

    def forward(self, rows_BHTE: Tensor) -> Tensor:
        """Each head by its own map; a multiple of heads takes the map of its group."""
        batch, heads, tokens, width = rows_BHTE.shape
        weight_HFE = self.weight.view(self.heads, -1, width)
        rows_BHXE = rows_BHTE.reshape(batch, self.heads, -1, width)
        made_BHXF = rows_BHXE @ weight_HFE.mT
        if self.bias is not None:
            made_BHXF = made_BHXF + self.bias.view(self.heads, 1, -1)
        return made_BHXF.view(batch, heads, tokens, -1)


class LinearAttention(nn.Module):
    """The attention of one layer, in place of a stock one, whose projections and norms it takes over."""

    architecture: ModuleType  # of the stock class: its rotation and its eager attention

    def __init__(self, config: Any, stock: Any) -> None:
        nn.Module.__init__(self)  # and not the stock attention's, behind which a derived class puts this one
        self.config, self.layer_idx = config, stock.layer_idx
        self.head_dim, self.scaling = stock.head_dim, stock.scaling
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = stock.num_key_value_groups
        self.attention_dropout, self.is_causal = stock.attention_dropout, True
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if hasattr(stock, name):
                setattr(self, name, getattr(stock, name))
        said = config.linear_attention
        self.window, self.sinks = said["window"], said["sinks"]
        self.kind, self.rotates_features = said["features"], said["rope"] == "after"
        self.normalised = said["norm"] == "denominator"
        width, made = self.head_dim, said["feature_dim"]
        if self.kind == "relu":
            self.phi = Maps(self.groups, width, made, bias=True)
        elif self.kind == "hedgehog":
            self.phi_q = Maps(self.heads, width, made // 2, bias=False)
            self.phi_k = Maps(self.groups, width, made // 2, bias=False)
        self.window_gate = None
        if self.kind != "none" and self.window:
            self.window_gate = nn.Parameter(torch.zeros(self.heads))  # the logarithm
        decays = said["decay"]
        self.log_decay = None if decays == "none" else slopes(decays, self.groups)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        mine: Any = self
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = normed_heads(self, "q_norm", mine.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = normed_heads(self, "k_norm", mine.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = mine.v_proj(hidden_states).view(heads).transpose(1, 2)
        turn = self.architecture.apply_rotary_pos_emb
        phi_q = phi_k = None
        if self.rotates_features:
            phi_q, phi_k = turn(self._features(query, "q"), self._features(key, "k"), *position_embeddings)
        query, key = turn(query, key, *position_embeddings)
        if self.kind != "none" and not self.rotates_features:
            phi_q = self._features(query, "q")
            phi_k = None if self.window else self._features(key, "k")
        if self.config._attn_implementation == NAME_FP8:
            key, value = through_fp8(key), through_fp8(value)
        new = _New(query, key, value, phi_q, phi_k, kwargs.pop(SEEN, None))
        keeps = past_key_values is not None
        layer = past_key_values.layers[self.layer_idx] if keeps else LinearLayer()
        if keeps:
            self._prepare(layer, new)
        if layer.length + hidden_states.shape[1] <= self.window:
            heads_BTHE, weights = self._softmax(new, layer, attention_mask, **kwargs)
        else:
            heads_BTHE, weights = self._linear(new, layer, keeps).transpose(1, 2), None
        return mine.o_proj(heads_BTHE.flatten(2).contiguous()), weights

    def removable(self) -> Sequence[str]:
        """The sums, where a window stands beside them."""
        return ("sums",) if self.window and self.kind != "none" else ()

    @contextmanager
    def without(self, part: str) -> Iterator[None]:
        """The window and the sinks alone, for texts that begin and end meanwhile."""
        kind, self.kind = self.kind, "none"
        try:
            yield
        finally:
            self.kind = kind

    def _features(self, rows_BHTE: Tensor, role: str) -> Tensor:
        """Features of queries or of keys, `(B, H, T, F)`."""
        mine: Any = self
        if self.kind == "relu":
            return cast(Tensor, mine.phi(rows_BHTE).relu())
        rows_BHTF = mine.phi_q(rows_BHTE) if role == "q" else mine.phi_k(rows_BHTE)
        return torch.cat([rows_BHTF.softmax(-1), (-rows_BHTF).softmax(-1)], dim=-1)

    def _weights(self, like: Tensor) -> Weights:
        wide = torch.promote_types(like.dtype, torch.float32)
        decay_G = None
        if self.log_decay is not None:
            decay_G = torch.tensor(self.log_decay, dtype=wide, device=like.device)
        gate_H = None if self.window_gate is None else self.window_gate.exp()
        return Weights(self.window, self.normalised, self.scaling, decay_G, gate_H)

    def _prepare(self, layer: LinearLayer, new: _New) -> None:
        """Lay out sums for a text that begins, and let tokens that are known to stay enter them."""
        layer.window = self.window
        if self.kind == "none":
            left, layer.settled = layer.settled, 0
            if left and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[:, :, left:], layer.values[:, :, left:]
            return
        if layer.state is None:
            batch, groups, _, width = new.value.shape
            made, wide = (
                self.config.linear_attention["feature_dim"],
                torch.promote_types(new.value.dtype, torch.float32),
            )
            layer.state = new.value.new_zeros(batch, groups, made, width, dtype=wide)
            layer.mass = new.value.new_zeros(batch, groups, made, dtype=wide) if self.normalised else None
        if layer.settled and layer.keys is not None and layer.values is not None:
            left, layer.settled = layer.settled, 0
            free_BS, _ = self._free(layer, new, layer.keys)
            self._absorb(layer, layer.keys, layer.values, free_BS, left)
            layer.keys, layer.values = layer.keys[:, :, left:], layer.values[:, :, left:]

    def _absorb(
        self, layer: LinearLayer, keys_BGSE: Tensor, values_BGSE: Tensor, free_BS: Tensor | None, left: int
    ) -> None:
        """Let the first `left` tokens enter the sums."""
        phi_BGCF = self._far(keys_BGSE[:, :, :left])
        if phi_BGCF is None:
            return
        if free_BS is not None:
            phi_BGCF = phi_BGCF * free_BS[:, None, :left, None]
        layer.sums = absorbed(layer.sums, phi_BGCF, values_BGSE[:, :, :left], self._weights(keys_BGSE))

    def _far(self, keys_BGSE: Tensor) -> Tensor | None:
        """Features of kept keys: without a window these are what is kept."""
        if self.kind == "none":
            return None
        return self._features(keys_BGSE, "k") if self.window else keys_BGSE

    def _free(self, layer: LinearLayer, new: _New, keys: Tensor) -> tuple[Tensor | None, Sinks | None]:
        """Which of the kept and new tokens are neither padding nor sinks (None: all), and the sinks, counted from the
        first of them.
        """
        base = layer.length - (0 if layer.keys is None else layer.keys.shape[2])
        at_S = torch.arange(base, base + keys.shape[2], device=keys.device)
        first_B1 = at_S.new_zeros(1, 1) if new.seen is None else new.seen.long().argmax(1, keepdim=True)
        sinks = None
        if self.sinks and layer.sink_keys is not None and layer.sink_values is not None:
            count_N = torch.arange(layer.sink_keys.shape[2], device=keys.device)
            sinks = Sinks(layer.sink_keys, layer.sink_values, (first_B1 + count_N - base).expand(len(keys), -1))
        if new.seen is None and base >= self.sinks:
            return None, sinks
        free_BS = at_S >= first_B1 + self.sinks
        if new.seen is not None:
            free_BS = free_BS & new.seen[:, base : base + keys.shape[2]].to(keys.device)
        return free_BS.expand(len(keys), -1), sinks

    def _find_sinks(self, layer: LinearLayer, new: _New) -> None:
        """Keep the first tokens of each row that are no padding, as they come."""
        tokens = new.key.shape[2]
        count = min(layer.length + tokens, self.sinks)
        first_B = None if new.seen is None else new.seen.long().argmax(1)
        last = 0 if first_B is None else int(first_B.max())
        if not count or layer.length >= last + self.sinks:
            return
        kept = 0 if layer.sink_keys is None else layer.sink_keys.shape[2]
        place_N = torch.arange(count, device=new.key.device)
        at_BN = place_N.expand(len(new.key), -1) if first_B is None else first_B[:, None] + place_N
        from_BN = torch.where(at_BN < layer.length, place_N, kept + at_BN - layer.length).clamp(0, kept + tokens - 1)
        for name, made in (("sink_keys", new.key), ("sink_values", new.value)):
            there = made if kept == 0 else torch.cat([getattr(layer, name), made], dim=2)
            index = from_BN[:, None, :, None].expand(-1, made.shape[1], -1, made.shape[3])
            setattr(layer, name, there.gather(2, index))

    def _softmax(
        self, new: _New, layer: LinearLayer, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention over all there is: nothing has left the window."""
        keys, values = layer.with_kept(new.key, new.value)
        if mask is not None:
            mask = mask[..., : keys.shape[2]]  # of a static cache beside this one
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.architecture.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        found: tuple[Tensor, Tensor | None] = attend(
            self, new.query, keys, values, mask, dropout=dropout, scaling=self.scaling, sliding_window=None, **kwargs
        )
        self._find_sinks(layer, new)
        layer.keep(keys, values, 0, new.key.shape[2])
        return found

    def _linear(self, new: _New, layer: LinearLayer, keeps: bool) -> Tensor:
        """Window, sinks and sums, `o_BHTE`."""
        tokens, weights = new.query.shape[2], self._weights(new.query)
        keys, values = layer.with_kept(new.key if self.window else cast(Tensor, new.phi_k), new.value)
        self._find_sinks(layer, new)
        free_BS, sinks = self._free(layer, new, keys)
        left = max(0, keys.shape[2] - self.window)
        if tokens == 1 and keeps and not layer.record_past:
            self._absorb(layer, keys, values, free_BS, left)
            if sinks is not None:
                sinks = Sinks(sinks.k_BGNE, sinks.v_BGNE, sinks.at_BN - left)
            past = Past(layer.sums, sinks, None if free_BS is None else free_BS[:, left:])
            o_BHTE = decode(new.query, keys[:, :, left:], values[:, :, left:], new.phi_q, weights, past)
        else:
            far_BGCF = self._far(keys[:, :, :left])
            past = Past(layer.sums if keeps else None, sinks, free_BS)
            o_BHTE = linear_attention(new.query, keys, values, new.phi_q, far_BGCF, weights, past)
            if keeps and not layer.record_past:
                self._absorb(layer, keys, values, free_BS, left)
        if keeps:
            layer.keep(keys, values, 0 if layer.record_past else left, tokens)
        return o_BHTE if self.config.linear_attention["norm"] == "denominator" else normed(o_BHTE)


@dataclass(frozen=True)
class _New:
    """What the tokens of one forward bring: `query` (B, H, T, E), `key` and `value` (B, G, T, E), rotated."""

    query: Tensor
    key: Tensor
    value: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None  # without a window; else of kept keys, when they leave it
    seen: Tensor | None  # (B, S) over the whole text, False for padding


def hand_out(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward of a model without its head: tell its layers of padding.

    A model that looks masks up by the type of a layer is given those it knows, under our type too; and where layers
    that stay softmax have a static cache, transformers leaves out a mask that they need to see its empty tail by.
    Raises SettingError for a mask that is more than padding.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise SettingError("linear attention takes no mask but that of padding", got=f"{mask.dim()} dimensions")
        if not bool(mask.all()):
            kwargs = {**kwargs, SEEN: mask.bool()}
    past, by_type = kwargs.get("past_key_values"), hasattr(body, "has_sliding_layers")
    fixed = past is not None and any(isinstance(layer, StaticLayer) for layer in past.layers)
    if (by_type or fixed) and not isinstance(mask, dict):
        ids, like = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if like is None:
            assert ids is not None
            like = body.get_input_embeddings().weight.new_empty(*ids.shape, 0)
        made = create_causal_mask(
            config=body.config,
            inputs_embeds=like,
            attention_mask=mask,
            past_key_values=past,
            position_ids=kwargs.get("position_ids"),
            allow_is_causal_skip=not fixed,
        )
        made = {"full_attention": made, LINEAR_LAYER: made} if by_type else made
        args, kwargs = args[:1], {**kwargs, "attention_mask": made}
    return args, kwargs


class _Settings:
    """In front of a stock config class: our type of layer is one."""

    def validate(self: Any) -> None:
        """Run the stock class's checks with the one below in place of its own, which they hold by reference."""
        for check in self.__class_validators__:
            getattr(self, check.__name__)()

    def validate_layer_type(self: Any) -> None:
        """Raise ValueError for a list of layer types that is none of ours."""
        kinds = self.layer_types
        if kinds is not None and (
            set(kinds) - {"full_attention", LINEAR_LAYER} or len(kinds) != self.num_hidden_layers
        ):
            raise ValueError(f"layer_types must be full_attention or {LINEAR_LAYER} for each layer, not {kinds}")


class _Linear:
    """In front of a stock model class: the attention of layers that the config names becomes linear."""

    linear_attention: type[LinearAttention]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for (path, stock), kind in zip(attentions(model), config.layer_types, strict=True):
            if kind == LINEAR_LAYER and not isinstance(stock, LinearAttention):
                model.base_model.set_submodule(path, self.linear_attention(config, stock))
        model.base_model.register_forward_pre_hook(hand_out, with_kwargs=True)
        model.post_init()  # draws the weights of what is new


_ABOUT = "with linear attention behind a window"
_FIELDS = {
    "layer_types": None,
    "linear_attention": None,
    "__annotations__": {"layer_types": list[str] | None, "linear_attention": dict[str, Any] | None},
}


def _register(model_type: str, name: str) -> None:
    """Derive the classes of one stock architecture and tell transformers of them."""
    stock: Any = getattr(transformers, f"{name}Model")
    # a kind of the stock attention: by its class a model finds what it is asked to show
    attention = derive(
        __name__,
        _ABOUT,
        stock._can_record_outputs["attentions"],
        f"KvfoldLinear{name}Attention",
        LinearAttention,
        architecture=sys.modules[stock.__module__],
    )
    register_decoder(
        __name__,
        _ABOUT,
        LINEAR.model_type(model_type),
        (name, f"KvfoldLinear{name}"),
        _Linear,
        config=(_Settings,),
        fields=_FIELDS,
        linear_attention=attention,
    )


for _model_type in sorted(LINEAR.models):
    _register(_model_type, STEMS[_model_type])
