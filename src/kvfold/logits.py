"""The least squares of a student's queries against its teacher's logits, in the metric of the teacher's attention.

For query t of a head the error over the keys is `e_s = q'_t . k'_s - l_ts`, and its price `Var_{s ~ p_t}(e)`: the
second-order term of the KL divergence between the two attentions (Amari 1998; the Fisher metric of a softmax). A logit
that attention ignores costs nothing, nor does one constant for all keys. With `q'_t = R_t W x_t` the sum over t is a
quadratic form in W of as many unknowns as W has numbers; its normal equations

    sum_t R_t^T C_t R_t W x_t x_t^T = sum_t R_t^T b_t x_t^T     C, b: covariances by p_t, of k' with k', of k' with l

are never written out: conjugate gradients apply them in sweeps over the text, preconditioned by `E[x x^T]` on one side
and the keys' power on the other. Where q is normed before it is rotated, they are those of one Gauss-Newton step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvfold import hf
from kvfold.linalg import LEAST, conjugate_gradients, damped_inverse
from kvfold.rope import pairs, rotate
from kvfold.shape import Attention
from kvfold.spool import Spool, check_room, spool_bytes


class LogitFit:
    """What both attentions did with the same rows, and the solution put into the student's q.

    A context manager: rotated queries and keys wait on disk. Raises OutputError when there is no room for them.
    """

    def __init__(self, teacher: Attention, student: Attention, q: Any, q_norm: Any, lengths: Sequence[int]) -> None:
        self.teacher, self.student = teacher, student
        self.linear, self.norm = q, q_norm
        wide = self.teacher.num_attention_heads * self.teacher.head_dim
        widths = (wide, self.teacher.num_key_value_heads * self.teacher.head_dim, self.student.hidden_size)
        narrow = self.student.num_key_value_heads * self.student.head_dim
        check_room(sum(spool_bytes(sum(lengths), width) for width in (*widths, narrow)))
        self._stack = ExitStack()
        self.queries, self.keys, self.inputs, self.shared = (
            self._stack.enter_context(Spool(lengths, width)) for width in (*widths, narrow)
        )
        self.gram_DD = torch.zeros(self.student.hidden_size, self.student.hidden_size, dtype=torch.float64)
        self.spreads_HE = torch.zeros(self.student.num_attention_heads, self.student.head_dim, dtype=torch.float64)
        self.powers_G = torch.zeros(self.student.num_key_value_heads, dtype=torch.float64)
        self.tokens = 0
        self.seen: hf.Attended | None = None

    def __enter__(self) -> LogitFit:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, row: int, taught: hf.Attended, learnt: hf.Attended) -> None:
        """Keep what both attentions did with the same rows."""
        for spool, heads in (
            (self.queries, taught.query_BHTE),
            (self.keys, taught.key_BGSE),
            (self.shared, learnt.key_BGSE),
        ):
            spool.write(row, heads.transpose(1, 2).flatten(2))
        self.inputs.write(row, learnt.input_BTD)
        x_ND = learnt.input_BTD.flatten(0, 1)
        self.gram_DD += (x_ND.T @ x_ND).cpu()
        self.tokens += len(x_ND)
        self.seen, self.scales = learnt, (taught.scale, learnt.scale)
        attention_BHTS = self._attention(self.scales[0] * _meet(taught.query_BHTE, taught.key_BGSE))
        mean_BHTE = _look(attention_BHTS, learnt.key_BGSE)
        spread_BHTE = _look(attention_BHTS, learnt.key_BGSE.square()) - mean_BHTE.square()
        self.powers_G += learnt.key_BGSE.double().square().mean(-1).sum((0, 2)).cpu()
        self.spreads_HE += spread_BHTE.clamp_min(0).double().sum((0, 2)).cpu()

    def solve(self, *, steps: int, damping: float, batch: int) -> None:
        """Change the student's q by `steps` of conjugate gradients over `batch` rows at a time."""
        heads, width = self.student.num_attention_heads, self.student.head_dim
        weight_HED = self.linear.weight.double().cpu().view(heads, width, -1)
        gram_DD, spread_HE1 = self.gram_DD / self.tokens, self._spread() / self.tokens
        inverse_DD = damped_inverse(gram_DD, damping)
        floor_H11 = damping * spread_HE1.mean(1, keepdim=True).clamp_min(LEAST)  # a head may look at one key alone
        # by the keys' whole power: where attention is so sharp that logits hardly matter, q is to stay as it is
        power_H11 = (self.powers_G / self.tokens).repeat_interleave(self.student.query_group)[:, None, None]
        stiff = damping**2 * gram_DD.diagonal().mean() * power_H11 * self.scales[1] ** 2

        def apply(change_HED: Tensor) -> Tensor:
            return self._sweep(batch, change_HED) + stiff * change_HED

        change_HED = conjugate_gradients(
            apply,
            self._sweep(batch, None),
            precondition=lambda r_HED: r_HED / (spread_HE1 + floor_H11) @ inverse_DD,
            steps=steps,
        )
        self.linear.weight.copy_((weight_HED + change_HED).flatten(0, 1))

    def _spread(self) -> Tensor:
        """What each coordinate of a query is worth: the keys' variance under its attention, alike within a plane."""
        spread_HE = self.spreads_HE.clone()
        if self.student.rope:
            real, imaginary = pairs(self.student.rope)
            spread_HE[:, real] = spread_HE[:, imaginary] = (spread_HE[:, real] + spread_HE[:, imaginary]) / 2
        return spread_HE[..., None]

    def _sweep(self, batch: int, change_HED: Tensor | None) -> Tensor:
        """One pass: the normal equations' left side at a change of W_q, or their right side, per token."""
        heads, width = self.student.num_attention_heads, self.student.head_dim
        total_HED = torch.zeros(heads, width, self.student.hidden_size, dtype=torch.float64)
        for row in range(0, len(self.inputs), batch):
            count = min(batch, len(self.inputs) - row)
            total_HED += self._rows(row, count, change_HED)
        return total_HED / self.tokens

    def _rows(self, row: int, count: int, change_HED: Tensor | None) -> Tensor:
        assert self.seen is not None
        device, width = self.linear.weight.device, self.student.head_dim
        x_BTD = self.inputs.read(row, count).to(device)
        query_BHTE, key_BGSE, shared_BGSE = (
            _heads(spool.read(row, count).to(device), width) for spool in (self.queries, self.keys, self.shared)
        )
        logits_BHTS = _meet(self.scales[0] * query_BHTE, key_BGSE)
        attention_BHTS = self._attention(logits_BHTS)
        own_BHTE = _heads(self.linear(x_BTD), width)
        turn = _Turn(self.seen, self.norm, own_BHTE)
        if change_HED is None:
            error_BHTS = logits_BHTS.sub_(_meet(self.scales[1] * turn.whole(own_BHTE), shared_BGSE))
        else:
            change_BHTE = torch.einsum("btd,hed->bhte", x_BTD, change_HED.to(x_BTD))
            error_BHTS = _meet(self.scales[1] * turn.change(change_BHTE), shared_BGSE)
        # the covariance of error and key under the attention: the mean of the products, less the product of the means
        weighed_BHTS = error_BHTS.mul_(attention_BHTS)
        means_BHTE = weighed_BHTS.sum(-1, keepdim=True) * _look(attention_BHTS, shared_BGSE)
        pulled_BHTE = self.scales[1] * (_look(weighed_BHTS, shared_BGSE) - means_BHTE)
        return torch.einsum("bhte,btd->hed", turn.back(pulled_BHTE), x_BTD).cpu().double()

    def _attention(self, logits_BHTS: Tensor) -> Tensor:
        """The teacher's attention: 0 where a query may not look, so that an error there costs nothing."""
        assert self.seen is not None
        visible = self.seen.mask
        if visible is None:
            length = logits_BHTS.shape[-1]
            visible = torch.ones(length, length, dtype=torch.bool, device=logits_BHTS.device).tril()[None, None]
        return logits_BHTS.masked_fill(~visible[:1].to(logits_BHTS.device), -torch.inf).softmax(-1)


