"""One latent for the unrotated keys and the values of all heads, in closed form, on second moments alone.

    min_{A, U_k, U_v}  E |M_k^1/2 (K x - U_k A x)|^2 + E |M_v^1/2 (V y - U_v A y)|^2

`A` (R, D) makes the latent; `U_k` and `U_v` make keys and values of it. x is the input of the keys, y the input of the
values averaged by attention. The metrics M are the costs of errors: of keys in logits, of values behind `o`. If x and y
have the same moments C, the optimum is the SVD of `[M_k^1/2 K; M_v^1/2 V] C^1/2` (whitened; C = 1 is the plain SVD of
weights, as EliteKV publishes it). If they differ, A and (U_k, U_v) are solved for in turn: each is a least-squares
problem, and that of A a Sylvester equation with two terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.solve.linalg import psd_roots

ROUNDS = 8  # of alternation; each gains less than the one before
NOTHING = 1e-12  # of the whole power: a loss that no round can reduce
RIDGE = 1e-9  # of the mean diagonal: added to matrices that may be singular


@dataclass(frozen=True)
class Block:
    """Maps `rows_ND` of an input with second moments `gram_DD`; errors have the metric `root_NN^T root_NN`."""

    rows_ND: Tensor
    root_NN: Tensor
    gram_DD: Tensor

    def power(self) -> float:
        """E |root rows x|^2: the most that can be lost."""
        return _power(self.root_NN @ self.rows_ND, self.gram_DD)

    def loss(self, down_RD: Tensor, up_NR: Tensor) -> float:
        """E |root (rows - up down) x|^2."""
        return _power(self.root_NN @ (self.rows_ND - up_NR @ down_RD), self.gram_DD)


def joint(blocks: Sequence[Block], rank: int) -> tuple[Tensor, list[Tensor]]:
    """The latent map `down_RD` for all blocks, and the map from the latent to each block, `up_NR`.

    Exact if `rank` is at least the number of rows or the width of the input.
    """
    rows = sum(len(block.rows_ND) for block in blocks)
    width = blocks[0].rows_ND.shape[1]
    if rank >= min(rows, width):
        return _exact(blocks, rank, rows, width)
    down_RD = _principal(blocks, rank)
    ups = [read_off(block, down_RD) for block in blocks]
    if all(block.gram_DD is blocks[0].gram_DD for block in blocks):
        return down_RD, ups
    best, found = _loss(blocks, down_RD, ups), (down_RD, ups)
    if best <= NOTHING * sum(block.power() for block in blocks):
        return found
    for _ in range(ROUNDS):
        down_RD = _white(_down(blocks, ups), blocks[0].gram_DD)
        ups = [read_off(block, down_RD) for block in blocks]
        now = _loss(blocks, down_RD, ups)
        if now >= best:
            break
        best, found = now, (down_RD, ups)
    return found


def separate(blocks: Sequence[Block], rank: int) -> tuple[Tensor, list[Tensor]]:
    """One latent for each block, side by side (S-LRD): directions go to the block where their loss costs most."""
    rows, width = sum(len(block.rows_ND) for block in blocks), blocks[0].rows_ND.shape[1]
    if rank >= rows:
        return _exact(blocks, rank, rows, width)
    ends = torch.cat([spectrum([block])[: len(block.rows_ND)] for block in blocks])
    owner = torch.cat([torch.full((len(block.rows_ND[:width]),), n) for n, block in enumerate(blocks)])
    taken = owner[ends.argsort(descending=True, stable=True)[:rank]]
    ranks = [int((taken == number).sum()) for number in range(len(blocks))]
    downs = [_principal([block], each) for block, each in zip(blocks, ranks, strict=True)]
    ups, before = [], 0
    for block, down_RD in zip(blocks, downs, strict=True):
        up_NR = torch.zeros(len(block.rows_ND), rank, dtype=torch.float64)
        up_NR[:, before : before + len(down_RD)] = read_off(block, down_RD)
        ups.append(up_NR)
        before += len(down_RD)
    return torch.cat(downs), ups


def _exact(blocks: Sequence[Block], rank: int, rows: int, width: int) -> tuple[Tensor, list[Tensor]]:
    """All rows as they are, or all of the input, whichever is less; the rest of the latent is 0."""
    stacked_ND = torch.cat([block.rows_ND for block in blocks])
    if rows <= width:
        down_RD, up_NR = stacked_ND, torch.eye(rows, dtype=torch.float64)
    else:
        down_RD, up_NR = torch.eye(width, dtype=torch.float64), stacked_ND
    more = rank - len(down_RD)
    down_RD = torch.cat([down_RD, down_RD.new_zeros(more, width)])
    up_NR = torch.cat([up_NR, up_NR.new_zeros(rows, more)], dim=1)
    return down_RD, list(torch.split(up_NR, [len(block.rows_ND) for block in blocks]))


def spectrum(blocks: Sequence[Block]) -> Tensor:
    """The power of each direction of the blocks' outputs on inputs of their mean moments, descending, `(D,)`."""
    root_DD, _ = psd_roots(torch.stack([block.gram_DD for block in blocks]).mean(0))
    weighted_ND = torch.cat([block.root_NN @ block.rows_ND for block in blocks]) @ root_DD
    values_D: Tensor = torch.linalg.eigvalsh(weighted_ND.T @ weighted_ND).flip(0)
    return values_D.clamp_min(0)


