"""The part of an input that is the task's own, by a linear estimate: Wiener's filter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm.covariance import Covariance
from osrm.others import mean_moment, shares
from osrm.pool import side_by_side


def wiener_filters(
    covariances: Mapping[str, Covariance],
    task: str,
    *,
    weights: Mapping[str, float] | None = None,
    rho: float = 0.05,
    progress: bool = False,
) -> dict[str, Tensor]:
    """F = c C_t (C_t + sum_u w_u C_u + rho m I)^-1 for every module.

    C_t is the second moment of the task's inputs, C_u that of another task's, m the mean diagonal
    entry of their weighted mean. Without damping, F / c is the linear estimate of least squared
    error of the task's vector from its sum with uncorrelated ones of all others (Wiener 1949). Rows
    A F instead of A read an input's directions by how much of their energy is the task's own, among
    all tasks that will share the merged model; no direction is shut out, as a subspace of k
    dimensions does with all but k. The factor c makes tr(F C_t F^T) = tr(C_t): random rows let
    through as much own energy with the filter as without, so that B learns as fast. Ours, in the
    place of OSRM's subspace (arXiv 2505.22934, section 3.2).

    Args:
        covariances: Task name -> its covariance; `task` among them and at least one other.
        task: The task that is going to be trained.
        weights: Other task -> w_u; those not named weigh 1. The pooled covariance of three earlier
            tasks has weight 3.
        rho: Damping, above 0: directions with less energy than that count as nobody's.
        progress: Show a progress bar.

    Returns:
        Module name -> F, (d_in, d_in) float32; modules with the same input share one tensor.

    Raises:
        UserError: unknown task, no other task, covariances that do not fit together, a weight as
            in `subspace_state`, a rho that is no positive number, or inputs without energy.
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise UserError(f"rho is {rho}: give a number above 0, such as 0.05")
    of = shares(covariances, task, weights)
    total = sum((weights or {}).get(name, 1.0) for name in of)
    own = covariances[task]

    def solve(key: str) -> Tensor:
        mine, others = own.matrices[key].double(), mean_moment(covariances, of, key)
        level = others.diagonal().mean()
        if not (level > 0 and mine.diagonal().mean() > 0):
            raise UserError(f"{key}: inputs without energy cannot be told apart: collect others")
        mixed = mine + total * others
        mixed.diagonal().add_(rho * level)
        # F^T solves a symmetric system, whose factor is cheaper and steadier than an inverse.
        factor, failed = torch.linalg.cholesky_ex(mixed)
        if failed:
            raise UserError(f"{key}: rho {rho:g} is too small for these covariances: raise it")
        transposed = torch.cholesky_solve(mine, factor)
        through = ((transposed @ transposed.T) * mine).sum()  # tr(F C F^T)
        return (transposed.T * (mine.trace() / through).sqrt()).float().contiguous()

    width = max(map(len, own.means.values()))
    solved = side_by_side(solve, list(own.matrices), width, "Filters" if progress else None)
    return {module: solved[key] for module, key in own.modules.items()}