def _meet(query_BHTE: Tensor, key_BGSE: Tensor) -> Tensor:
    """Inner products `(B, H, T, S)` of query heads with the key head of their group."""
    group = query_BHTE.shape[1] // key_BGSE.shape[1]
    batch, heads, tokens, width = query_BHTE.shape
    rows_BGNE = query_BHTE.reshape(batch, -1, group * tokens, width)
    return (rows_BGNE @ key_BGSE.mT).view(batch, heads, tokens, -1)


def _look(weights_BHTS: Tensor, key_BGSE: Tensor) -> Tensor:
    """Weighted sums `(B, H, T, E)` of the keys of each query head's group."""
    batch, heads, tokens, keys = weights_BHTS.shape
    rows_BGNS = weights_BHTS.reshape(batch, key_BGSE.shape[1], -1, keys)
    return (rows_BGNS @ key_BGSE).view(batch, heads, tokens, -1)


def _heads(rows_BTN: Tensor, width: int) -> Tensor:
    """Heads side by side -> `(B, H, T, E)`."""
    return rows_BTN.view(*rows_BTN.shape[:2], -1, width).transpose(1, 2)


class _Turn:
    """From what `q` puts out to what meets the keys: the norm, where there is one, and the rotation."""

    def __init__(self, seen: hf.Attended, norm: Any, own_BHTE: Tensor) -> None:
        self.rotation = None if seen.cos_TE is None or seen.sin_TE is None else (seen.cos_TE, seen.sin_TE)
        self.norm = norm
        if norm is not None:
            self.length_BHT1 = own_BHTE.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            self.unit_BHTE = own_BHTE / self.length_BHT1

    def whole(self, own_BHTE: Tensor) -> Tensor:
        """All of it."""
        return self._rotate(own_BHTE if self.norm is None else self.norm(own_BHTE))

    def change(self, change_BHTE: Tensor) -> Tensor:
        """Its derivative in the direction of a change."""
        return self._rotate(change_BHTE if self.norm is None else self._normed(change_BHTE) * self.norm.weight)

    def back(self, pulled_BHTE: Tensor) -> Tensor:
        """The transpose of `change`."""
        turned = pulled_BHTE if self.rotation is None else rotate(pulled_BHTE, self.rotation[0], -self.rotation[1])
        return turned if self.norm is None else self._normed(turned * self.norm.weight)

    def _rotate(self, heads_BHTE: Tensor) -> Tensor:
        return heads_BHTE if self.rotation is None else rotate(heads_BHTE, *self.rotation)

    def _normed(self, change_BHTE: Tensor) -> Tensor:
        """The derivative of `u / rms(u)`, which is its own transpose."""
        along = (change_BHTE * self.unit_BHTE).mean(-1, keepdim=True)
        return (change_BHTE - self.unit_BHTE * along) / self.length_BHT1
