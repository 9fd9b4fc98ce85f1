"""The least squares of a student's queries against its teacher's logits, in the metric of the teacher's attention.

The error of query t of a head over the keys is `e_s = q'_t . k'_s - l_ts`, and its cost is `Var_{s ~ p_t}(e)`: the
second-order term of the KL divergence between the two attentions (Amari 1998; the Fisher metric of a softmax). A logit
that attention ignores costs nothing, and neither does a constant for all keys. With `q'_t = R_t W x_t` the sum over t
is a quadratic form in W. Its normal equations

    sum_t R_t^T C_t R_t W x_t x_t^T = sum_t R_t^T b_t x_t^T     C, b: covariances by p_t, of k' with k', of k' with l

are never written out: conjugate gradients apply them in sweeps over the text, preconditioned by `E[x x^T]` on one side
and `E[R^T C R]` on the other. The teacher's attention is computed once and kept on disk. If q is normed before
it is rotated, this is one Gauss-Newton step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvfold import hf, ranks
from kvfold.attention.grouped import masked_softmax
from kvfold.contracts.site import Attention, Rope
from kvfold.disk.spool import Spool, check_room, spool_bytes
from kvfold.machine import summed
from kvfold.solve.linalg import conjugate_gradients, damped_inverse
from kvfold.solve.rope import rotate

SAMPLED_ROWS, SAMPLED_TOKENS = 8, 16  # tokens of each row: where the coordinates of queries are weighed
BLOCKS = 4  # of queries: under a causal mask, each meets the keys up to its own end, and not those after it


class LogitFit(ExitStack):
    """Both attentions on the same rows, on disk (`H * T` numbers per token), and the solution for the student's q.

    A context manager. Raises OutputError if the disk has no room.
    """

    def __init__(
        self,
        teacher: Attention,
        student: Attention,
        q: Any,
        q_norm: Any,
        lengths: Sequence[int],
        keys: Sequence[int] | None = None,
        *,
        causal: bool = True,
    ) -> None:
        """Rows have `lengths` tokens, and `keys` that they look at; None: themselves, and those before them."""
        super().__init__()
        self.student, self.linear, self.norm, self.causal = student, q, q_norm, causal
        heads, width, hidden = student.num_attention_heads, student.head_dim, student.hidden_size
        looked = lengths if keys is None else keys
        logits = [tokens * others for tokens, others in zip(lengths, looked, strict=True)]
        sizes = [(lengths, hidden), (looked, student.num_key_value_heads * width), (lengths, heads * width)]
        sizes.append((logits, heads))
        check_room(sum(spool_bytes(sum(rows), each) for rows, each in sizes))
        device = q.weight.device
        self.inputs, self.keys, self.means, self.attention = (
            self.enter_context(Spool(rows, each, device=device)) for rows, each in sizes
        )
        self.gram_DD, self.missing_HED, self.powers_G = (
            torch.zeros(size, dtype=torch.float64, device=device)
            for size in ((hidden, hidden), (heads, width, hidden), (student.num_key_value_heads,))
        )
        self.tokens = 0
        self.seen: hf.Attended | None = None  # one of the longest rows: shorter ones rotate as its beginning does

    def add(
        self,
        row: int,
        teacher: hf.Attended,
        student: hf.Attended,
        queries: Sequence[int] | None = None,
        *,
        batch: int | None = None,
    ) -> None:
        """Add both attentions on the rows from `row` on, `batch` rows at a time.

        `queries` are the teacher's heads in the student's order.
        """
        rows, tokens = student.input_BTD.shape[:2]
        batch = batch or rows
        if self.seen is None or tokens > self.seen.input_BTD.shape[1]:
            self.seen = student

        def seen(at: int) -> Sequence[Tensor]:
            return self._seen(row + at, teacher.rows(at, batch), student.rows(at, batch), queries)

        gram_DD, missing_HED, powers_G = summed(seen, range(0, rows, batch))
        self.gram_DD += gram_DD
        self.missing_HED += missing_HED
        self.powers_G += powers_G
        self.tokens += rows * tokens

    def _seen(
        self, row: int, teacher: hf.Attended, student: hf.Attended, queries: Sequence[int] | None
    ) -> Sequence[Tensor]:
        """Store a batch. Its sums: inputs' second moment, the right side of the normal equations, power of the keys."""
        x_BTD, key_BGSE = student.input_BTD, student.key_BGSE
        logits_BHTS = _meet(teacher.scale * teacher.query_BHTE, teacher.key_BGSE)
        if queries is not None:
            logits_BHTS = logits_BHTS[:, queries]
        sinks_H = teacher.sinks_H
        if sinks_H is not None and queries is not None:
            sinks_H = sinks_H[queries]
        bias_1HTS = teacher.bias_1HTS
        if bias_1HTS is not None and queries is not None:
            bias_1HTS = bias_1HTS[:, queries]
        shown_BHTS = logits_BHTS if bias_1HTS is None else logits_BHTS + bias_1HTS
        attention_BHTS = _attention(shown_BHTS, student.mask, teacher.softcap, sinks_H, causal=self.causal)
        mean_BHTE = _look(attention_BHTS, key_BGSE)
        self.inputs.write(row, x_BTD)
        self.keys.write(row, _rows(key_BGSE))
        self.means.write(row, _rows(mean_BHTE))
        # as it lies in memory, not by token
        self.attention.write(row, attention_BHTS.reshape(len(x_BTD), -1, attention_BHTS.shape[1]))
        own_BHTE = _heads(self.linear(x_BTD), self.student.head_dim)
        turn = Turn(student, self.student.rope, self.norm, own_BHTE)
        query_BHTE = self.student.logit_scale * turn.whole(own_BHTE)
        products_BHTE = _covariances(attention_BHTS, mean_BHTE, key_BGSE, query_BHTE, logits_BHTS, causal=self.causal)
        gram_DD = (x_BTD.flatten(0, 1).T @ x_BTD.flatten(0, 1)).double()
        return gram_DD, self._pull(products_BHTE, turn, x_BTD), key_BGSE.double().square().mean(-1).sum((0, 2))

    def solve(
        self,
        *,
        steps: int,
        damping: float,
        batches: Sequence[tuple[int, int]],
        sampled: Sequence[int],
        tolerance: float = 0.0,
    ) -> None:
        """Add the change of at most `steps` conjugate gradients to the student's q.

        `batches` are rows of the same lengths that are read together, as (first row, number of rows), and `sampled` the
        rows on which coordinates of queries are weighed.
        """
        heads, width = self.student.num_attention_heads, self.student.head_dim
        weight_HED = self.linear.weight.double().view(heads, width, -1)
        self.tokens = sum(ranks.gather_in_order(self.tokens))
        rows, spread_HEE = sum(ranks.gather_in_order(len(sampled))), self._spread(sampled)
        for total in (self.gram_DD, self.missing_HED, self.powers_G, spread_HEE):
            ranks.sum_to_main(total)

        def solve(sweep: Callable[[Tensor], Tensor]) -> Tensor:
            gram_DD = self.gram_DD / self.tokens
            inverse_DD = damped_inverse(gram_DD, damping)
            inverse_HEE = damped_inverse(spread_HEE / rows, damping)
            # scaled by the power of the keys: if attention is so sharp that logits hardly matter, q stays as it is
            power_H11 = (self.powers_G / self.tokens).repeat_interleave(self.student.query_group)[:, None, None]
            stiff = damping**2 * gram_DD.diagonal().mean() * power_H11 * self.student.logit_scale**2
            return conjugate_gradients(
                lambda change_HED: sweep(change_HED) + stiff * change_HED,
                self.missing_HED / self.tokens,
                precondition=lambda r_HED: inverse_HEE @ r_HED @ inverse_DD,
                steps=steps,
                tolerance=tolerance,
            )

        change_HED = ranks.solved(solve, lambda change_HED: self._sweep(batches, change_HED), self.missing_HED)
        self.linear.weight.copy_((weight_HED + change_HED).flatten(0, 1))

    def _spread(self, rows: Sequence[int]) -> Tensor:
        """The weight `R^T C R` of the coordinates of a query, its mean over tokens of each row, summed: HEE."""
        group, width = self.student.query_group, self.student.head_dim
        total_HEE = self.missing_HED.new_zeros(len(self.missing_HED), width, width)
        for row in rows:
            key_BHSE = _heads(self.keys.read(row), width).repeat_interleave(group, dim=1)
            tokens = self.inputs.lengths[row]
            at_Q = torch.arange(tokens - 1, -1, -max(1, tokens // SAMPLED_TOKENS), device=key_BHSE.device)
            attention_HTS = self.attention.read(row).view(len(total_HEE), tokens, -1)
            attention_QHS = attention_HTS[:, at_Q].transpose(0, 1)
            turned_QHSE = self._back(key_BHSE, at_Q)
            mean_QHE = (attention_QHS[:, :, None] @ turned_QHSE)[:, :, 0]
            centred_QHSE = (turned_QHSE - mean_QHE[:, :, None]) * attention_QHS.sqrt()[..., None]
            rows_HNE = centred_QHSE.transpose(0, 1).flatten(1, 2).double()  # a product of them is semidefinite
            total_HEE += rows_HNE.mT @ rows_HNE / len(at_Q)
        return self.student.logit_scale**2 * total_HEE

    def _back(self, key_BHSE: Tensor, at_Q: Tensor) -> Tensor:
        """Keys as the queries at some positions meet them before their rotation, `(Q, H, S, E)`."""
        assert self.seen is not None
        rope, cos_TE, sin_TE = self.student.rope, self.seen.cos_TE, self.seen.sin_TE
        key_QHSE = key_BHSE.expand(len(at_Q), -1, -1, -1)
        if rope is None or cos_TE is None or sin_TE is None:
            return key_QHSE
        cos_QH1E, sin_QH1E = (
            each[..., at_Q, :].view(-1, len(at_Q), 1, each.shape[-1]).transpose(0, 1) for each in (cos_TE, sin_TE)
        )
        return rotate(key_QHSE, cos_QH1E, -sin_QH1E, half_split=rope.half_split)

    def _sweep(self, batches: Sequence[tuple[int, int]], change_HED: Tensor) -> Tensor:
        """One pass over the text: the left side of the normal equations at a change of W_q, per token.

        Rank 0 has that of all rows.
        """
        change_DN = change_HED.flatten(0, 1).T.to(self.linear.weight)
        found = summed(lambda batch: [self._change(*batch, change_DN)], batches)
        return ranks.sum_to_main(found[0] if found else torch.zeros_like(change_HED)) / self.tokens

    def _change(self, row: int, count: int, change_DN: Tensor) -> Tensor:
        width = self.student.head_dim
        x_BTD, keys, means, attention = (
            spool.read(row, count) for spool in (self.inputs, self.keys, self.means, self.attention)
        )
        key_BGSE, mean_BHTE = _heads(keys, width), _heads(means, width)
        attention_BHTS = attention.view(count, -1, x_BTD.shape[1], keys.shape[1])
        # without a norm, the derivative does not depend on the output of q
        assert self.seen is not None
        turn = Turn(self.seen, self.student.rope, self.norm, _heads(self.linear(x_BTD), width) if self.norm else None)
        moved_BHTE = turn.change(_heads(x_BTD @ change_DN, width))
        moved_BHTE = self.student.logit_scale * moved_BHTE
        products_BHTE = _covariances(attention_BHTS, mean_BHTE, key_BGSE, moved_BHTE, causal=self.causal)
        return self._pull(products_BHTE, turn, x_BTD)

    def _pull(self, products_BHTE: Tensor, turn: Turn, x_BTD: Tensor) -> Tensor:
        """The gradient by W_q of a gradient by the queries."""
        pulled_BTN = _rows(turn.back(self.student.logit_scale * products_BHTE))
        change_ND = pulled_BTN.flatten(0, 1).T @ x_BTD.flatten(0, 1)
        return change_ND.double().view_as(self.missing_HED)


def _covariances(
    attention_BHTS: Tensor,
    mean_BHTE: Tensor,
    key_BGSE: Tensor,
    query_BHTE: Tensor,
    wanted_BHTS: Tensor | None = None,
    *,
    causal: bool,
) -> Tensor:
    """Covariances `(B, H, T, E)`, under the attention, of the keys with the logits of queries, or with their error."""
    products = []
    for start, end in _blocks(query_BHTE.shape[2]):
        last = end if causal else key_BGSE.shape[2]
        seen_BGSE = key_BGSE[:, :, :last]
        error_BHQS = _meet(query_BHTE[:, :, start:end], seen_BGSE)
        if wanted_BHTS is not None:
            error_BHQS = wanted_BHTS[:, :, start:end, :last] - error_BHQS
        weighed_BHQS = error_BHQS.mul_(attention_BHTS[:, :, start:end, :last])
        # the mean of the products, less the product of the means
        mean_error_BHQ1 = weighed_BHQS.sum(-1, keepdim=True)
        products.append(_look(weighed_BHQS, seen_BGSE) - mean_error_BHQ1 * mean_BHTE[:, :, start:end])
    return torch.cat(products, dim=2)


def _attention(
    logits_BHTS: Tensor, visible: Tensor | None, softcap: float | None, sinks_H: Tensor | None, *, causal: bool
) -> Tensor:
    """The teacher's attention. It is 0 at masked keys, so that an error there costs nothing.

    A sink takes a part of it. As a key without error, it makes an error that all others share cost something.
    """
    if softcap is not None:
        logits_BHTS = softcap * torch.tanh(logits_BHTS / softcap)
    if visible is None:
        visible = torch.ones(logits_BHTS.shape[2:], dtype=torch.bool, device=logits_BHTS.device)[None, None]
        visible = visible.tril() if causal else visible
    return masked_softmax(logits_BHTS, visible[:1].to(logits_BHTS.device), sinks_H=sinks_H)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Blocks of queries as (first, end)."""
    size = -(-tokens // BLOCKS)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


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


def _rows(heads_BHTE: Tensor) -> Tensor:
    """`(B, H, T, E)` as `(B, T, H E)`."""
    return heads_BHTE.transpose(1, 2).flatten(2)


def _heads(rows_BTN: Tensor, width: int) -> Tensor:
    """`(B, T, H E)` as `(B, H, T, E)`."""
    return rows_BTN.view(*rows_BTN.shape[:2], -1, width).transpose(1, 2)


class Turn:
    """From the output of q to the queries that meet the keys: the norm, if there is one, and the rotation."""

    def __init__(self, seen: hf.Attended, rope: Rope | None, norm: Any, own_BHTE: Tensor | None) -> None:
        self.rope, self.cos_TE, self.sin_TE = rope, seen.cos_TE, seen.sin_TE
        self.norm = norm
        if norm is not None:
            assert own_BHTE is not None
            wide, width = norm.weight.numel(), own_BHTE.shape[-1]
            self.over = (-1,) if wide == width else (1, -1)  # one head, or all
            self.weight_E = norm.weight if wide == width else norm.weight.view(-1, 1, width)
            self.length_BHT1 = own_BHTE.square().mean(self.over, keepdim=True).sqrt().clamp_min(1e-12)
            self.unit_BHTE = own_BHTE / self.length_BHT1

    def whole(self, own_BHTE: Tensor) -> Tensor:
        """The queries of an output."""
        if self.norm is None:
            return self._rotate(own_BHTE)
        rows = own_BHTE if self.over == (-1,) else _rows(own_BHTE)
        normed = self.norm(rows)
        return self._rotate(normed if rows is own_BHTE else _heads(normed, own_BHTE.shape[-1]))

    def change(self, change_BHTE: Tensor) -> Tensor:
        """The derivative in the direction of a change."""
        return self._rotate(change_BHTE if self.norm is None else self._normed(change_BHTE) * self.weight_E)

    def back(self, pulled_BHTE: Tensor) -> Tensor:
        """The transpose of `change`."""
        turned = self._rotate(pulled_BHTE, back=True)
        return turned if self.norm is None else self._normed(turned * self.weight_E)

    def _rotate(self, heads_BHTE: Tensor, *, back: bool = False) -> Tensor:
        if self.rope is None or self.cos_TE is None or self.sin_TE is None:
            return heads_BHTE
        cos_TE, sin_TE = (each[..., : heads_BHTE.shape[2], :] for each in (self.cos_TE, self.sin_TE))
        return rotate(heads_BHTE, cos_TE, -sin_TE if back else sin_TE, half_split=self.rope.half_split)

    def _normed(self, change_BHTE: Tensor) -> Tensor:
        """The derivative of `u / rms(u)`, which is its own transpose."""
        along = (change_BHTE * self.unit_BHTE).mean(self.over, keepdim=True)
        return (change_BHTE - self.unit_BHTE * along) / self.length_BHT1
