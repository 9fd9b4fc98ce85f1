"""Linear attention with a softmax window, for heads in query groups.

A query t sees the last w tokens and the first n (sinks) by softmax, and all others through features phi, weighed by a
decay gamma per key head (arXiv 2405.06640, eq. 3-5; the window's share as in arXiv 2410.10254, eq. 6):

    a_tj = exp(scale q_t.k_j - max),  j in the window or a sink        b_tj = gamma^(t-j) phi(q_t).phi(k_j), all others
    o_t  = (g sum a_tj v_j + sum b_tj v_j) / (g sum a_tj + sum b_tj)

g is a number per head. Unless `normalised`, o_t is the second sum alone, and some other norm follows. Without features
it is the window alone. The tokens behind the window enter as two sums of fixed size,

    S_c = sum_{j<=c} gamma^(c-j) phi(k_j) v_j^T  (G F E numbers),      z_c = sum_{j<=c} gamma^(c-j) phi(k_j)  (G F)

which all query heads of a group share. Keys reach the sums w tokens late, faded by w steps; the rest is plain linear
attention. `linear_attention` takes matrix products within chunks and carries the sums between them (on a GPU by
flash-linear-attention where that is installed); `decode` reads the sums for one token. Textbook: tests/attention.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfold.attention.blocked import working_dtype

Part = tuple[Tensor, Tensor]
"""One part of the output by head: the weighted sum of values, `(B, H, T, E)`, and the sum of weights, `(B, H, T)`."""

CHUNK = 64  # tokens: at heads of 64, a chunk costs about as much within itself as its sums cost
LEAST = 1e-6  # lower bound of a sum of weights, where no window adds to it
EPSILON = 1e-5  # of `normed`


@dataclass(frozen=True)
class Sums:
    """The sums over all tokens behind the window, relative to the last of them; `mass` where outputs are divided."""

    state_BGFE: Tensor
    mass_BGF: Tensor | None


@dataclass(frozen=True)
class Sinks:
    """Tokens that every later query sees. Sink i of row b is token `at_BN[b, i]`, below 0 if it came before."""

    k_BGNE: Tensor
    v_BGNE: Tensor
    at_BN: Tensor


@dataclass(frozen=True)
class Past:
    """What precedes the given keys and values. `free_BS` is False for keys that are padding or sinks."""

    sums: Sums | None = None
    sinks: Sinks | None = None
    free_BS: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """How the parts are weighed."""

    window: int
    normalised: bool
    scale: float
    log_decay_G: Tensor | None = None  # None: no decay
    gate_H: Tensor | None = None  # factor of the window's weights; None: 1


def linear_attention(
    q_BHTE: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    phi_q_BHTF: Tensor | None,
    phi_k_BGCF: Tensor | None,
    weights: Weights,
    past: Past = Past(),
) -> Tensor:
    """Attention of the last T of S tokens, `o_BHTE`. Tokens before those S are in the sums of the `past`.

    `phi_k_BGCF` are features of the first C = S - window keys, those that are behind the last query's window; None
    without features. The output of a query that sees no key is undefined. Sums are carried in float32 at least.
    """
    dtype = working_dtype(q_BHTE)
    q_BHTE, k_BGSE, v_BGSE = q_BHTE.to(dtype), k_BGSE.to(dtype), v_BGSE.to(dtype)
    far = None
    if phi_q_BHTF is not None and phi_k_BGCF is not None:
        phi_q_BHTF, phi_k_BGCF = phi_q_BHTF.to(dtype), phi_k_BGCF.to(dtype)
        keys = phi_k_BGCF.shape[2]
        if past.free_BS is not None:
            phi_k_BGCF = phi_k_BGCF * past.free_BS[:, None, :keys, None]
        if weights.log_decay_G is not None and weights.window:
            phi_k_BGCF = phi_k_BGCF * _powers(weights.log_decay_G, torch.tensor([weights.window])).to(dtype)[:, :, None]
        late = pad(phi_k_BGCF, (0, 0, weights.window, 0))[:, :, -k_BGSE.shape[2] :]
        values = pad(v_BGSE[:, :, :keys], (0, 0, weights.window, 0))[:, :, -k_BGSE.shape[2] :]
        summed = _chunked if kernels(q_BHTE.device) is None else _by_kernels
        far = summed(phi_q_BHTF, late, values, weights, past.sums)
    near = _banded(q_BHTE * weights.scale, k_BGSE, v_BGSE, weights.window, past) if weights.window else None
    return _joined(near, far, weights)


def decode(
    q_BH1E: Tensor,
    k_BGSE: Tensor,
    v_BGSE: Tensor,
    phi_q_BH1F: Tensor | None,
    weights: Weights,
    past: Past = Past(),
) -> Tensor:
    """The same for one token whose window is the given S tokens, with all before them in the sums.

    The cost does not depend on the length of the text.
    """
    far = None
    if phi_q_BH1F is not None and past.sums is not None:
        far = _read(phi_q_BH1F, past.sums, weights)
    near = _one_row(q_BH1E * weights.scale, k_BGSE, v_BGSE, weights.window, past) if weights.window else None
    return _joined(near, far, weights)


def _joined(near: Part | None, far: Part | None, weights: Weights) -> Tensor:
    """Both parts under one denominator."""
    if near is None:
        assert far is not None
        far_BHTE, mass_BHT = far
        return far_BHTE / mass_BHT.clamp_min(LEAST)[..., None] if weights.normalised else far_BHTE
    if far is None:
        return near[0]
    (near_BHTE, share_BHT), (far_BHTE, mass_BHT) = near, far
    if weights.gate_H is not None:
        share_BHT = share_BHT * weights.gate_H.to(share_BHT)[:, None]
    total_BHT1 = (share_BHT + mass_BHT)[..., None]
    return near_BHTE * (share_BHT[..., None] / total_BHT1) + far_BHTE / total_BHT1


def absorbed(sums: Sums | None, phi_k_BGCF: Tensor, v_BGCE: Tensor, weights: Weights) -> Sums:
    """The sums with C more tokens in them."""
    count = phi_k_BGCF.shape[2]
    if weights.log_decay_G is not None:
        phi_k_BGCF = phi_k_BGCF * _powers(weights.log_decay_G, torch.arange(count - 1, -1, -1))[:, :, None]
    wide = torch.promote_types(phi_k_BGCF.dtype, torch.float32)
    phi_k_BGCF = phi_k_BGCF.to(wide)
    state_BGFE = phi_k_BGCF.mT @ v_BGCE.to(wide)
    mass_BGF = phi_k_BGCF.sum(2) if weights.normalised else None
    if sums is None:
        return Sums(state_BGFE, mass_BGF)
    fade = 1.0 if weights.log_decay_G is None else _powers(weights.log_decay_G, torch.tensor([count]))[:, :, None]
    state_BGFE = state_BGFE + fade * sums.state_BGFE
    if mass_BGF is None or sums.mass_BGF is None:
        return Sums(state_BGFE, None)
    return Sums(state_BGFE, mass_BGF + (fade if isinstance(fade, float) else fade[..., 0]) * sums.mass_BGF)


def normed(heads_BHTE: Tensor) -> Tensor:
    """Each head's output with mean 0 and variance 1 over its width: GroupNorm of H groups, without weights."""
    return torch.nn.functional.layer_norm(heads_BHTE, heads_BHTE.shape[-1:], eps=EPSILON)


