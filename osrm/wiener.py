"""The part of an input that is the task's own, by a linear estimate: Wiener's filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm.covariance import Covariance
from osrm.others import damping_level, mean_moment, shares, weight_of
from osrm.side_by_side import of_every_task, side_by_side
from osrm.solvers import with_rounding


def wiener_filters(
    covariances: Mapping[str, Covariance],
    task: str,
    *,
    weights: Mapping[str, float] | None = None,
    mu: float = 0.05,
    rho: float = 0.05,
    progress: bool = False,
) -> dict[str, Tensor]:
    """F = c C_t (C_t + mu sum_u w_u C_u + rho m I)^-1 for every module.

    C_t is the second moment of the task's inputs, C_u that of another task's, m the mean diagonal
    entry of their weighted mean, at most ten times what it is without the hundredth with the most
    energy (`damping_level`). Without damping, F / c is the matrix that minimises what the task's
    own inputs lose, E_t ||h - F h||^2, plus mu times what the others let through, sum_u w_u E_u ||F
    h||^2: Wiener's filter with a weight on the noise, as speech enhancement knows it (Doclo and
    Moonen 2002, doi 10.1109/TSP.2002.801937). Rows A F instead of A read an input's directions by
    how much of their energy is the task's own; no direction is shut out, as a subspace of k
    dimensions does with all but k. The factor c makes tr(F C_t F^T) = tr(C_t): random rows let
    through as much own energy with the filter as without, so that B learns as fast. Ours, in the
    place of OSRM's subspace (arXiv 2505.22934, section 3.2).

    Args:
        covariances: Task name -> its covariance; `task` among them and at least one other.
        task: The task that is going to be trained.
        weights: Other task -> w_u; those not named weigh 1, the pooled covariance of three earlier
            tasks 3.
        mu: What a unit of another task's energy that passes costs beside one of the own that is
            lost, above 0: the larger, the stricter the filter.
        rho: Damping, above 0: directions with less energy than rho m count as nobody's.
        progress: Show a progress bar.

    Returns:
        Module name -> F, (d_in, d_in) float32; modules with the same input share one tensor.

    Raises:
        UserError: unknown task, no other task, covariances that do not fit together, a weight as
            in `subspace_state`, a mu or rho that is no positive number, or inputs without energy.
    """
    check_filter(mu, rho)
    of = shares(covariances, task, weights)
    total = sum(weight_of(covariances, name, weights) for name in of)
    own = covariances[task]

    def solve(key: str) -> Tensor:
        mine, others = own.matrices[key].double(), mean_moment(covariances, of, key)
        transposed = _unscaled(key, mine, others, mu * total, rho)
        through = _passing(transposed, mine)
        return (transposed.T * (mine.trace() / through).sqrt()).float().contiguous()

    widths = {key: len(mean) for key, mean in own.means.items()}
    solved = side_by_side(solve, widths, "Filters" if progress else None)
    return {module: solved[key] for module, key in own.modules.items()}


class Separation(NamedTuple):
    """How well the filter of a task tells what one module reads of it from what it reads of others.

    Attributes:
        own: Share of the task's own energy that passes, E ||F h||^2 / E ||h||^2 without the factor
            c: 1 where no other task has any energy.
        leaked: Energy of the other tasks' inputs behind the filter, their mean, over the own.
    """

    own: float
    leaked: float


def separations(
    covariances: Mapping[str, Covariance],
    *,
    mu: float = 0.05,
    rho: float = 0.05,
    progress: bool = False,
) -> dict[str, dict[str, Separation]]:
    """Where adapters disturb each other least: the filter of every task at every module.

    Adapters on modules with much `own` and little `leaked` lose little behind the filter, and leak
    little. Needs the covariances of candidates alone: nothing is trained.

    Args:
        covariances: Task name -> its covariance, of at least two tasks.
        mu: As in `wiener_filters`.
        rho: As there.
        progress: Show a progress bar.

    Returns:
        Task name -> module name -> its separation.

    Raises:
        UserError: as `wiener_filters`.
    """
    check_filter(mu, rho)
    of = {task: shares(covariances, task) for task in covariances}
    totals = {task: sum(weight_of(covariances, u, None) for u in of[task]) for task in of}

    def measure(task: str, key: str) -> Separation:
        mine = covariances[task].matrices[key].double()
        others = mean_moment(covariances, of[task], key)
        transposed = _unscaled(key, mine, others, mu * totals[task], rho)
        own, leaked = float(_passing(transposed, mine)), float(_passing(transposed, others))
        return Separation(own / float(mine.trace()), leaked / own)

    return of_every_task(measure, covariances, "Filters" if progress else None)


def check_filter(mu: float, rho: float) -> None:
    """UserError unless both are positive numbers."""
    for name, value, usual in (("mu", mu, 0.05), ("rho", rho, 0.05)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}: give a number above 0, such as {usual}")


def _unscaled(key: str, mine: Tensor, others: Tensor, weight: float, rho: float) -> Tensor:
    """(F / c)^T, given the others' mean and the weight of it, mu times the sum of theirs."""
    level = damping_level(others)
    if not (level > 0 and mine.diagonal().mean() > 0):
        raise UserError(f"{key}: inputs without energy cannot be told apart: collect others")
    mixed = mine + weight * others
    mixed.diagonal().add_(rho * level)
    # F^T solves a symmetric system, whose factor is cheaper and steadier than an inverse.
    factor, failed = torch.linalg.cholesky_ex(mixed)
    if failed:  # perhaps by what rounding took from a decoder's enormous activations
        factor, failed = torch.linalg.cholesky_ex(with_rounding(mixed))
    if failed:
        raise UserError(f"{key}: rho {rho:g} is too small for these covariances: raise it")
    return torch.cholesky_solve(mine, factor)


def _passing(transposed: Tensor, moment: Tensor) -> Tensor:
    """tr(F S F^T), given F^T and S."""
    return ((transposed @ transposed.T) * moment).sum()
