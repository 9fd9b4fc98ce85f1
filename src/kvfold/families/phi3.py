"""phi3: the layout of llama with one tensor for q, k and v, and one for gate and up: Phi-3 and Phi-4.

A part of each head may be rotated, and `longrope` stretches the rotation of long contexts.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvfold.contracts.config import POSITIONS, SHARE, Fields, only
from kvfold.contracts.family import Body, Json
from kvfold.contracts.packed import Packed
from kvfold.families._decoder import TENSORS, Layout, decoder

_QKV, _GATED = Packed("qkv_proj.weight"), Packed("mlp.gate_up_proj.weight", ("gate", "up"))


def _check(fields: Fields) -> None:
    """Refuse rotations that transformers' class refuses, and `yarn`, which it reads as `longrope`."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    stated = fields.get(name, {})
    kind = stated.get("rope_type", stated.get("type", "default")) if isinstance(stated, Mapping) else "default"
    if kind not in ("default", "longrope", "su"):  # the last has a remedy of its own
        raise fields.refusal(f"{name}.rope_type is not one of this architecture", got=kind, allowed="default, longrope")


def _layout(config: Json) -> Layout:
    window = config.get("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    return Layout(windows=[window] * config["num_hidden_layers"], kinds=(kind,), partial=True)


FAMILY = decoder(
    "phi3",
    "Phi-3, Phi-3.5, Phi-4 (q, k and v in one tensor, gate and up in another)",
    "phi3",
    examples=("microsoft/Phi-3-mini-4k-instruct", "microsoft/phi-4"),
    rules={
        "sliding_window": POSITIONS.or_null,
        "attention_bias": only(False, "false: this architecture has no biases"),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), SHARE),
    },
    check=_check,
    layout=_layout,
    tensors={**TENSORS, **dict.fromkeys("qkv", _QKV)},
    body=Body(mlp={"gate": _GATED, "up": _GATED, "act": "mlp.activation_fn", "down": "mlp.down_proj"}),
)
