"""phi: decoders whose attention and MLP read one LayerNorm side by side, with biases everywhere: Phi-1, 1.5 and 2.

A part of each head is rotated. The MLP has no gate, and the output projection has a bias.
"""

from __future__ import annotations

from kvfold.contracts.config import EPSILON, SHARE, only
from kvfold.contracts.family import Body
from kvfold.families._decoder import TENSORS, Layout, decoder

FAMILY = decoder(
    "phi",
    "Phi-1, Phi-1.5, Phi-2 (parallel residual, part of each head rotated)",
    "phi",
    examples=("microsoft/phi-1_5", "microsoft/phi-2"),
    rules={
        "layer_norm_eps": EPSILON,
        "qk_layernorm": only(False, "false: norms of q and k with biases are not known here"),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), SHARE),
    },
    layout=lambda config: Layout(
        biases="qkvo", rotated=0.5, gated=False, mlp_biases=True, vectors=2, last=2, head_bias=True
    ),
    tiny={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    tensors={**TENSORS, "o": "dense.weight", "o_bias": "dense.bias"},
    body=Body(norm="model.final_layernorm", mlp={"up": "mlp.fc1", "act": "mlp.activation_fn", "down": "mlp.fc2"}),
)
