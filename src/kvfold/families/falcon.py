"""falcon: Falcon 40B, 180B and 11B: one tensor for q, k and v, group by group, beside an MLP without a gate.

Attention and MLP read a LayerNorm each, or the same one. transformers repeats keys and values for every head before it
caches them, so fewer heads save nothing there: students are stock Phi, which caches what it has. Falcon 7B has one
key/value head already, and Falcon RW alibi.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from kvfold.contracts.config import ACTIVATION, EPSILON, HEADS, SHARE, WIDTH, YES_NO, Fields, only, whole
from kvfold.contracts.family import Body, Json, Rehoused
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention
from kvfold.contracts.stock import stock_class
from kvfold.families._decoder import END, Layout, decoder
from kvfold.families._gpt import IGNORED
from kvfold.families._rehoused import Block, Map, phi

_PACKED = {end: Packed(f"query_key_value.{name}", blocks=None) for end, name in (("", "weight"), ("_bias", "bias"))}
_MLP = {"up": "mlp.dense_h_to_4h", "act": "mlp.act", "down": "mlp.dense_4h_to_h"}


def _usual(config: Json) -> dict[str, Any]:
    """The fields of every decoder under their usual names."""
    inner = config.get("ffn_hidden_size") or 4 * config["hidden_size"]
    groups = config.get("num_kv_heads") or config["num_attention_heads"]
    return {**config, "intermediate_size": inner, "num_key_value_heads": groups}


def _two(config: Json) -> bool:
    """Whether attention and MLP read a LayerNorm each."""
    return config.get("num_ln_in_parallel_attn") != 1


def _layout(config: Json) -> Layout:
    biased = bool(config.get("bias"))
    vectors = 4 if _two(config) else 2
    return Layout("qkvo" if biased else "", gated=False, mlp_biases=biased, vectors=vectors, last=2)


def _check(fields: Fields) -> None:
    fields.check_divides("num_attention_heads", "hidden_size")
    if fields.get("num_kv_heads") is not None:
        fields.check_divides("num_kv_heads", "num_attention_heads")


def _as_phi(config: Json) -> Rehoused:
    """The same function as a Phi."""
    known = {"max_position_embeddings": 2048, "tie_word_embeddings": True, **_usual(config)}
    hidden, heads, groups = (known[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    attention, biased, two = Attention(hidden, heads, groups, hidden // heads), bool(config.get("bias")), _two(config)

    def block(layer: int) -> Block:
        path = f"transformer.h.{layer}"
        first, second = (f"{path}.{name}" for name in (("ln_attn", "ln_mlp") if two else ("input_layernorm",) * 2))
        packed = [f"{path}.self_attention.query_key_value"]
        cuts = {role: partial(_PACKED[""].part, role=role, attention=attention) for role in "qkv"}
        maps = {role: Map(packed, biased, first if two else None, cut) for role, cut in cuts.items()}
        maps["o"] = Map([f"{path}.self_attention.dense"], biased)
        maps["up"] = Map([f"{path}.{_MLP['up']}"], biased, second if two else None)
        return Block(maps | {"down": Map([f"{path}.{_MLP['down']}"], biased)}, first, plain=two)

    rotation = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rotation.pop("rope_type", rotation.pop("type", "default"))
    theta = rotation.pop("rope_theta", config.get("rope_theta", 10000.0))
    return phi(
        known,
        heads=groups,
        fields={
            "hidden_act": config.get("activation", "gelu"),
            "rope_parameters": {"rope_type": kind, "rope_theta": theta, **rotation, "partial_rotary_factor": 1.0},
            "layer_norm_eps": config.get("layer_norm_epsilon", 1e-5),
            **{name: config.get("hidden_dropout") or 0.0 for name in ("resid_pdrop", "embd_pdrop")},
        },
        ends={"embedding": "transformer.word_embeddings", "head": "lm_head", "norm": "transformer.ln_f"},
        block=block,
    )


FAMILY = decoder(
    "falcon",
    "Falcon 40B, 180B, 11B (folded as stock Phi, which caches only the heads that there are)",
    "falcon",
    examples=("tiiuae/falcon-40b", "tiiuae/falcon-11B"),
    rules={
        "hidden_size": WIDTH.needed,
        "num_attention_heads": HEADS.needed,
        "num_kv_heads": HEADS.or_null,
        "ffn_hidden_size": WIDTH.or_null,
        "layer_norm_epsilon": EPSILON,
        "activation": ACTIVATION,
        "num_ln_in_parallel_attn": whole(1, 2).or_null,
        "new_decoder_architecture": only(True, "true: the older layouts have one key/value head, or alibi").needed,
        "alibi": only(False, "false: heads that alibi tells apart cannot be merged freely").or_null,
        "bias": YES_NO.or_null,
        **dict.fromkeys(("multi_query", "parallel_attn"), YES_NO.or_null),  # without effect in this layout
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), SHARE.or_null),
        **dict.fromkeys(("n_embed", "head_dim"), IGNORED),
    },
    ties=True,
    usual=_usual,
    check=_check,
    layout=_layout,
    tiny={
        "vocab_size": 96,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_kv_heads": 4,
        "new_decoder_architecture": True,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    },
    attention={"self": "transformer.h.{layer}.self_attention"},
    tensors={
        **{f"{role}{end}": packed for role in "qkv" for end, packed in _PACKED.items()},
        **{"o": "dense.weight", "o_bias": "dense.bias"},
    },
    body=Body("transformer.word_embeddings", "transformer.h", "transformer.ln_f", _MLP),
    fields=lambda shape: {"model_type": "falcon", "architectures": [stock_class("falcon", END)]},
    rehouse=_as_phi,
    interface=False,
)
