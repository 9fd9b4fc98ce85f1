"""Decoders with linear attention behind a softmax window: `kvfold_linear_llama`, `kvfold_linear_qwen2` and others.

A stock model in which the attention of some layers is `LinearAttention`; everything else, forwards and tensor names
included, is the stock class's own. `config.json` names the layers (`layer_types`) and their settings
(`linear_attention`). While the whole text fits the window, such a layer computes the softmax attention of the model's
own implementation, bit for bit. `kvfold.attention.linear` has the formula and the papers.
Importing this module registers the classes with transformers' Auto classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask

from kvfold.attention.linear import Past, Sinks, Sums, Weights, absorbed, decode, linear_attention, normed, slopes
from kvfold.contracts.runtimes import LINEAR, LINEAR_LAYER
from kvfold.errors import SettingError
from kvfold.hf.attention import ROUNDINGS, implementation
from kvfold.hf.linear_cache import LinearLayer
from kvfold.hf.subclass import Replacement, attentions, awaited, register_decoders

SEEN = "kvfold_seen"
"""The keyword that passes the padding mask of a batch through a forward: `(B, S)`, False for padding."""


class Maps(nn.Module):
    """One linear map per head, `(B, H, T, E) -> (B, H, T, F)`, with the weights (H F, E) of a single Linear."""

    def __init__(self, heads: int, width: int, made: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.eye(made, width).repeat(heads, 1))
        self.bias = nn.Parameter(torch.zeros(heads * made)) if bias else None

    def forward(self, rows_BHTE: Tensor) -> Tensor:
        """Apply each head's map. With a multiple of the heads, each group of heads shares a map."""
        batch, heads, tokens, width = rows_BHTE.shape
        weight_HFE = self.weight.view(self.heads, -1, width)
        made_BHXF = rows_BHTE.reshape(batch, self.heads, -1, width) @ weight_HFE.mT
        if self.bias is not None:
            made_BHXF = made_BHXF + self.bias.view(self.heads, 1, -1)
        return made_BHXF.view(batch, heads, tokens, -1)


@dataclass(frozen=True)
class _New:
    """The tokens of one forward: `query` (B, H, T, E), `key` and `value` (B, G, T, E), rotated."""

    query: Tensor
    key: Tensor
    value: Tensor
    phi_q: Tensor | None  # features of the queries (B, H, T, F)
    kept: Tensor  # the keys that the cache keeps: without a window, their features
    seen: Tensor | None  # (B, S) over the whole text, False for padding

    @property
    def first(self) -> Tensor:
        """The first token of each row that is not padding, `(B, 1)`, or `(1, 1)` without padding."""
        if self.seen is None:
            return torch.zeros(1, 1, dtype=torch.long, device=self.key.device)
        return self.seen.long().argmax(1, keepdim=True)


