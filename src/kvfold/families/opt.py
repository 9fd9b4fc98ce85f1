"""opt: OPT: learned positions behind two unused rows, LayerNorms before attention and MLP, and biases everywhere.

config.json has no field for key/value heads: students are GPT-BigCode, whose table of positions has no unused rows.
OPT-350m norms behind attention and MLP, and its embeddings are narrower than the model: it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfold.contracts.config import ACTIVATION, SHARE, WIDTH, YES_NO, Fields, decimal, only
from kvfold.contracts.family import Body, Expressed, Json, Rehoused
from kvfold.contracts.site import Attention
from kvfold.contracts.stock import stock_class
from kvfold.families._decoder import END, TENSORS, Layout, decoder
from kvfold.families._gpt import IGNORED
from kvfold.families._rehoused import GROUPS, Block, Map, bigcode

if TYPE_CHECKING:
    from torch import Tensor

OFFSET = 2  # of the first position in the table
EPS = 1e-5  # of every norm
_MLP = {"up": "fc1", "act": "activation_fn", "down": "fc2"}


def _usual(config: Json) -> dict[str, Any]:
    return {"max_position_embeddings": 2048, **config, "intermediate_size": config["ffn_dim"]}


def _layout(config: Json) -> Layout:
    biased = bool(config.get("enable_bias", True))
    return Layout(
        biases="qkvo" if biased else "",
        rotations=[None] * config["num_hidden_layers"],
        gated=False,
        mlp_biases=biased,
        vectors=4,
        last=2,
        positions=config["max_position_embeddings"] + OFFSET,
    )


def _check(fields: Fields) -> None:
    hidden = fields.config["hidden_size"]
    if fields.get("word_embed_proj_dim", hidden) != hidden:
        raise fields.refusal(
            "word_embed_proj_dim is not hidden_size", got=fields.get("word_embed_proj_dim"), allowed=hidden
        )


def _as_bigcode(config: Json) -> Rehoused:
    """The same function as a GPT-BigCode."""
    known = {"tie_word_embeddings": True, **_usual(config)}
    hidden, heads, positions = (
        known[name] for name in ("hidden_size", "num_attention_heads", "max_position_embeddings")
    )
    attention, biased = Attention(hidden, heads, heads, hidden // heads), bool(config.get("enable_bias", True))

    def grouped(*rows: Tensor) -> Tensor:
        return GROUPS.joined(dict(zip("qkv", rows, strict=True)), attention)

    def block(layer: int) -> Block:
        path = f"model.decoder.layers.{layer}"
        maps = {"qkv": Map([f"{path}.self_attn.{role}_proj" for role in "qkv"], biased, make=grouped)}
        names = {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}
        maps |= {role: Map([f"{path}.{name}"], biased) for role, name in names.items()}
        return Block(maps, f"{path}.self_attn_layer_norm", second=f"{path}.final_layer_norm")

    def used(table: Tensor) -> Tensor:
        return table[OFFSET:]

    return bigcode(
        known,
        fields={
            "activation_function": config.get("activation_function", "relu"),
            "layer_norm_epsilon": EPS,
            "embd_pdrop": 0.0,
            "resid_pdrop": config.get("dropout", 0.1),
            "attn_pdrop": config.get("attention_dropout", 0.0),
        },
        ends={
            "embedding": "model.decoder.embed_tokens",
            "head": "lm_head",
            "norm": "model.decoder.final_layer_norm",
        },
        positions=Expressed(("model.decoder.embed_positions.weight",), (positions, hidden), used),
        block=block,
    )


FAMILY = decoder(
    "opt",
    "OPT, but for OPT-350m (folded as GPT-BigCode: stock with one key/value head)",
    "opt",
    examples=("facebook/opt-125m", "facebook/opt-6.7b"),
    rules={
        "ffn_dim": WIDTH.needed,
        "word_embed_proj_dim": WIDTH.or_null,
        "activation_function": ACTIVATION,
        "do_layer_norm_before": only(True, "true: norms behind attention and MLP are not known here (OPT-350m)"),
        "_remove_final_layer_norm": only(False, "false: a model without a last norm is not known here"),
        "layer_norm_elementwise_affine": only(True, "true: norms without weights are not known here"),
        "enable_bias": YES_NO,
        "init_std": decimal(0, 1),
        **dict.fromkeys(("dropout", "layerdrop"), SHARE),
        **dict.fromkeys(("num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "rope_theta"), IGNORED),
    },
    ties=True,
    usual=_usual,
    check=_check,
    layout=_layout,
    tiny={
        "vocab_size": 96,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    },
    attention={"self": "model.decoder.layers.{layer}.self_attn"},
    tensors={**TENSORS, "o": "out_proj.weight", "o_bias": "out_proj.bias"},
    body=Body("model.decoder.embed_tokens", "model.decoder.layers", "model.decoder.final_layer_norm", _MLP),
    fields=lambda shape: {"model_type": "opt", "architectures": [stock_class("opt", END)]},
    prefix="model.",
    rehouse=_as_bigcode,
)
