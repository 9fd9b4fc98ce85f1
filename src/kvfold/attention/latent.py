"""Latent attention: a few rotated planes of each key head, and one latent for all other keys and all values.

A token is kept as `rotated_BSM`, the planes of all G key heads side by side (M = G P), and `latent_BSR`; head h of
group g reads from them (arXiv 2503.01586; the absorbed form is that of arXiv 2405.04434, section 2.1):

    k_g = [rotated_g | U_g c],  v_g = W_g c + b_g,      o_h = softmax(scale * q_h k_g^T + mask) v_g

U_g and W_g stand between a query and everything that was cached, so they may be applied to the query and to the answer
instead of to each token: what is cached is read as it lies, once for all heads.

    o_h = W_g (softmax(scale * (q_h,rot rotated_g^T + (q_h,free U_g) c^T) + mask) c) + b_g

That multiplies a cached token with P + 2 R numbers a head and not with 2 E, and writes no keys and values of heads. It
is how a token is decoded. A prompt is read the first way (`written_out`), where it costs less: see `absorbs`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear


def written_out(
    rotated_BSM: Tensor, latent_BSR: Tensor, k_up_GNR: Tensor, v_up_GER: Tensor, v_bias_GE: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys and values that a cache stands for, `k_BGSE` and `v_BGSE`, for any attention of grouped heads."""
    groups = len(v_bias_GE)
    rotated_BGSP = _of_heads(rotated_BSM, groups)
    free_BGSN = _of_heads(linear(latent_BSR, k_up_GNR.flatten(0, 1)), groups)
    v_BGSE = _of_heads(linear(latent_BSR, v_up_GER.flatten(0, 1), v_bias_GE.flatten()), groups)
    return torch.cat([rotated_BGSP, free_BGSN], dim=-1), v_BGSE


def absorbs(tokens: int, fresh: bool, groups: int, heads: int, head_dim: int, rotated: int, width: int) -> bool:
    """Whether `tokens` queries take fewer operations absorbed than with the cached keys written out.

    Writing out takes `2 R G (2 E - P)` operations a key, and absorbing `2 H (2 R + P - 2 E)` more for each query and
    key. Where all keys are `fresh`, cached by this very call, they are written out but for one query.
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
) -> Tensor:
    """Latent attention that reads the cache as it lies, `o_BHTE`; heads of q begin with their rotated coordinates.

    `mask` broadcasts to (B, H, T, S): bool (True: look at it) or float (added to the logits); without one the last
    query sees every key, and those before it all but the newest, or all of them where attention is not `causal`.
    `scale` is 1 / sqrt(E) unless given. A query that may look at nothing gets `v_bias`. `softcap` caps the logits, and
    then `k_bias` is felt, a bias of unrotated keys: without a cap it would move all logits of a query alike.
    """
    batch, heads, tokens, width = q_BHTE.shape
    groups, free = k_up_GNR.shape[:2]
    planes, keys = width - free, latent_BSR.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    q_BGXE = (q_BHTE * scale).reshape(batch, groups, -1, width)  # X: the heads of a group, and their tokens
    logits_BXS = _through(q_BGXE[..., planes:], k_up_GNR).flatten(1, 2) @ latent_BSR.mT
    if planes:
        # a head meets the planes of its own group: one product for all heads, with zeros for those of other groups,
        # takes less time than a product for each group (docs/log.md)
        apart_BGXGP = q_BGXE.new_zeros(*q_BGXE.shape[:3], groups, planes)
        apart_BGXGP.diagonal(dim1=1, dim2=3).copy_(q_BGXE[..., :planes].permute(0, 2, 3, 1))
        logits_BXS = torch.baddbmm(logits_BXS, apart_BGXGP.flatten(3).flatten(1, 2), rotated_BSM.mT)
    if k_bias_GN is not None:
        logits_BXS = logits_BXS + (q_BGXE[..., planes:] @ k_bias_GN[..., None]).flatten(1, 2)
    if softcap is not None:
        logits_BXS = softcap * torch.tanh(logits_BXS / softcap)
    if mask is None and causal and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q_BHTE.device).tril(keys - tokens)
    weights_BXS = _softmax(logits_BXS.view(batch, heads, tokens, keys), mask).flatten(1, 2)
    context_BGXR = (weights_BXS @ latent_BSR).view(batch, groups, -1, latent_BSR.shape[-1])
    o_BGXE = _through(context_BGXR, v_up_GER.mT) + v_bias_GE[:, None]
    return o_BGXE.reshape(batch, heads, tokens, width)


def _through(rows_BGXN: Tensor, weight_GNR: Tensor) -> Tensor:
    """Rows of each group by the group's weight, `(B, G, X, R)`: read once, not copied for each row."""
    batch, groups, count, width = rows_BGXN.shape
    rows_GYN = rows_BGXN.transpose(0, 1).reshape(groups, batch * count, width)
    return torch.bmm(rows_GYN, weight_GNR).view(groups, batch, count, weight_GNR.shape[-1]).transpose(0, 1)


