"""Causal attention for training on a CPU, by blocks of queries: logits above the diagonal are not computed.

    o_i = softmax(scale * q_i k_{<= i}^T) v_{<= i},    queries in N blocks: (N + 1) / 2N of the full T x T logits

PyTorch's own fused attention spends most of a small model's training time in its bf16 backward on a CPU; plain matrix
products that keep the probabilities are about twice as fast there, and hold `B H T T (N + 1) / 2N` numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCKS = 4
LONGEST = 1024  # tokens: beyond, the kept probabilities cost more than they save


def working_dtype(q_BHTE: Tensor) -> torch.dtype:
    """The dtype of matrix products with this tensor: its own, or that of autocast."""
    kind = q_BHTE.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q_BHTE.dtype


def worthwhile(q_BHTE: Tensor, k_BGSE: Tensor) -> bool:
    """Whether this is faster than PyTorch's own kernel: in bf16 on a CPU, up to `LONGEST` tokens."""
    tokens, keys = q_BHTE.shape[2], k_BGSE.shape[2]
    return q_BHTE.is_cpu and 1 < tokens == keys <= LONGEST and working_dtype(q_BHTE) == torch.bfloat16


def blocked_attention(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal attention of grouped heads, `o_BHTE`, with gradients.

    Logits and probabilities have the inputs' dtype, or that of autocast. The default `scale` is 1 / sqrt(E). Query
    heads of a group are rows of one matrix, so keys are not repeated.
    """
    dtype = working_dtype(q_BHTE)
    q_BHTE, k_BGTE, v_BGTE = q_BHTE.to(dtype), k_BGTE.to(dtype), v_BGTE.to(dtype)
    batch, heads, tokens, width = q_BHTE.shape
    groups = k_BGTE.shape[1]
    rows = heads // groups
    scale = 1 / math.sqrt(width) if scale is None else scale
    q_NRTE = (q_BHTE * scale).reshape(batch * groups, rows, tokens, width)
    k_NET, v_NTE = k_BGTE.flatten(0, 1).transpose(1, 2), v_BGTE.flatten(0, 1)
    block = -(-tokens // BLOCKS)
    hidden = torch.full((block, block), -math.inf, dtype=dtype, device=q_BHTE.device).triu(1)
    outputs = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        z_NRQS = (q_NRTE[:, :, start:end].flatten(1, 2) @ k_NET[:, :, :end]).view(-1, rows, end - start, end)
        z_NRQS[..., start:] += hidden[: end - start, : end - start]
        o_NME = z_NRQS.softmax(-1).flatten(1, 2) @ v_NTE[:, :end]
        outputs.append(o_NME.view(-1, rows, end - start, v_NTE.shape[-1]))
    return torch.cat(outputs, dim=2).reshape(batch, heads, tokens, v_NTE.shape[-1])