class LinearAttention(Replacement):
    """Linear attention with a softmax window and sinks, in place of a stock attention whose projections it takes over.

    One forward trains, prefills and decodes. The formula is that of `kvfold.attention.linear` (SUPRA, arXiv 2405.06640;
    with a window, LoLCATs, arXiv 2410.10254).
    """

    architecture: ModuleType
    q_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, config: Any, stock: Any) -> None:
        super().__init__(config, stock, "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        settings = config.linear_attention
        self.window, self.sinks = settings["window"], settings["sinks"]
        self.kind, self.rotates_features = settings["features"], settings["rope"] == "after"
        self.normalised, self.features = settings["norm"] == "denominator", settings["feature_dim"]
        if self.kind == "relu":
            self.phi = Maps(self.groups, self.head_dim, self.features, bias=True)
        elif self.kind == "hedgehog":
            self.phi_q = Maps(self.heads, self.head_dim, self.features // 2, bias=False)
            self.phi_k = Maps(self.groups, self.head_dim, self.features // 2, bias=False)
        self.window_gate = None
        if self.kind != "none" and self.window:
            self.window_gate = nn.Parameter(torch.zeros(self.heads))  # the logarithm
        decay = settings["decay"]
        self.log_decay = None if decay == "none" else slopes(decay, self.groups)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention's signature: `hidden_states` (B, T, D) -> `(o_BTD, weights or None)`."""
        new = self._project(hidden_states, position_embeddings, kwargs.pop(SEEN, None))
        cached, tokens = past_key_values is not None, hidden_states.shape[1]
        layer = past_key_values.layers[self.layer_idx] if cached else LinearLayer()
        self._begin(layer, new, cached)
        keys, values = layer.with_kept(new.kept, new.value)
        self._find_sinks(layer, new)
        weights, left = None, 0
        if layer.length + tokens <= self.window:  # nothing is behind the window: the model's own softmax attention
            # the mask of a static cache is longer than the keys
            mask = None if attention_mask is None else attention_mask[..., : keys.shape[2]]
            attend = implementation(self, self.config._attn_implementation)
            heads_BTHE, weights = attend(new.query, keys, values, mask, sliding_window=None, **kwargs)
        else:
            enters = cached and not layer.record_past
            left = max(0, keys.shape[2] - self.window) if enters else 0
            heads_BTHE = self._linear(new, layer, keys, values, enters).transpose(1, 2)
        if cached:
            layer.keep(keys, values, left, tokens)
        return self.o_proj(heads_BTHE.flatten(2).contiguous()), weights

    def removable(self) -> Sequence[str]:
        """The sums, if there is a window besides."""
        return ("sums",) if self.window and self.kind != "none" else ()

    @contextmanager
    def without(self, part: str) -> Iterator[None]:
        """Attend to the window and the sinks alone, for texts that begin and end inside the `with` block."""
        kind, self.kind = self.kind, "none"
        try:
            yield
        finally:
            self.kind = kind

    def _project(self, hidden_BTD: Tensor, rotation: tuple[Tensor, Tensor], seen: Tensor | None) -> _New:
        query, key, value = (projected(self, hidden_BTD, role) for role in "qkv")
        turn = self.architecture.apply_rotary_pos_emb
        phi_q = phi_k = None
        if self.rotates_features:
            phi_q, phi_k = turn(self._features(query, "q"), self._features(key, "k"), *rotation)
        query, key = turn(query, key, *rotation)
        if self.kind != "none" and not self.rotates_features:
            phi_q = self._features(query, "q")
            phi_k = None if self.window else self._features(key, "k")
        if rounded := ROUNDINGS.get(self.config._attn_implementation):
            key, value = rounded(key), rounded(value)
        return _New(query, key, value, phi_q, key if self.window else cast(Tensor, phi_k), seen)

    def _features(self, rows_BHTE: Tensor, role: str) -> Tensor:
        """Features (B, H, T, F) of queries or keys."""
        if self.kind == "relu":
            return cast(Tensor, self.phi(rows_BHTE).relu())
        rows_BHTF = self.phi_q(rows_BHTE) if role == "q" else self.phi_k(rows_BHTE)
        return torch.cat([rows_BHTF.softmax(-1), (-rows_BHTF).softmax(-1)], dim=-1)

    def _far(self, keys_BGSE: Tensor) -> Tensor | None:
        """Features of kept keys; without a window, the kept keys are features."""
        if self.kind == "none":
            return None
        return self._features(keys_BGSE, "k") if self.window else keys_BGSE

    def _weights(self, like: Tensor) -> Weights:
        wide = torch.promote_types(like.dtype, torch.float32)
        decay_G = None
        if self.log_decay is not None:
            decay_G = torch.tensor(self.log_decay, dtype=wide, device=like.device)
        gate_H = None if self.window_gate is None else self.window_gate.exp()
        return Weights(self.window, self.normalised, self.scaling, decay_G, gate_H)

    def _begin(self, layer: LinearLayer, new: _New, cached: bool) -> None:
        """Start a text in its cache layer, or move accepted tokens into the sums."""
        sums = None
        if cached and self.kind != "none" and not layer.is_initialized:
            batch, groups, _, width = new.value.shape
            wide = torch.promote_types(new.value.dtype, torch.float32)
            state_BGFE = new.value.new_zeros(batch, groups, self.features, width, dtype=wide)
            sums = Sums(state_BGFE, torch.zeros_like(state_BGFE[..., 0]) if self.normalised else None)
        layer.begin(new.kept, new.key, new.value, self.window, sums)
        left, layer.settled = layer.settled, 0
        if left:
            free_BS, _ = self._free(layer, new, layer.keys)
            self._absorb(layer, layer.keys, layer.values, free_BS, left)
            layer.drop(left)

    def _absorb(
        self, layer: LinearLayer, keys_BGSE: Tensor, values_BGSE: Tensor, free_BS: Tensor | None, left: int
    ) -> None:
        """Add the first `left` tokens to the sums."""
        phi_BGCF = self._far(keys_BGSE[:, :, :left])
        if phi_BGCF is None:
            return
        if free_BS is not None:
            phi_BGCF = phi_BGCF * free_BS[:, None, :left, None]
        layer.sums = absorbed(layer.sums, phi_BGCF, values_BGSE[:, :, :left], self._weights(keys_BGSE))

    def _free(self, layer: LinearLayer, new: _New, keys: Tensor) -> tuple[Tensor | None, Sinks | None]:
        """The mask `(B, S)` of kept and new tokens that are neither padding nor sinks (None: all), and the sinks, with
        positions relative to the first of these tokens.
        """
        base = layer.length - layer.keys.shape[2]
        at_S = torch.arange(base, base + keys.shape[2], device=keys.device)
        first_B1, sinks = new.first, None
        if self.sinks:
            count_N = torch.arange(layer.sink_keys.shape[2], device=keys.device)
            sinks = Sinks(layer.sink_keys, layer.sink_values, (first_B1 + count_N - base).expand(len(keys), -1))
        if new.seen is None and base >= self.sinks:
            return None, sinks
        free_BS = at_S >= first_B1 + self.sinks
        if new.seen is not None:
            free_BS = free_BS & new.seen[:, base : base + keys.shape[2]].to(keys.device)
        return free_BS.expand(len(keys), -1), sinks

    def _find_sinks(self, layer: LinearLayer, new: _New) -> None:
        """Keep the first tokens of each row that are not padding."""
        tokens, kept = new.key.shape[2], layer.sink_keys.shape[2]
        count = min(layer.length + tokens, self.sinks)
        last = 0 if new.seen is None else int(new.first.max())
        if not count or layer.length >= last + self.sinks:
            return
        place_N = torch.arange(count, device=new.key.device)
        at_BN = (new.first + place_N).expand(len(new.key), -1)
        from_BN = torch.where(at_BN < layer.length, place_N, kept + at_BN - layer.length).clamp(0, kept + tokens - 1)
        for name, made in (("sink_keys", new.key), ("sink_values", new.value)):
            there = torch.cat([getattr(layer, name), made], dim=2) if kept else made
            index = from_BN[:, None, :, None].expand(-1, made.shape[1], -1, made.shape[3])
            setattr(layer, name, there.gather(2, index))

    def _linear(self, new: _New, layer: LinearLayer, keys: Tensor, values: Tensor, enters: bool) -> Tensor:
        """Window, sinks and sums, `o_BHTE`. If `enters`, tokens behind the window move into the layer's sums."""
        weights, left = self._weights(new.query), max(0, keys.shape[2] - self.window)
        free_BS, sinks = self._free(layer, new, keys)
        if enters and new.query.shape[2] == 1:
            self._absorb(layer, keys, values, free_BS, left)
            if sinks is not None:
                sinks = Sinks(sinks.k_BGNE, sinks.v_BGNE, sinks.at_BN - left)
            past = Past(layer.sums, sinks, None if free_BS is None else free_BS[:, left:])
            o_BHTE = decode(new.query, keys[:, :, left:], values[:, :, left:], new.phi_q, weights, past)
        else:
            past, far_BGCF = Past(layer.sums, sinks, free_BS), self._far(keys[:, :, :left])
            o_BHTE = linear_attention(new.query, keys, values, new.phi_q, far_BGCF, weights, past)
            if enters:
                self._absorb(layer, keys, values, free_BS, left)
        return o_BHTE if self.normalised else normed(o_BHTE)


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
    """Forward pre-hook of a model without its head: passes the padding mask to the layers.

    A model that looks masks up by layer type also gets its own under kvfold's type. If softmax layers have a static
    cache, transformers leaves out a mask that they need for its unused end. Raises SettingError for a mask that is more
    than padding.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise SettingError("linear attention supports only padding masks", got=f"{mask.dim()} dimensions")
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
    """In front of a stock config class: allows kvfold's layer type."""

    def validate(self: Any) -> None:
        """Run the stock class's checks, which it holds by reference, with the one below in place of its own."""
        for check in self.__class_validators__:
            getattr(self, check.__name__)()

    def validate_layer_type(self: Any) -> None:
        """Raise ValueError for a list of layer types other than kvfold's."""
        kinds = self.layer_types
        if kinds is not None and (
            set(kinds) - {"full_attention", LINEAR_LAYER} or len(kinds) != self.num_hidden_layers
        ):
            raise ValueError(f"layer_types must be full_attention or {LINEAR_LAYER} for each layer, not {kinds}")


class _Linear:
    """In front of a stock model class: the attention of the layers that the config names becomes linear."""

    own_attention: type[LinearAttention]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        for (path, stock), kind in zip(attentions(model), config.layer_types, strict=True):
            if kind == LINEAR_LAYER and not isinstance(stock, LinearAttention):
                model.base_model.set_submodule(path, self.own_attention(config, stock))
        model.base_model.register_forward_pre_hook(hand_out, with_kwargs=True)
        model.post_init()  # initialises the new weights


_FIELDS = {
    "layer_types": None,
    "linear_attention": None,
    "__annotations__": {"layer_types": list[str] | None, "linear_attention": dict[str, Any] | None},
}

register_decoders(
    __name__,
    "with linear attention behind a window",
    LINEAR,
    _Linear,
    lambda stock: LinearAttention,
    config=(_Settings,),
    fields=_FIELDS,
)

__getattr__ = partial(awaited, __name__)