def _softmax(logits_BHTS: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits_BHTS.softmax(-1)
    if mask.dtype != torch.bool:
        return (logits_BHTS + mask).softmax(-1)
    # the lowest number and not -inf: a row without any visible key keeps finite gradients, and then gets 0
    logits_BHTS = logits_BHTS.masked_fill(~mask, torch.finfo(logits_BHTS.dtype).min)
    return logits_BHTS.softmax(-1).masked_fill(~mask, 0.0)


def _of_heads(rows_BSN: Tensor, groups: int) -> Tensor:
    """Heads side by side, `(B, S, G N)` -> `(B, G, S, N)`."""
    batch, keys, wide = rows_BSN.shape
    return rows_BSN.view(batch, keys, groups, wide // groups).transpose(1, 2)


def turn(heads_BTGP: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, planes_GP: Tensor) -> Tensor:
    """Rotate heads of half-split planes, each by the frequencies that `planes_GP` (G, P / 2) names of a model's own."""
    return _rotated(heads_BTGP, *chosen(cos_BTE, sin_BTE, planes_GP))


def chosen(cos_BTE: Tensor, sin_BTE: Tensor, planes_GP: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(B, T, G, P)` of the planes that each head keeps, from those of whole half-split heads."""
    twice_GP = torch.cat([planes_GP, planes_GP], dim=-1)  # the first half of cos and sin is the second
    return cos_BTE[..., twice_GP], sin_BTE[..., twice_GP]


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-imaginary, real], dim=-1) * sin


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
) -> Tensor:
    """The textbook: one head after the other, keys and values written out. Arguments and answer as above."""
    heads, tokens, width = q_BHTE.shape[1:]
    groups, free = k_up_GNR.shape[:2]
    planes, keys = width - free, latent_BSR.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    seen_TS = torch.ones(tokens, keys, dtype=torch.bool, device=q_BHTE.device)
    visible = seen_TS.tril(keys - tokens) if mask is None else mask
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        k_BSE = torch.cat(
            [
                rotated_BSM[..., group * planes : (group + 1) * planes],
                torch.einsum("nr,bsr->bsn", k_up_GNR[group], latent_BSR)
                + (0 if k_bias_GN is None else k_bias_GN[group]),
            ],
            dim=-1,
        )
        v_BSE = torch.einsum("er,bsr->bse", v_up_GER[group], latent_BSR) + v_bias_GE[group]
        logits_BTS = scale * torch.einsum("bte,bse->bts", q_BHTE[:, head], k_BSE)
        if softcap is not None:
            logits_BTS = softcap * torch.tanh(logits_BTS / softcap)
        seen_BTS = visible.expand(q_BHTE.shape[0], heads, tokens, keys)[:, head]
        if visible.dtype == torch.bool:
            logits_BTS = logits_BTS.masked_fill(~seen_BTS, -math.inf)
        else:
            logits_BTS = logits_BTS + seen_BTS
        outputs.append(torch.einsum("bts,bse->bte", logits_BTS.softmax(-1), v_BSE))
    return torch.stack(outputs, dim=1)
