"""gpt_neox: GPT-NeoX and Pythia: one map for q, k and v, head by head, LayerNorms, and an MLP without a gate.

Attention and MLP read a LayerNorm of their own each, side by side or one after the other (`use_parallel_residual`).
config.json has no field for key/value heads. Side by side, both norms see the same x, so their weights and biases go
into the maps behind them: the model is a Phi, whose config has that field, and its students are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from kvfold.contracts.config import EPSILON, SHARE, YES_NO, Fields, Rule, number
from kvfold.contracts.family import Body, Json, Rehoused
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention
from kvfold.contracts.stock import stock_class
from kvfold.errors import UnsupportedModel
from kvfold.families._decoder import END, Layout, decoder
from kvfold.families._rehoused import Block, Map, phi

PACKED = {end: Packed(f"query_key_value.{name}", blocks=None) for end, name in (("", "weight"), ("_bias", "bias"))}
ABSENT = Rule(None, "absent: transformers ignores it in this architecture")

MLP = {"up": "mlp.dense_h_to_4h", "act": "mlp.act", "down": "mlp.dense_4h_to_h"}


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
    hidden, heads, biased = config["hidden_size"], config["num_attention_heads"], config.get("attention_bias", True)
    attention = Attention(hidden, heads, heads, hidden // heads)

    def block(layer: int) -> Block:
        path = f"gpt_neox.layers.{layer}"
        first, second = f"{path}.input_layernorm", f"{path}.post_attention_layernorm"
        maps = {
            role: Map(
                [f"{path}.attention.query_key_value"],
                biased,
                first,
                partial(PACKED[""].part, role=role, attention=attention),
            )
            for role in "qkv"
        }
        maps["o"] = Map([f"{path}.attention.dense"], biased)
        maps["up"], maps["down"] = Map([f"{path}.{MLP['up']}"], norm=second), Map([f"{path}.{MLP['down']}"])
        return Block(maps, first, plain=True)

    return phi(
        {"max_position_embeddings": 2048, "tie_word_embeddings": False, **config},
        fields={
            "hidden_act": config.get("hidden_act", "gelu"),
            "rope_parameters": _rotation(config),
            **{name: config[name] for name in ("attention_dropout", "layer_norm_eps") if name in config},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop"), config.get("hidden_dropout", 0.0)),
        },
        ends={"embedding": "gpt_neox.embed_in", "head": "embed_out", "norm": "gpt_neox.final_layer_norm"},
        block=block,
    )


def _rotation(config: Json) -> dict[str, Any]:
    found, layout = dict(config.get("rope_scaling") or config.get("rope_parameters") or {}), _layout(config)
    kind = found.pop("type", "default")
    return {"rope_type": kind, "rope_theta": layout.theta, "partial_rotary_factor": layout.rotated, **found}


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
    fields=lambda shape: {"model_type": "gpt_neox", "architectures": [stock_class("gpt_neox", END)]},
    rehouse=_as_phi,
    buffers=r"\.attention\.(bias|masked_bias)$",
)
