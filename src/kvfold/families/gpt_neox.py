"""gpt_neox: GPT-NeoX and Pythia: one map for q, k and v, head by head, LayerNorms, and an MLP without a gate.

Attention and MLP read a LayerNorm of their own each, side by side or one after the other (`use_parallel_residual`).
config.json has no field for key/value heads. Side by side, both norms see the same x, so their weights and biases go
into the maps behind them: the model is a Phi, whose config has that field, and its students are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from kvfold.contracts.config import EPSILON, SHARE, YES_NO, Fields, Rule, number
from kvfold.contracts.family import Body, Expressed, Json, Rehoused
from kvfold.contracts.packed import Packed
from kvfold.contracts.runtimes import STEMS
from kvfold.contracts.site import Attention
from kvfold.errors import UnsupportedModel
from kvfold.families._decoder import END, Layout, decoder

if TYPE_CHECKING:
    from torch import Tensor

PACKED = {"": Packed("query_key_value.weight", "groups"), "_bias": Packed("query_key_value.bias", "groups")}
ABSENT = Rule(None, "absent: transformers ignores it in this architecture")

MLP = {"up": "mlp.dense_h_to_4h", "act": "mlp.act", "down": "mlp.dense_4h_to_h"}

_KEPT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("attention_dropout", "max_position_embeddings", "initializer_range", "layer_norm_eps", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype"),
)
"""Fields that both architectures have."""


def _layout(config: Json) -> Layout:
    return Layout(
        biases="qkvo" if config.get("attention_bias", True) else "",
        rotated=config.get("rotary_pct", 0.25),
        theta=config.get("rotary_emb_base", 10000.0),
        gated=False,
        mlp_biases=True,
        vectors=4,
        last=2,
    )


def _check(fields: Fields) -> None:
    """Refuse other values under the names that transformers ignores here, and once saved beside its own."""
    layout = _layout(fields.config)
    for name, value in (("rope_theta", layout.theta), ("partial_rotary_factor", layout.rotated)):
        if fields.get(name, value) != value:
            raise fields.refusal(f"{name} is ignored in this architecture", got=fields.get(name), allowed=value)


def _as_phi(config: Json) -> Rehoused:
    """The same function as a Phi. Raises UnsupportedModel where attention and MLP follow one another."""
    if not config.get("use_parallel_residual", True):
        raise UnsupportedModel(
            "gpt_neox has no field for key/value heads, and no architecture with one has two LayerNorms in sequence",
            got="use_parallel_residual false",
            allowed="use_parallel_residual true, whose students are stock Phi",
        )
    return Rehoused(
        {
            "model_type": "phi",
            "architectures": [f"{STEMS['phi']}{END}"],
            **{name: config[name] for name in _KEPT if name in config},
            "hidden_act": config.get("hidden_act", "gelu"),
            "num_key_value_heads": config["num_attention_heads"],
            "rope_parameters": _rotation(config),
            **dict.fromkeys(("resid_pdrop", "embd_pdrop"), config.get("hidden_dropout", 0.0)),
        },
        _tensors(config),
    )


def _rotation(config: Json) -> dict[str, Any]:
    found, layout = dict(config.get("rope_scaling") or config.get("rope_parameters") or {}), _layout(config)
    kind = found.pop("type", "default")
    return {"rope_type": kind, "rope_theta": layout.theta, "partial_rotary_factor": layout.rotated, **found}


def _tensors(config: Json) -> dict[str, Expressed]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, biased = config["num_attention_heads"], config.get("attention_bias", True)
    attention = Attention(hidden, heads, heads, hidden // heads)
    found = {"model.embed_tokens.weight": Expressed(("gpt_neox.embed_in.weight",), (vocab, hidden))}
    for end in ("weight", "bias"):
        source = f"gpt_neox.final_layer_norm.{end}"
        found[f"model.final_layernorm.{end}"] = Expressed((source,), (hidden,))
    head = "gpt_neox.embed_in" if config.get("tie_word_embeddings", False) else "embed_out"
    found |= _linear("lm_head", head, (vocab, hidden), biased=False)
    for layer in range(config["num_hidden_layers"]):
        old, new = f"gpt_neox.layers.{layer}", f"model.layers.{layer}"
        first, second = f"{old}.input_layernorm", f"{old}.post_attention_layernorm"
        for end, plain in (("weight", _ones), ("bias", _zeros)):
            found[f"{new}.input_layernorm.{end}"] = Expressed((f"{first}.{end}",), (hidden,), plain)
        for role in "qkv":
            cut = partial(PACKED[""].part, role=role, attention=attention)
            name, source = f"{new}.self_attn.{role}_proj", f"{old}.attention.query_key_value"
            found |= _linear(name, source, (hidden, hidden), biased=biased, norm=first, cut=cut)
        found |= _linear(f"{new}.self_attn.dense", f"{old}.attention.dense", (hidden, hidden), biased=biased)
        found |= _linear(f"{new}.mlp.fc1", f"{old}.{MLP['up']}", (inner, hidden), norm=second)
        found |= _linear(f"{new}.mlp.fc2", f"{old}.{MLP['down']}", (hidden, inner))
    if config.get("tie_word_embeddings", False):
        del found["lm_head.weight"]
    return found


def _ones(norm_D: Tensor) -> Tensor:
    return norm_D.new_ones(norm_D.shape)


def _zeros(norm_D: Tensor) -> Tensor:
    return norm_D.new_zeros(norm_D.shape)


def _linear(
    new: str,
    old: str,
    shape: tuple[int, int],
    *,
    biased: bool = True,
    norm: str | None = None,
    cut: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, Expressed]:
    """Weight and bias of a map, or of its part: behind a LayerNorm `g * x + b` those are `W g` and `W b + c`."""
    sources = [f"{old}.weight", *([] if norm is None else [f"{norm}.bias"]), *([f"{old}.bias"] if biased else [])]

    def weight(rows: Tensor, norm_D: Tensor) -> Tensor:
        return cut(rows).double() * norm_D.double()

    def bias(rows: Tensor, *given: Tensor) -> Tensor:
        found = cut(given[-1]).double() if biased else rows.new_zeros(shape[0]).double()
        return found if norm is None else found + cut(rows).double() @ given[0].double()

    names = (f"{old}.weight",)
    return {
        f"{new}.weight": Expressed(names, shape)
        if norm is None
        else Expressed((*names, f"{norm}.weight"), shape, weight),
        f"{new}.bias": Expressed(tuple(sources), shape[:1], bias),
    }


FAMILY = decoder(
    "gpt_neox",
    "GPT-NeoX, Pythia (folded as stock Phi where the residual is parallel)",
    "gpt_neox",
    examples=("EleutherAI/pythia-1b", "EleutherAI/gpt-neox-20b"),
    rules={
        "layer_norm_eps": EPSILON,
        "rotary_pct": number(1e-3, 1),
        "rotary_emb_base": number(1, 1e15),
        **dict.fromkeys(("num_key_value_heads", "head_dim"), ABSENT),
        **dict.fromkeys(("use_parallel_residual", "attention_bias", "is_decoder"), YES_NO),
        **dict.fromkeys(("hidden_dropout", "classifier_dropout"), SHARE),
    },
    check=_check,
    layout=_layout,
    tiny={
        **dict.fromkeys(("num_key_value_heads", "head_dim")),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    attention={"self": "gpt_neox.layers.{layer}.attention"},
    tensors={
        **{f"{role}{end}": packed for role in "qkv" for end, packed in PACKED.items()},
        **{"o": "dense.weight", "o_bias": "dense.bias"},
    },
    body=Body("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", MLP),
    renamed={"lm_head.": "embed_out."},
    fields=lambda shape: {"model_type": "gpt_neox", "architectures": [f"{STEMS['gpt_neox']}{END}"]},
    rehouse=_as_phi,
)
