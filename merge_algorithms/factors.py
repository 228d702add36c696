"""Algebra on low-rank factors: stacking, truncation, singular vectors at the numerical rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.krylov import leading_vectors
from merge_algorithms.precision import full_precision
from merge_algorithms.tiles import Update

# Singular values up to this share of the largest count as zero. Two float32 copies of one matrix
# in different bases differ by 1e-7; what float64 arithmetic adds is far below. A direction at the
# limit is still known to 1e-10, so that a method may raise it to the size of the others.
RANK_TOLERANCE = 1e-6


def stack(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_t w_t dW_t, exactly, as [w_1 b_1 .. w_T b_T] [a_1; ..; a_T] of rank sum r_t.

    Where that is more than d = min(d_out, d_in), the sum is accumulated as one dense matrix and
    returned with an identity as its other factor: of rank d, in O(d_out * d_in) memory however
    many updates there are.
    """
    d_out, d_in = updates[0].shape
    if sum(update.rank for update in updates) > min(d_out, d_in):
        dense = updates[0].b.new_zeros(d_out, d_in)
        with full_precision(dense.device):
            for w, update in zip(weights, updates, strict=True):
                dense.addmm_(update.b, update.a, alpha=w)
        return with_identity(dense)
    b = torch.cat([w * update.b for w, update in zip(weights, updates, strict=True)], dim=1)
    return LowRank(b, torch.cat([update.a for update in updates]))


def compact(update: LowRank) -> LowRank:
    """The same update, of rank at most min(d_out, d_in)."""
    return with_identity(update.dense()) if update.rank > min(update.shape) else update


def with_identity(dense: Tensor) -> LowRank:
    """A matrix as a low-rank update: one factor is the matrix, the other an identity."""
    d_out, d_in = dense.shape
    identity = torch.eye(min(d_out, d_in), dtype=dense.dtype, device=dense.device)
    return LowRank(identity, dense) if d_out <= d_in else LowRank(dense, identity)


def cancels(update: LowRank) -> bool:
    """Whether the norm of dW = b a is lost in the float32 rounding of its factors.

    Columns that cancel leave a difference of rounding errors, which has no direction. Compared
    with RANK_TOLERANCE: ||dW||_F^2 = sum_ij (b^T b)_ij (a a^T)_ij, and what its terms would add up
    to if none were negative; in float64 only where float32, be it TF32, leaves a doubt.
    """

    def left(dtype: torch.dtype) -> Tensor:
        b, a = update.b.to(dtype), update.a.to(dtype)
        terms = (b.T @ b) * (a @ a.T)
        return terms.sum() / terms.abs().sum()  # NaN where there is nothing

    return not (left(torch.float32) > 0.05 or left(torch.float64) > RANK_TOLERANCE**2)


class Svd(NamedTuple):
    """Singular triplets of a matrix (d_out, d_in), by falling singular value, in float64.

    Attributes:
        u: (d_out, k), orthonormal columns.
        s: (k,), positive.
        v: (d_in, k), orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def top(self, count: int) -> Svd:
        """The first `count` triplets, or all if there are fewer."""
        return Svd(self.u[:, :count], self.s[:count], self.v[:, :count])


def svd(update: LowRank, scale: float | None = None) -> Svd:
    """The singular triplets of dW = b a, as many as its numerical rank.

    Args:
        update: From thin QRs of both factors and the SVD of the small core between them.
        scale: Singular values up to RANK_TOLERANCE * scale are zero; default: the largest one.
    """
    found = _svd(update)
    return found.top(numerical_rank(found.s, scale))


def numerical_rank(s: Tensor, scale: float | None = None) -> int:
    """How many of the falling singular values are above RANK_TOLERANCE times the first.

    `scale` takes the place of the first one where the matrix is what is left of a larger one.
    """
    if scale is None:
        scale = float(s[0]) if len(s) else 0.0
    return int((s > RANK_TOLERANCE * scale).sum())


def left_vectors(matrix: Tensor) -> Tensor:
    """Left singular vectors (d, k) of a float64 matrix (d, n) up to its numerical rank, at least 1.

    The entry of largest magnitude is positive in each, so that they are unique wherever the
    singular values differ.
    """
    if not matrix.shape[1]:
        matrix = matrix.new_zeros(len(matrix), 1)
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    u = q @ u[:, : max(1, numerical_rank(s))]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -u, u)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (d, n), or with orthonormal rows if n > d.

    U V^T of the thin SVD, in float64. Where the numerical rank k is lower than both d and n it is
    the partial isometry of rank k, the only choice that does not depend on the basis.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = numerical_rank(s)
    return u[:, :rank] @ vh[:rank]


def truncate(update: Update, rank: int) -> tuple[LowRank, float]:
    """The best approximation of rank at most `rank` (Eckart-Young) and the energy share it loses.

    Low-rank factors: from a thin QR of A and an R x R Gram matrix. Anything else: the dense rows
    of this one module and the leading singular vectors of its shorter side. Both in float64. The
    lost share is ||dW - dW_rank||_F^2 / ||dW||_F^2, 0 for a zero update.
    """
    if rank < 1:
        raise UserError(f"rank {rank} is not possible: give a rank of at least 1")
    if isinstance(update, LowRank) and rank >= update.rank:
        return update, 0.0
    if isinstance(update, LowRank) and update.rank < min(update.shape):
        return _truncate_factors(update, rank)
    return _truncate_dense(update.rows(0, update.shape[0]), rank)


def _truncate_factors(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """From a thin QR of A and an R x R Gram matrix: a third of the time of two QRs and an SVD.

    With A^T = Q R, dW = (B R^T) Q^T has the right singular vectors of B R^T, turned by Q. The
    square costs precision in directions with less than 1e-8 of the largest singular value, which
    is nothing of the energy. A must not be squared: where updates cancel, all that is left of the
    sum may lie in directions that are small in A.
    """
    q, r = torch.linalg.qr(update.a.double().T)
    first = update.b.double() @ r.T
    energies, vectors = torch.linalg.eigh(first.T @ first)
    kept = vectors.flip(1)[:, :rank]
    best = _balanced(first @ kept, (q @ kept).T)
    return best.to(update.b.device, update.b.dtype), _lost(float(energies.sum()), best)


def _svd(update: LowRank) -> Svd:
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Svd(q_b @ u, s, q_a @ vh.T)


def _truncate_dense(dense: Tensor, rank: int) -> tuple[LowRank, float]:
    wide = dense.shape[0] < dense.shape[1]
    matrix = dense.double().T if wide else dense.double()
    vectors = leading_vectors(matrix, rank)
    projected = matrix @ vectors
    best = _balanced(vectors, projected.T) if wide else _balanced(projected, vectors.T)
    return best.to(dense.device, dense.dtype), _lost(float(matrix.square().sum()), best)


def _balanced(b: Tensor, a: Tensor) -> LowRank:
    """b a with orthogonal columns of b and rows of a, made equally long in pairs."""
    ratios = torch.linalg.vector_norm(b, dim=0) / torch.linalg.vector_norm(a, dim=1)
    shift = ratios.sqrt().where((ratios > 0) & ratios.isfinite(), 1.0)
    return LowRank(b / shift, a * shift[:, None])


def _lost(total: float, best: LowRank) -> float:
    """Share of the energy `total` that a truncation with balanced factors lacks."""
    kept = float(best.b.square().sum(0) @ best.a.square().sum(1))
    return max(0.0, total - kept) / total if total else 0.0
