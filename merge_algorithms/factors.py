"""Algebra on low-rank factors: stacking and truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.tiles import Update


def stack(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_t w_t dW_t, exactly, as [w_1 b_1 .. w_T b_T] [a_1; ..; a_T] of rank sum r_t."""
    b = torch.cat([w * update.b for w, update in zip(weights, updates, strict=True)], dim=1)
    return LowRank(b, torch.cat([update.a for update in updates]))


def truncate(update: Update, rank: int) -> tuple[LowRank, float]:
    """The best approximation of rank at most `rank` (Eckart-Young) and the energy share it loses.

    Low-rank factors: thin QR of both, then the SVD of the R x R core. Anything else: the dense
    rows of this one module and the eigenvectors of the smaller of its two Gram matrices. Both in
    float64. The lost share is ||dW - dW_rank||_F^2 / ||dW||_F^2, 0 for a zero update.
    """
    if rank < 1:
        raise UserError(f"rank {rank} is not possible: give a rank of at least 1")
    if isinstance(update, LowRank):
        return _truncate_factors(update, rank)
    return _truncate_dense(update.rows(0, update.shape[0]), rank)


def _truncate_factors(update: LowRank, rank: int) -> tuple[LowRank, float]:
    if rank >= update.rank:
        return update, 0.0
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = (q_b @ u[:, :rank]) * root, (q_a @ vh[:rank].T * root).T
    return LowRank(b, a).to(b.device, update.b.dtype), _lost(s.square(), rank)


def _truncate_dense(dense: Tensor, rank: int) -> tuple[LowRank, float]:
    wide = dense.shape[0] < dense.shape[1]
    matrix = dense.double().T if wide else dense.double()
    energies, vectors = torch.linalg.eigh(matrix.T @ matrix)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    projected = matrix @ vectors
    b, a = (vectors, projected.T) if wide else (projected, vectors.T)
    return LowRank(b, a).to(b.device, dense.dtype), _lost(energies, rank)


def _lost(energies: Tensor, rank: int) -> float:
    total = float(energies.sum())
    return float(energies[rank:].sum()) / total if total else 0.0
