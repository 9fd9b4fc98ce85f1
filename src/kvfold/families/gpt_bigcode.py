"""gpt_bigcode: the layout of GPT-2 with one or all key/value heads (`multi_query`): SantaCoder, StarCoder.

One tensor holds q, k and v, group by group. GPT-2 and OPT are written so; students with another number of heads, or
with layers that differ, are `kvfold_gpt_bigcode`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvfold.contracts.config import HEADS, YES_NO, Fields, only
from kvfold.contracts.family import Json
from kvfold.contracts.packed import Packed
from kvfold.contracts.runtimes import DECODERS, fields
from kvfold.contracts.site import Shape
from kvfold.families._decoder import END, TENSORS, decoder
from kvfold.families._gpt import BODY, RULES, TINY, check_gpt, gpt_layout, gpt_usual

_GROUPS = {end: Packed(f"c_attn.{name}", blocks=None) for end, name in (("", "weight"), ("_bias", "bias"))}
STOCK = "gpt_bigcode"


def _heads(config: Json) -> int:
    """The key/value heads of the stock class."""
    return 1 if config.get("multi_query", True) else int(config["n_head"])


def _usual(config: Json) -> dict[str, Any]:
    return {"num_key_value_heads": _heads(config), **gpt_usual(config)}


def _check(given: Fields) -> None:
    check_gpt(given)
    groups = given.get("num_key_value_heads")
    if given.config["model_type"] == STOCK and groups != _heads(given.config):
        raise given.refusal(
            "num_key_value_heads is not what multi_query says", got=groups, allowed=_heads(given.config)
        )


def _fields(shape: Shape) -> dict[str, Any]:
    """The fields of a student; `multi_query` alone counts in the stock class."""
    one = all(attention.num_key_value_heads == 1 for attention in shape.sites.values())
    return {**fields(shape, DECODERS, END), "multi_query": one}


FAMILY = decoder(
    STOCK,
    "GPT-BigCode: SantaCoder, StarCoder; GPT-2 and OPT are folded as such",
    STOCK,
    examples=("bigcode/gpt_bigcode-santacoder", "bigcode/starcoder"),
    rules={
        **RULES,
        "num_key_value_heads": HEADS,
        "scale_attn_weights": only(True, "true: logits without a scale are not known here"),
        **dict.fromkeys(("multi_query", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"), YES_NO),
    },
    ties=True,
    usual=_usual,
    check=_check,
    layout=gpt_layout,
    tiny={**TINY, "multi_query": False},
    attention={"self": "transformer.h.{layer}.attn"},
    tensors={
        **TENSORS,
        **{f"{role}{end}": packed for role in "qkv" for end, packed in _GROUPS.items()},
        **{"o": "c_proj.weight", "o_bias": "c_proj.bias"},
    },
    body=replace(BODY, mlp={"up": "mlp.c_fc", "act": "mlp.act", "down": "mlp.c_proj"}),
    fields=_fields,
    prefix="transformer.",
    buffers=r"\.attn\.(bias|masked_bias)$|^transformer\.bias$",
)
