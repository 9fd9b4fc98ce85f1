"""Latent attention: a few rotated planes of each key head, and one latent for all other keys and all values.

The cache of a token is `rotated_BSM`, the planes of all G key heads side by side (M = G P), and `latent_BSR`. Head h of
group g reads from them (arXiv 2503.01586; the absorbed form is that of arXiv 2405.04434, section 2.1):

    k_g = [rotated_g | U_g c],  v_g = W_g c + b_g,      o_h = softmax(scale * q_h k_g^T + mask) v_g

U_g and W_g are linear, so they can be applied to the query and to the output instead of to each cached token. The cache
is then read as it is, once for all heads:

    o_h = W_g (softmax(scale * (q_h,rot rotated_g^T + (q_h,free U_g) c^T) + mask) c) + b_g

This multiplies a cached token with P + 2 R numbers per head instead of 2 E, and writes no keys and values of heads.
Decoding uses it. A prompt is read in the first form (`written_out`), where that costs less: see `absorbs`.

DeepSeek's heads share one rotated key, which stands behind their own coordinates: `k_h = [U_h c | rotated]`. Functions
take that layout as `shared`; every head then is a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvfold.attention.grouped import masked_softmax, with_causal
from kvfold.attention.grouped import reference as grouped_reference


def written_out(
    rotated_BSM: Tensor,
    latent_BSR: Tensor,
    k_up_GNR: Tensor,
    v_up_GER: Tensor,
    v_bias_GE: Tensor,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """The keys and values of heads that a cache stands for, `k_BGSE` and `v_BGSE`."""
    groups = len(v_bias_GE)
    free_BGSN = _of_heads(linear(latent_BSR, k_up_GNR.flatten(0, 1)), groups)
    v_BGSE = _of_heads(linear(latent_BSR, v_up_GER.flatten(0, 1), v_bias_GE.flatten()), groups)
    if shared:
        return torch.cat([free_BGSN, rotated_BSM[:, None].expand(-1, groups, -1, -1)], dim=-1), v_BGSE
    return torch.cat([_of_heads(rotated_BSM, groups), free_BGSN], dim=-1), v_BGSE


def absorbs(tokens: int, fresh: bool, groups: int, heads: int, head_dim: int, rotated: int, width: int) -> bool:
    """Whether `tokens` queries take fewer operations absorbed than with the cached keys written out.

    Writing out takes `2 R G (2 E - P)` operations per key, and absorbing `2 H (2 R + P - 2 E)` more per query and key.
    `fresh` keys, cached by this very call, are written out for more than one query.
    """
    if tokens == 1 or fresh:
        return tokens == 1
    return tokens * heads * (2 * width + rotated - 2 * head_dim) < width * groups * (2 * head_dim - rotated)


def absorbed_attention(
    q_BHTE: Tensor,
    rotated_BSM: Tensor,
    latent_BSR: Tensor,
    k_up_GNR: Tensor,
    v_up_GER: Tensor,
    v_bias_GE: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    k_bias_GN: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """Latent attention on the cache as it is, `o_BHTE`. Heads of q begin with their rotated coordinates, or end so.

    `mask` broadcasts to (B, H, T, S): bool (True: visible) or float (added to the logits). Without one, `causal` aligns
    the last query with the last key. The default `scale` is 1 / sqrt(E). The output of a query that sees no key is
    `v_bias`. `softcap` caps the logits; only then `k_bias` matters, the bias of unrotated keys, because without a cap
    it shifts all logits of a query alike.
    """
    batch, heads, tokens, width = q_BHTE.shape
    groups, free = k_up_GNR.shape[:2]
    planes, keys = width - free, latent_BSR.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    q_BGXE = (q_BHTE * scale).reshape(batch, groups, -1, width)  # X: the heads of a group, and their tokens
    start = 0 if shared else planes
    free_BGXN = q_BGXE[..., start : start + free]
    turned_BGXP = q_BGXE[..., free:] if shared else q_BGXE[..., :planes]
    logits_BXS = _through(free_BGXN, k_up_GNR).flatten(1, 2) @ latent_BSR.mT
    if shared:
        logits_BXS = torch.baddbmm(logits_BXS, turned_BGXP.flatten(1, 2), rotated_BSM.mT)
    elif planes:
        # each head reads the planes of its own group: one product with zeros for the other groups is faster than one
        # product for each group (docs/log.md)
        apart_BGXGP = q_BGXE.new_zeros(*q_BGXE.shape[:3], groups, planes)
        apart_BGXGP.diagonal(dim1=1, dim2=3).copy_(turned_BGXP.permute(0, 2, 3, 1))
        logits_BXS = torch.baddbmm(logits_BXS, apart_BGXGP.flatten(3).flatten(1, 2), rotated_BSM.mT)
    if k_bias_GN is not None:
        logits_BXS = logits_BXS + (free_BGXN @ k_bias_GN[..., None]).flatten(1, 2)
    if softcap is not None:
        logits_BXS = softcap * torch.tanh(logits_BXS / softcap)
    if mask is None and causal and tokens > 1:
        mask = with_causal(None, tokens, keys, q_BHTE.device)
    weights_BXS = masked_softmax(logits_BXS.view(batch, heads, tokens, keys), mask).flatten(1, 2)
    context_BGXR = (weights_BXS @ latent_BSR).view(batch, groups, -1, latent_BSR.shape[-1])
    o_BGXE = _through(context_BGXR, v_up_GER.mT) + v_bias_GE[:, None]
    return o_BGXE.reshape(batch, heads, tokens, v_bias_GE.shape[-1])


def _through(rows_BGXN: Tensor, weight_GNR: Tensor) -> Tensor:
    """Rows of each group by the group's weight, `(B, G, X, R)`: read once, not copied for each row."""
    batch, groups, count, width = rows_BGXN.shape
    rows_GYN = rows_BGXN.transpose(0, 1).reshape(groups, batch * count, width)
    return torch.bmm(rows_GYN, weight_GNR).view(groups, batch, count, weight_GNR.shape[-1]).transpose(0, 1)


