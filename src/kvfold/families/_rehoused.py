"""Decoders written as another stock architecture, whose config.json has a field for key/value heads.

Linear maps are re-expressed without loss: a LayerNorm `g * x + b` in front of a map W with bias c goes into it as `W g`
and `W b + c`, and the rows of heads that rotate neighbouring coordinates are reordered for heads that rotate halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfold.contracts.family import Expressed, Json, Rehoused
from kvfold.contracts.packed import Packed
from kvfold.contracts.stock import stock_class
from kvfold.families._decoder import END

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, Expressed]

_KEPT = (
    *("vocab_size", "initializer_range", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields that every architecture has."""


@dataclass(frozen=True)
class Map:
    """Where a linear map comes from: modules of the source, with their biases or without, and a LayerNorm before it.

    `make` makes the map of the weights, or biases, of these modules.
    """

    sources: Sequence[str]
    biased: bool = True
    norm: str | None = None
    make: Callable[..., Tensor] = field(default=lambda rows: rows)

    def tensors(self, name: str, shape: tuple[int, int]) -> Tensors:
        """Weight and bias of the map under its new name, of this shape (out, in)."""
        many, normed = len(self.sources), self.norm is not None
        weights, biases = ([f"{each}.{end}" for each in self.sources] for end in ("weight", "bias"))
        scale, shift = ([f"{self.norm}.{end}"] if normed else [] for end in ("weight", "bias"))

        def weight(*given: Tensor) -> Tensor:
            rows = self.make(*given[:many])
            return rows.double() * given[many].double() if normed else rows

        def constant(*given: Tensor) -> Tensor:
            rows = self.make(*given[:many]).double()
            found = rows @ given[many].double() if normed else rows.new_zeros(shape[0])
            return found + self.make(*given[-many:]).double() if self.biased else found

        sources = (*weights, *shift, *(biases if self.biased else ()))
        return {
            f"{name}.weight": Expressed((*weights, *scale), shape, weight),
            f"{name}.bias": Expressed(sources, shape[:1], constant),
        }


def norm(name: str, source: str, width: int, *, plain: bool = False) -> Tensors:
    """A LayerNorm, or a plain one where its weight and bias went into the maps behind it."""
    ends = (("weight", _ones), ("bias", _zeros)) if plain else (("weight", None), ("bias", None))
    return {f"{name}.{end}": Expressed((f"{source}.{end}",), (width,), make) for end, make in ends}


def _ones(norm_D: Tensor) -> Tensor:
    return norm_D.new_ones(norm_D.shape)


def _zeros(norm_D: Tensor) -> Tensor:
    return norm_D.new_zeros(norm_D.shape)


def halves(rows: Tensor, heads: int, rotated: int) -> Tensor:
    """Rows of heads that rotate neighbours, `0 1 2 3 ...`, as of heads that rotate halves: `0 2 ... 1 3 ...`."""
    import torch  # plans read families without it

    blocks = rows.reshape(heads, -1, *rows.shape[1:]).clone()
    blocks[:, :rotated] = torch.cat([blocks[:, 0:rotated:2], blocks[:, 1:rotated:2]], dim=1)
    return blocks.flatten(0, 1)


@dataclass(frozen=True)
class Block:
    """The maps and norms of one layer."""

    maps: Mapping[str, Map]  # q, k, v, or qkv; o, up, down
    norm: str
    plain: bool = False  # the maps have taken over the norm's weight and bias
    second: str = ""  # the norm before the MLP, where that reads what attention added


def phi(
    config: Json,
    *,
    heads: int | None = None,
    fields: Json,
    ends: Mapping[str, str],
    block: Callable[[int], Block],
    head_bias: bool = False,
) -> Rehoused:
    """The same function as a Phi.

    `config` has the fields of a decoder under their usual names, and `fields` are the student's beside those. `ends`
    names the modules of the `embedding`, the `head` and the last `norm`, and `block` those of each layer.
    """
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    groups = heads or config["num_attention_heads"]
    narrow, tied = groups * (hidden // config["num_attention_heads"]), bool(config["tie_word_embeddings"])
    shapes = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    shapes |= {"up": (inner, hidden), "down": (hidden, inner)}
    names = {**{role: f"self_attn.{role}_proj" for role in "qkv"}, "o": "self_attn.dense", "up": "mlp.fc1"}
    names["down"] = "mlp.fc2"
    made = {"model.embed_tokens.weight": Expressed((f"{ends['embedding']}.weight",), (vocab, hidden))}
    made |= norm("model.final_layernorm", ends["norm"], hidden)
    made |= Map([ends["embedding" if tied else "head"]], biased=head_bias).tensors("lm_head", (vocab, hidden))
    if head_bias and tied:
        made["lm_head.bias"] = Expressed((f"{ends['head']}.bias",), (vocab,))
    if tied:
        del made["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        found, path = block(layer), f"model.layers.{layer}"
        made |= norm(f"{path}.input_layernorm", found.norm, hidden, plain=found.plain)
        for role, shape in shapes.items():
            made |= found.maps[role].tensors(f"{path}.{names[role]}", shape)
    return Rehoused({**_config("phi", config), "num_key_value_heads": groups, **fields}, made)


GROUPS = Packed("", blocks=None)
"""How a GPT-BigCode packs the rows of q, k and v."""


def bigcode(
    config: Json, *, fields: Json, ends: Mapping[str, str], positions: Expressed, block: Callable[[int], Block]
) -> Rehoused:
    """The same function as a GPT-BigCode with all key/value heads; arguments are as in `phi`."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    names = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    rows = {"qkv": 3 * hidden, "o": hidden, "up": inner, "down": hidden}
    made = {"transformer.wte.weight": Expressed((f"{ends['embedding']}.weight",), (vocab, hidden))}
    made["transformer.wpe.weight"] = positions
    made |= norm("transformer.ln_f", ends["norm"], hidden)
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = Expressed((f"{ends['head']}.weight",), (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        found, path = block(layer), f"transformer.h.{layer}"
        made |= norm(f"{path}.ln_1", found.norm, hidden) | norm(f"{path}.ln_2", found.second, hidden)
        for role, name in names.items():
            made |= found.maps[role].tensors(f"{path}.{name}", (rows[role], inner if role == "down" else hidden))
    usual = _config("gpt_bigcode", config)
    theirs = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
    theirs |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
    named = {theirs.get(name, name): value for name, value in usual.items()}
    return Rehoused({**named, "multi_query": False, **fields}, made)


def _config(stock: str, config: Json) -> dict[str, Any]:
    """Fields of a decoder under their usual names."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {
        "model_type": stock,
        "architectures": [stock_class(stock, END)],
        **{name: config[name] for name in (*_KEPT, *names, "tie_word_embeddings") if name in config},
    }
