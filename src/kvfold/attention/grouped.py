"""Grouped attention: query heads in groups of `H / G`, each group reading one key/value head (arXiv 2305.13245, 2.1).

    o_h = softmax(scale * q_h k_g^T + mask) v_g,    g = h // (H / G)

Query heads of a group read the same keys. When one token is decoded, they become the rows of one small matrix,
`q (B, H, 1, E) -> (B, G, H/G, E)`, so keys and values are read once for the whole group and never repeated.

Gemma's models cap their logits z softly, before the mask: `c tanh(z / c)` (Gemma 2, arXiv 2408.00118, section 2).
gpt-oss's have a sink: each query head has one more logit, of its own, whose value is 0 (arXiv 2508.10925, section 2.2).
Decoupled heads (arXiv 2406.06567) group values apart from keys: query head h reads the value head `value_heads[h]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kvfold.attention.blocked import blocked_attention, worthwhile


def grouped_attention(
    q_BHTE: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    value_heads: Sequence[int] | None = None,
) -> Tensor:
    """Attention of grouped heads, `o_BHTE`. On a CPU the keys and values of a group are never repeated in memory.

    `mask` broadcasts to (B, H, T, S): bool (True: visible) or float (added to the logits). `causal` aligns the last
    query with the last key, also when S > T. The default `scale` is 1 / sqrt(E). The output of a query that sees no key
    is 0. With a `softcap` or with sinks all logits are in memory at once: no fused kernel has them. With `value_heads`
    keys and values are repeated too, unless one token is decoded.
    """
    heads, tokens, width = q_BHTE.shape[1:]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if value_heads is not None and tokens == 1:
        return _written_out(q_BHTE, k_BGSE, v_BGSE, mask, scale, softcap, sinks_H, dropout, value_heads)
    if value_heads is not None:
        k_BGSE, v_BGSE = k_BGSE.repeat_interleave(heads // k_BGSE.shape[1], dim=1), v_BGSE[:, value_heads]
    groups, keys = k_BGSE.shape[1:3]
    plain = softcap is None and sinks_H is None
    if tokens == 1 and not dropout and plain:
        return _decode(q_BHTE, k_BGSE, v_BGSE, mask, scale)
    if causal and (mask is not None or keys != tokens or not plain):
        mask, causal = with_causal(mask, tokens, keys, q_BHTE.device), False
    if not plain:
        return _written_out(q_BHTE, k_BGSE, v_BGSE, mask, scale, softcap, sinks_H, dropout)
    if causal and not dropout and worthwhile(q_BHTE, k_BGSE):
        return blocked_attention(q_BHTE, k_BGSE, v_BGSE, scale=scale)
    if heads != groups and mask is not None and q_BHTE.is_cuda:
        # with both a mask and shared heads, sdpa on CUDA would write the logits of a whole prompt into memory
        k_BGSE, v_BGSE = (each.repeat_interleave(heads // groups, dim=1) for each in (k_BGSE, v_BGSE))
    return scaled_dot_product_attention(
        q_BHTE,
        k_BGSE,
        v_BGSE,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != k_BGSE.shape[1],
    )


def with_causal(mask: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor:
    """A mask of earlier keys, `(T, S)`, whose last query sees every key, joined with another mask."""
    causal_TS = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
    if mask is None:
        return causal_TS
    return mask & causal_TS if mask.dtype == torch.bool else mask.masked_fill(~causal_TS, -math.inf)


def masked_softmax(
    logits_BHTS: Tensor, mask: Tensor | None, dtype: torch.dtype | None = None, sinks_H: Tensor | None = None
) -> Tensor:
    """The softmax over the keys that a mask shows, computed in `dtype`, without what sinks take of it.

    A row without any visible key is 0.
    """
    if sinks_H is not None:
        sinks_BHT1 = sinks_H.to(logits_BHTS).view(-1, 1, 1).expand(*logits_BHTS.shape[:-1], 1)
        logits_BHTS = torch.cat([logits_BHTS, sinks_BHT1], dim=-1)
        mask = None if mask is None else pad(mask, (0, 1), value=mask.dtype == torch.bool)
        return masked_softmax(logits_BHTS, mask, dtype)[..., :-1]
    if mask is None or mask.dtype != torch.bool:
        return (logits_BHTS if mask is None else logits_BHTS + mask).softmax(-1, dtype=dtype)
    # the lowest number and not -inf: a row without any visible key keeps finite gradients
    logits_BHTS = logits_BHTS.masked_fill(~mask, torch.finfo(logits_BHTS.dtype).min)
    return logits_BHTS.softmax(-1, dtype=dtype).masked_fill(~mask, 0.0)


def _decode(q_BH1E: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query token: the `R = H / G` query heads of a group are the rows of one matrix."""
    batch, heads, _, width = q_BH1E.shape
    groups = k_BGSE.shape[1]
    q_BGRE = q_BH1E.reshape(batch, groups, heads // groups, width)
    if mask is not None and mask.dim() == 4 and mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], groups, heads // groups, mask.shape[-1])
    if _matmul_is_faster(q_BGRE, k_BGSE):
        o_BGRE = masked_softmax((q_BGRE * scale) @ k_BGSE.mT, mask) @ v_BGSE
    else:
        o_BGRE = scaled_dot_product_attention(q_BGRE, k_BGSE, v_BGSE, attn_mask=mask, scale=scale)
    return o_BGRE.reshape(batch, heads, 1, v_BGSE.shape[-1])