def _principal(blocks: Sequence[Block], rank: int) -> Tensor:
    """The leading directions of the blocks' outputs on inputs of their mean moments, at unit variance."""
    root_DD, inverse_DD = psd_roots(torch.stack([block.gram_DD for block in blocks]).mean(0))
    weighted_ND = torch.cat([block.root_NN @ block.rows_ND for block in blocks]) @ root_DD
    _, vectors_DD = torch.linalg.eigh(weighted_ND.T @ weighted_ND)
    down_RD: Tensor = vectors_DD[:, vectors_DD.shape[1] - rank :].flip(1).T @ inverse_DD
    return down_RD


def read_off(block: Block, down_RD: Tensor) -> Tensor:
    """The best map from the latent to a block: a regression, the same for every metric."""
    gram_RR = down_RD @ block.gram_DD @ down_RD.T
    gram_RR = gram_RR + RIDGE * gram_RR.diagonal().mean() * torch.eye(len(gram_RR), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(gram_RR, down_RD @ block.gram_DD @ block.rows_ND.T)
    return solved.T


def _down(blocks: Sequence[Block], ups: Sequence[Tensor]) -> Tensor:
    """The best latent map for given `ups` of two blocks: `sum_i S_i A C_i = sum_i U_i^T M_i W_i C_i`.

    One basis on either side makes S_1 and C_1 the identity and S_2 and C_2 diagonal; then it is solved elementwise.
    """
    first, second = blocks
    weighed = [(block.root_NN @ up).T @ block.root_NN for block, up in zip(blocks, ups, strict=True)]
    target_RD = sum(
        (w @ block.rows_ND @ block.gram_DD for w, block in zip(weighed, blocks, strict=True)), torch.zeros(())
    )
    left_RR, s_R = _common(weighed[0] @ ups[0], weighed[1] @ ups[1])
    right_DD, c_D = _common(first.gram_DD, second.gram_DD)
    inner_RD = left_RR.T @ target_RD @ right_DD
    return left_RR @ (inner_RD / (1 + s_R[:, None] * c_D)) @ right_DD.T


def _common(first_NN: Tensor, second_NN: Tensor) -> tuple[Tensor, Tensor]:
    """A basis B with `B^T first B = 1` and `B^T second B` diagonal, and that diagonal."""
    _, inverse_NN = psd_roots(first_NN, RIDGE)
    values_N, vectors_NN = torch.linalg.eigh(inverse_NN @ second_NN @ inverse_NN)
    return inverse_NN @ vectors_NN, values_N.clamp_min(0)


def _white(down_RD: Tensor, gram_DD: Tensor) -> Tensor:
    """The same latent in coordinates of unit variance, which every format represents well."""
    _, inverse_RR = psd_roots(down_RD @ gram_DD @ down_RD.T)
    return inverse_RR @ down_RD


def _loss(blocks: Sequence[Block], down_RD: Tensor, ups: Sequence[Tensor]) -> float:
    return sum(block.loss(down_RD, up_NR) for block, up_NR in zip(blocks, ups, strict=True))


def _power(rows_ND: Tensor, gram_DD: Tensor) -> float:
    return float(((rows_ND @ gram_DD) * rows_ND).sum())