def _of_heads(rows_BSN: Tensor, groups: int) -> Tensor:
    """Heads side by side, `(B, S, G N)` -> `(B, G, S, N)`."""
    batch, keys, wide = rows_BSN.shape
    return rows_BSN.view(batch, keys, groups, wide // groups).transpose(1, 2)


def turn(heads_BTGP: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, planes_GP: Tensor) -> Tensor:
    """Rotate heads of half-split planes. `planes_GP` (G, P / 2) names each plane's frequency among the model's own."""
    cos_BTGP, sin_BTGP = chosen(cos_BTE, sin_BTE, planes_GP)
    real, imaginary = heads_BTGP.chunk(2, dim=-1)
    return heads_BTGP * cos_BTGP + torch.cat([-imaginary, real], dim=-1) * sin_BTGP


def chosen(cos_BTE: Tensor, sin_BTE: Tensor, planes_GP: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(B, T, G, P)` of the planes that each head keeps, from those of whole half-split heads."""
    twice_GP = torch.cat([planes_GP, planes_GP], dim=-1)  # the first half of cos and sin is the second
    return cos_BTE[..., twice_GP], sin_BTE[..., twice_GP]


def reference(
    q_BHTE: Tensor,
    rotated_BSM: Tensor,
    latent_BSR: Tensor,
    k_up_GNR: Tensor,
    v_up_GER: Tensor,
    v_bias_GE: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    k_bias_GN: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """The textbook: keys and values written out head by head. Same arguments and result as `absorbed_attention`."""
    groups, free = k_up_GNR.shape[:2]
    planes = q_BHTE.shape[-1] - free
    keys, values = [], []
    for group in range(groups):
        free_BSN = torch.einsum("nr,bsr->bsn", k_up_GNR[group], latent_BSR)
        if k_bias_GN is not None:
            free_BSN = free_BSN + k_bias_GN[group]
        if shared:
            keys.append(torch.cat([free_BSN, rotated_BSM], dim=-1))
        else:
            keys.append(torch.cat([rotated_BSM[..., group * planes : (group + 1) * planes], free_BSN], dim=-1))
        values.append(torch.einsum("er,bsr->bse", v_up_GER[group], latent_BSR) + v_bias_GE[group])
    k_BGSE, v_BGSE = torch.stack(keys, dim=1), torch.stack(values, dim=1)
    return grouped_reference(q_BHTE, k_BGSE, v_BGSE, mask=mask, causal=mask is None, scale=scale, softcap=softcap)
