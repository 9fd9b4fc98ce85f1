"""gptj: GPT-J and CodeGen: one LayerNorm for attention and MLP, and heads that rotate neighbouring coordinates.

CodeGen keeps q, v and k in one tensor, four blocks of `[q | v | k]`. config.json has no field for key/value heads:
students are stock Phi, whose heads rotate halves, so the rotated rows of each head of q and k change places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvfold.contracts.config import Fields, whole
from kvfold.contracts.family import Family, Json, Rehoused
from kvfold.contracts.packed import Packed
from kvfold.contracts.site import Attention
from kvfold.contracts.stock import stock_class
from kvfold.families._decoder import END, TENSORS, Layout, decoder
from kvfold.families._gpt import BODY, IGNORED, RULES, TINY, check_gpt, gpt_usual
from kvfold.families._rehoused import Block, Map, halves, phi

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 4  # CodeGen was trained on four cores of a TPU
QVK = Packed("qkv_proj.weight", ("q", "v", "k"), blocks=BLOCKS)
_MLP = {"up": "mlp.fc_in", "act": "mlp.act", "down": "mlp.fc_out"}


def _rotary(config: Json) -> int:
    return int(config.get("rotary_dim", 64))


def _layout(config: Json) -> Layout:
    width = config["hidden_size"] // config["num_attention_heads"]
    rotated = _rotary(config) / width
    return Layout(rotated=rotated, half_split=False, gated=False, mlp_biases=True, last=2, head_bias=True)


def _check(fields: Fields) -> None:
    check_gpt(fields)
    width = fields.config["n_embd"] // fields.config["n_head"]
    if _rotary(fields.config) > width:
        raise fields.refusal("rotary_dim is more than a head has", got=_rotary(fields.config), allowed=f"up to {width}")
    if fields.config["model_type"] == "codegen" and fields.config["n_head"] % BLOCKS:
        raise fields.refusal(f"n_head does not divide into {BLOCKS} blocks", got=fields.config["n_head"])


def _as_phi(config: Json) -> Rehoused:
    """The same function as a Phi."""
    known = {"n_positions": 2048, "tie_word_embeddings": False, **config}
    known = gpt_usual(known)
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    attention, packed = Attention(hidden, heads, heads, hidden // heads), config["model_type"] == "codegen"

    def rows(role: str) -> Callable[[Tensor], Tensor]:
        cut = partial(QVK.part, role=role, attention=attention) if packed else lambda stored: stored
        return cut if role == "v" else lambda stored: halves(cut(stored), heads, _rotary(config))

    def block(layer: int) -> Block:
        path = f"transformer.h.{layer}"
        sources = {role: f"{path}.attn.{'qkv' if packed else role}_proj" for role in "qkv"}
        maps = {role: Map([source], biased=False, make=rows(role)) for role, source in sources.items()}
        maps["o"] = Map([f"{path}.attn.out_proj"], biased=False)
        return Block(maps | {part: Map([f"{path}.{_MLP[part]}"]) for part in ("up", "down")}, f"{path}.ln_1")

    part = _layout(known).rotated
    names = {"layer_norm_eps": "layer_norm_epsilon", "attention_dropout": "attn_pdrop"}
    return phi(
        known,
        fields={
            "hidden_act": config.get("activation_function", "gelu_new"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part},
            **{new: config[old] for new, old in names.items() if old in config},
            **{name: config.get(name, 0.0) for name in ("resid_pdrop", "embd_pdrop")},
        },
        ends={"embedding": "transformer.wte", "head": "lm_head", "norm": "transformer.ln_f"},
        block=block,
        head_bias=True,
    )


def _family(name: str, about: str, **facts: Any) -> Family:
    return decoder(
        name,
        about,
        name,
        rules={**RULES, "rotary_dim": whole(2, 1 << 20), "num_key_value_heads": IGNORED},
        usual=gpt_usual,
        check=_check,
        layout=_layout,
        tiny={**TINY, "rotary_dim": 4},
        attention={"self": "transformer.h.{layer}.attn"},
        body=replace(BODY, mlp=_MLP),
        fields=lambda shape: {"model_type": name, "architectures": [stock_class(name, END)]},
        rehouse=_as_phi,
        interface=False,
        buffers=r"\.attn\.(bias|masked_bias|causal_mask)$",
        **facts,
    )


FAMILIES = (
    _family(
        "gptj",
        "GPT-J (folded as stock Phi)",
        examples=("EleutherAI/gpt-j-6b",),
        tensors={**TENSORS, "o": "out_proj.weight"},
    ),
    _family(
        "codegen",
        "CodeGen (folded as stock Phi)",
        examples=("Salesforce/codegen-350M-mono",),
        tensors={**TENSORS, **dict.fromkeys("qkv", QVK), "o": "out_proj.weight"},
    ),
)
