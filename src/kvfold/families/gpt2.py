"""gpt2: GPT-2 and every model of that layout: learned positions, LayerNorms, and maps that are stored (in, out).

config.json has no field for key/value heads: students are GPT-BigCode, which differs in how it stores its maps. Files
of the first releases lack the prefix `transformer.`, and hold the causal masks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvfold.contracts.config import YES_NO, only
from kvfold.contracts.family import Expressed, Json, Rehoused
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention
from kvfold.contracts.stock import stock_class
from kvfold.families._decoder import END, TENSORS, decoder
from kvfold.families._gpt import BODY, IGNORED, RULES, SUMMARY, TINY, check_gpt, gpt_layout, gpt_usual
from kvfold.families._rehoused import GROUPS, Block, Map, bigcode

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = Packed("c_attn.weight", in_out=True)
_MLP = {part: Packed(f"mlp.{name}.weight", (part,), in_out=True) for part, name in (("up", "c_fc"), ("down", "c_proj"))}


def _turned(stored: Tensor) -> Tensor:
    return stored.T if stored.dim() == 2 else stored


def _as_bigcode(config: Json) -> Rehoused:
    """The same function as a GPT-BigCode."""
    known = {"n_positions": 1024, "tie_word_embeddings": True, **config}
    known = gpt_usual(known)
    hidden, heads, positions = (known[name] for name in ("n_embd", "n_head", "n_positions"))
    attention = Attention(hidden, heads, heads, hidden // heads)

    def grouped(stored: Tensor) -> Tensor:
        return GROUPS.joined({role: _ROWS.part(stored, role, attention) for role in "qkv"}, attention)

    def block(layer: int) -> Block:
        path = f"transformer.h.{layer}"
        maps = {"qkv": Map([f"{path}.attn.c_attn"], make=grouped)}
        names = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        maps |= {role: Map([f"{path}.{name}"], make=_turned) for role, name in names.items()}
        return Block(maps, f"{path}.ln_1", second=f"{path}.ln_2")

    return bigcode(
        known,
        fields={
            "activation_function": config.get("activation_function", "gelu_new"),
            "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
            **{name: config.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        },
        ends={"embedding": "transformer.wte", "head": "lm_head", "norm": "transformer.ln_f"},
        positions=Expressed(("transformer.wpe.weight",), (positions, hidden)),
        block=block,
    )


FAMILY = decoder(
    "gpt2",
    "GPT-2 (folded as GPT-BigCode: stock with one key/value head)",
    "gpt2",
    examples=("openai-community/gpt2", "openai-community/gpt2-xl"),
    rules={
        **RULES,
        **SUMMARY,
        "num_key_value_heads": IGNORED,
        "scale_attn_weights": only(True, "true: logits without a scale are not known here"),
        "scale_attn_by_inverse_layer_idx": only(False, "false: another scale in each layer is not known here"),
        "reorder_and_upcast_attn": YES_NO,
    },
    ties=True,
    usual=gpt_usual,
    check=check_gpt,
    layout=gpt_layout,
    tiny=TINY,
    attention={"self": "transformer.h.{layer}.attn"},
    tensors={
        **TENSORS,
        **dict.fromkeys("qkv", _ROWS),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), Packed("c_attn.bias")),
        **{"o": Packed("c_proj.weight", ("o",), in_out=True), "o_bias": "c_proj.bias"},
    },
    body=replace(BODY, mlp={**_MLP, "act": "mlp.act"}),
    fields=lambda shape: {"model_type": "gpt2", "architectures": [stock_class("gpt2", END)]},
    prefix="transformer.",
    buffers=r"\.attn\.(bias|masked_bias)$",
    rehouse=_as_bigcode,
)