def slopes(kind: Literal["slopes", "retnet"], groups: int) -> list[float]:
    """Natural logarithms of the decay of each key head.

    `slopes` are those of ALiBi (arXiv 2108.12409) as in SUPRA's code, for any number of heads; `retnet` is
    `gamma = 1 - 2^(-5-i)` (arXiv 2307.08621, eq. 8).
    """
    if kind == "slopes":
        return [-(2.0 ** (-8.0 * (head + 1) / groups)) for head in range(groups)]
    return [math.log1p(-(2.0 ** (-5 - head))) for head in range(groups)]


# --- tokens behind the window -----------------------------------------------------------------------------------------


def _powers(log_decay_G: Tensor, steps: Tensor) -> Tensor:
    """`gamma^steps`, (G, steps...)."""
    steps = steps.to(log_decay_G)
    return (log_decay_G.view(-1, *[1] * steps.dim()) * steps).exp()


def _read(phi_q_BH1F: Tensor, sums: Sums, weights: Weights) -> Part:
    """The sums as a query reads them whose window ends where they begin."""
    batch, heads, _, width = phi_q_BH1F.shape
    phi_BGXF = phi_q_BH1F.reshape(batch, sums.state_BGFE.shape[1], -1, width).to(sums.state_BGFE.dtype)
    if weights.log_decay_G is not None and weights.window:
        phi_BGXF = phi_BGXF * _powers(weights.log_decay_G, torch.tensor([weights.window]))[:, :, None]
    heads_BH1E = (phi_BGXF @ sums.state_BGFE).view(batch, heads, 1, -1)
    mass_BH1 = heads_BH1E[..., 0]
    if sums.mass_BGF is not None:
        mass_BH1 = (phi_BGXF @ sums.mass_BGF[..., None]).view(batch, heads, 1)
    return heads_BH1E.to(phi_q_BH1F.dtype), mass_BH1.to(phi_q_BH1F.dtype)