def _matmul_is_faster(q_BGRE: Tensor, k_BGSE: Tensor) -> bool:
    """Whether two matrix products beat the fused kernel, as measured by `benchmarks/decode.py`.

    One row of bfloat16: the fused kernel takes 4 times as long as matmul on an AMD EPYC, and 0.7 times on a Xeon with
    AMX. One row of float32 and many keys: 1.3 times and 1.0. Four rows of a group in float32: 0.87 times on the Xeon
    (keys not in cache); it writes no logits to memory, and its single parallel region suffers least from other load.
    """
    rows = q_BGRE.shape[2]
    if k_BGSE.device.type != "cpu":
        return False
    if k_BGSE.dtype in (torch.bfloat16, torch.float16):
        return rows < 4 or k_BGSE.numel() >= 1 << 18
    return rows == 1 and k_BGSE.numel() >= 1 << 19


def _written_out(
    q_BHTE: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    dropout: float,
    value_heads: Sequence[int] | None = None,
) -> Tensor:
    """Attention with all logits in memory, its softmax in float32 at least. Heads of a group are rows of one matrix."""
    batch, heads, tokens, width = q_BHTE.shape
    q_BGXE = q_BHTE.reshape(batch, k_BGSE.shape[1], -1, width)  # X: the heads of a group, and their tokens
    logits_BHTS = (q_BGXE @ k_BGSE.mT).view(batch, heads, tokens, -1) * scale
    if softcap is not None:
        logits_BHTS = softcap * torch.tanh(logits_BHTS / softcap)
    wide = torch.promote_types(logits_BHTS.dtype, torch.float32)
    p_BHTS = masked_softmax(logits_BHTS, mask, wide, sinks_H).to(v_BGSE.dtype)
    if dropout:
        p_BHTS = torch.dropout(p_BHTS, dropout, train=True)
    if value_heads is not None:
        order_H = torch.tensor(value_heads, device=p_BHTS.device).argsort(stable=True)
        p_BHTS = p_BHTS[:, order_H]
    p_BGXS = p_BHTS.reshape(batch, v_BGSE.shape[1], -1, p_BHTS.shape[-1])
    o_BHTE = (p_BGXS @ v_BGSE).reshape(batch, heads, tokens, v_BGSE.shape[-1])
    return o_BHTE if value_heads is None else o_BHTE[:, order_H.argsort()]


def reference(
    q_BHTE: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    value_heads: Sequence[int] | None = None,
) -> Tensor:
    """The textbook: one head after the other, all logits at once. Same arguments and result as `grouped_attention`."""
    heads, tokens, keys = q_BHTE.shape[1], q_BHTE.shape[2], k_BGSE.shape[2]
    group = heads // k_BGSE.shape[1]
    scale = 1 / math.sqrt(q_BHTE.shape[-1]) if scale is None else scale
    visible_TS = torch.ones(tokens, keys, dtype=torch.bool, device=q_BHTE.device)
    if causal:
        visible_TS = visible_TS.tril(keys - tokens)
    outputs = []
    for head in range(heads):
        logits_BTS = scale * torch.einsum("bte,bse->bts", q_BHTE[:, head], k_BGSE[:, head // group])
        if softcap is not None:
            logits_BTS = softcap * torch.tanh(logits_BTS / softcap)
        logits_BTS = logits_BTS.masked_fill(~visible_TS, -math.inf)
        if mask is not None:
            mask_BTS = mask.expand(q_BHTE.shape[0], heads, tokens, keys)[:, head]
            if mask.dtype == torch.bool:
                logits_BTS = logits_BTS.masked_fill(~mask_BTS, -math.inf)
            else:
                logits_BTS = logits_BTS + mask_BTS
        weights_BTS = logits_BTS.softmax(-1)
        if sinks_H is not None:  # sum exp z / (sum exp z + exp s)
            weights_BTS = weights_BTS * (logits_BTS.logsumexp(-1, keepdim=True) - sinks_H[head]).sigmoid()
        value = head // group if value_heads is None else value_heads[head]
        outputs.append(torch.einsum("bts,bse->bte", weights_BTS, v_BGSE[:, value]))
    return torch.stack(outputs, dim=1)