def _decayed(weights: Weights, steps_CC: Tensor, like: Tensor) -> Tensor:
    """The decay of a weight over these steps, (G or 1, C, C); 0 for steps into the future."""
    seen = (steps_CC >= 0).to(like)[None]
    if weights.log_decay_G is None:
        return seen.to(like.device)
    decayed = _powers(weights.log_decay_G, steps_CC.clamp_min(0)).to(like)
    return decayed * seen.to(decayed.device)


def _chunked(phi_q_BHTF: Tensor, late_BGSF: Tensor, v_BGSE: Tensor, weights: Weights, sums: Sums | None) -> Part:
    """Matrix products within chunks of CHUNK tokens, and the sums carried from one to the next."""
    heads, tokens = phi_q_BHTF.shape[1:3]
    groups, keys = late_BGSF.shape[1:3]
    chunk = min(CHUNK, keys)
    count = -(-keys // chunk)
    tail = count * chunk - keys
    phi_q_BHTF = pad(phi_q_BHTF, (0, 0, keys - tokens, tail))
    phi_BGNXF = _by_chunk(phi_q_BHTF, groups, chunk)  # X: the heads of a group, and a chunk's tokens
    late_BGNCF, v_BGNCE = (_chunks(each, chunk) for each in (late_BGSF, v_BGSE))
    place_C = torch.arange(chunk)
    decayed_GCC = _decayed(weights, place_C[:, None] - place_C, late_BGSF)
    b_BGNXC = phi_BGNXF @ late_BGNCF.mT
    b_BGNXC = _by_token(b_BGNXC, decayed_GCC[:, None, None])
    heads_BGNXE, mass_BGNX = b_BGNXC @ v_BGNCE, b_BGNXC.sum(-1)
    if count > 1 or sums is not None:
        decay = weights.log_decay_G
        if decay is not None:
            late_BGNCF = late_BGNCF * _powers(decay, chunk - 1 - place_C).to(late_BGNCF)[:, None, :, None]
            own_GC = _powers(decay, place_C + 1).to(phi_BGNXF)
            phi_BGNXF = _by_token(phi_BGNXF, own_GC[:, None, None, :, None])
        fade_G = None if decay is None else _powers(decay, torch.tensor(chunk))
        state_BGNFE = _carried(late_BGNCF.mT @ v_BGNCE, fade_G, None if sums is None else sums.state_BGFE)
        heads_BGNXE = heads_BGNXE + phi_BGNXF @ state_BGNFE
        if weights.normalised:
            mass_BGNF = _carried(late_BGNCF.sum(3), fade_G, None if sums is None else sums.mass_BGF)
            mass_BGNX = mass_BGNX + (phi_BGNXF @ mass_BGNF[..., None])[..., 0]
    return (
        _by_head(heads_BGNXE, heads, chunk)[:, :, keys - tokens : keys],
        _by_head(mass_BGNX[..., None], heads, chunk)[:, :, keys - tokens : keys, 0],
    )


def _chunks(rows_BGSE: Tensor, chunk: int) -> Tensor:
    """Rows in chunks, `(B, G, N, C, E)`; the last is padded with 0."""
    batch, groups, keys, width = rows_BGSE.shape
    count = -(-keys // chunk)
    return pad(rows_BGSE, (0, 0, 0, count * chunk - keys)).view(batch, groups, count, chunk, width)


def _by_token(rows_BGNXF: Tensor, factor: Tensor) -> Tensor:
    """Rows of chunks times a factor that heads of a group share, which broadcasts to `(G, 1, 1, C, F)`."""
    shape = rows_BGNXF.shape
    return (rows_BGNXF.view(*shape[:3], -1, factor.shape[-2], shape[-1]) * factor).view(shape)


def _by_chunk(rows_BHTF: Tensor, groups: int, chunk: int) -> Tensor:
    """Rows of heads as `(B, G, N, X, F)`: for each chunk the heads of a group side by side."""
    batch, heads, tokens, width = rows_BHTF.shape
    split = rows_BHTF.reshape(batch, groups, heads // groups, tokens // chunk, chunk, width)
    return split.transpose(2, 3).flatten(3, 4)


def _by_head(rows_BGNXE: Tensor, heads: int, chunk: int) -> Tensor:
    """The inverse of `_by_chunk`: `(B, H, T, E)`."""
    batch, groups, count, _, width = rows_BGNXE.shape
    split = rows_BGNXE.view(batch, groups, count, heads // groups, chunk, width)
    return split.transpose(2, 3).reshape(batch, heads, count * chunk, width)


def _carried(own_BGNX: Tensor, fade_G: Tensor | None, first_BGX: Tensor | None) -> Tensor:
    """The sums before each chunk: those of earlier chunks, faded by one chunk for each; in float32 on the way."""
    wide = torch.promote_types(own_BGNX.dtype, torch.float32)
    before_BGNX = own_BGNX[:, :, :-1].to(wide)
    start_BGX = own_BGNX[:, :, 0].to(wide) * 0 if first_BGX is None else first_BGX.to(wide)
    if fade_G is None:
        return torch.cat([start_BGX[:, :, None], before_BGNX], dim=2).cumsum(2).to(own_BGNX.dtype)
    fade = fade_G.to(wide).view(1, -1, *[1] * (own_BGNX.dim() - 3))
    found = [start_BGX]
    for number in range(before_BGNX.shape[2]):
        found.append(torch.addcmul(before_BGNX[:, :, number], found[-1], fade.expand_as(found[-1])))
    return torch.stack(found, dim=2).to(own_BGNX.dtype)


@cache
def kernels(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The chunked form of flash-linear-attention, if it is installed and the device is a GPU, else None."""
    if device.type != "cuda" or importlib.util.find_spec("fla") is None:
        return None
    return cast(Callable[..., tuple[Tensor, Tensor]], importlib.import_module("fla.ops.simple_gla").chunk_simple_gla)


def _by_kernels(phi_q_BHTF: Tensor, late_BGSF: Tensor, v_BGSE: Tensor, weights: Weights, sums: Sums | None) -> Part:
    """The same by those kernels. They take as many key heads as query heads; a value of 1 gives the sum of weights."""
    chunk = kernels(phi_q_BHTF.device)
    assert chunk is not None
    (heads, tokens), (groups, keys) = phi_q_BHTF.shape[1:3], late_BGSF.shape[1:3]
    values = pad(v_BGSE, (0, 1), value=1.0)

    def of_heads(rows_BG: Tensor) -> Tensor:
        return rows_BG.repeat_interleave(heads // groups, dim=1)

    state = None
    if sums is not None:
        mass_BGF = sums.state_BGFE[..., 0] * 0 if sums.mass_BGF is None else sums.mass_BGF
        state = of_heads(torch.cat([sums.state_BGFE, mass_BGF[..., None]], dim=-1)).float()
    decay_G = weights.log_decay_G
    both_BSHE, _ = chunk(
        pad(phi_q_BHTF, (0, 0, keys - tokens, 0)).transpose(1, 2).contiguous(),
        *(of_heads(each).transpose(1, 2).contiguous() for each in (late_BGSF, values)),
        g_gamma=None if decay_G is None else decay_G.float().repeat_interleave(heads // groups),
        scale=1.0,
        initial_state=state,
    )
    both_BHTE = both_BSHE[:, keys - tokens :].transpose(1, 2)
    return both_BHTE[..., :-1], both_BHTE[..., -1]


# --- the window and the sinks ----------------------------------------------------------------------------------------


def _weighed(z_BGNXS: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of logits, and `sum exp(z - max)` of each row: 1 over the largest probability."""
    if hidden is not None:
        z_BGNXS = z_BGNXS + hidden
    p_BGNXS = z_BGNXS.softmax(-1)
    return p_BGNXS, 1 / p_BGNXS.amax(-1)


def _hidden(seen: Tensor, like: Tensor) -> Tensor:
    """A bias of logits: very low for hidden keys, but finite, so that a row without visible keys stays finite."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~seen.to(like.device), torch.finfo(like.dtype).min / 2
    )


def _banded(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, window: int, past: Past) -> Part:
    """The window's part by chunks no shorter than it: a chunk sees itself, the one before, and the sinks."""
    sinks, free_BS = past.sinks, past.free_BS
    (heads, tokens), (groups, keys) = q_BHTE.shape[1:3], k_BGSE.shape[1:3]
    chunk = max(window, min(CHUNK, keys))
    count = -(-keys // chunk)
    tail = count * chunk - keys
    q_BGNXE = _by_chunk(pad(q_BHTE, (0, 0, keys - tokens, tail)), groups, chunk)
    rows = heads // groups
    k_BGNKE, v_BGNKE = (_with_before(each, chunk) for each in (k_BGSE, v_BGSE))
    place_C, other_K = torch.arange(chunk), torch.arange(-chunk, chunk)
    step_CK = place_C[:, None] - other_K
    start_N = torch.arange(count)[:, None, None] * chunk
    seen = ((step_CK >= 0) & (step_CK < window) & (start_N + other_K >= 0))[None].to(q_BHTE.device)
    if free_BS is not None:
        seen = seen & _with_before(free_BS[:, None, :, None], chunk)[:, 0, :, None, :, 0]
    z_BGNXK = q_BGNXE @ k_BGNKE.mT
    if sinks is not None:
        z_BGNXK = torch.cat([q_BGNXE @ sinks.k_BGNE[:, :, None].to(q_BGNXE.dtype).mT, z_BGNXK], dim=-1)
        there = sinks.at_BN[:, None, None] <= (start_N + place_C[:, None]).to(sinks.at_BN.device)
        seen = torch.cat([there, seen.expand(len(there), -1, -1, -1)], dim=-1)
    # (1 or B, 1, N, 1, C, K): a group's heads see alike
    hidden = _hidden(seen, q_BHTE)[:, None, :, None].expand(-1, -1, -1, rows, -1, -1).flatten(3, 4)
    p_BGNXK, share_BGNX = _weighed(z_BGNXK, hidden)
    if sinks is None:
        near_BGNXE = p_BGNXK @ v_BGNKE
    else:
        first = sinks.k_BGNE.shape[2]
        near_BGNXE = p_BGNXK[..., first:] @ v_BGNKE
        near_BGNXE = near_BGNXE + p_BGNXK[..., :first] @ sinks.v_BGNE[:, :, None].to(p_BGNXK.dtype)
    own = slice(keys - tokens, keys)
    return (
        _by_head(near_BGNXE, heads, chunk)[:, :, own],
        _by_head(share_BGNX[..., None], heads, chunk)[:, :, own, 0],
    )


def _with_before(rows_BGSE: Tensor, chunk: int) -> Tensor:
    """Chunks with the one before each in front, `(B, G, N, 2 C, E)`."""
    own_BGNCE = _chunks(rows_BGSE, chunk)
    before_BGNCE = torch.cat([torch.zeros_like(own_BGNCE[:, :, :1]), own_BGNCE[:, :, :-1]], dim=2)
    return torch.cat([before_BGNCE, own_BGNCE], dim=3)


def _one_row(q_BH1E: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, window: int, past: Past) -> Part:
    """The window's part of the last query."""
    sinks, free_BS = past.sinks, past.free_BS
    (batch, heads, _, width), (groups, keys) = q_BH1E.shape, k_BGSE.shape[1:3]
    q_BGRE = q_BH1E.reshape(batch, groups, -1, width)
    z_BGRS = q_BGRE @ k_BGSE.mT
    hidden = None
    if keys > window or free_BS is not None or sinks is not None:
        seen_BS = (torch.arange(keys - 1, -1, -1, device=q_BH1E.device) < window)[None]
        if free_BS is not None:
            seen_BS = seen_BS & free_BS.to(seen_BS.device)
        if sinks is not None:
            z_BGRS = torch.cat([q_BGRE @ sinks.k_BGNE.to(q_BGRE.dtype).mT, z_BGRS], dim=-1)
            there_BN = (sinks.at_BN < keys).to(seen_BS.device)
            seen_BS = torch.cat([there_BN, seen_BS.expand(len(there_BN), -1)], dim=-1)
        hidden = _hidden(seen_BS, q_BH1E)[:, None, None]
    p_BGRS, share_BGR = _weighed(z_BGRS, hidden)
    near_BGRE = p_BGRS[..., -keys:] @ v_BGSE
    if sinks is not None:
        near_BGRE = near_BGRE + p_BGRS[..., :-keys] @ sinks.v_BGNE.to(p_BGRS.dtype)
    return near_BGRE.view(batch, heads, 1, -1), share_BGR.view(batch, heads, 1)
