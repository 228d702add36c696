"""The subspace that A starts in: where the other tasks' inputs have the least energy."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm.others import damping_level
from osrm.solvers import (
    NULL_TOLERANCE,
    Solver,
    block_size,
    cholesky,
    choose_solver,
    minimise_trace,
    null_level,
    single_thread,
    smallest_of,
    solve_lower,
    solve_upper,
    start_block,
    times,
    with_rounding,
)

logger = logging.getLogger(__name__)

# Eigenvalues above `null_level` closer than this share of its norm count as equal: the rounding of
# a float64 eigensolver.
TIE_TOLERANCE = 1e-12


def bottom_subspace(
    cov: Tensor, rank: int, own: Tensor | None = None, solver: Solver = "auto"
) -> Tensor:
    """The rows of A that let through the least energy of `cov`.

    Solves min tr(A S A^T) subject to A A^T = I (arXiv 2505.22934, section 3.2): A holds the
    eigenvectors of the `rank` smallest eigenvalues. Where S leaves a choice - a null space, from
    fewer tokens than d or linearly dependent features, or equal eigenvalues - every choice has the
    same energy, and what an eigensolver returns there is an accident. The choice made here:

    1. eigenvalues up to `osrm.solvers.null_level` form the null space; it comes first. That is
       NULL_TOLERANCE of the Frobenius norm, at most ten times the norm without the hundredth of
       the features with the most energy: beside a few enormous ones the others are not nothing,
    2. inside it, and inside equal eigenvalues, the directions with the most energy of `own` come
       first (eigenvectors of `own` restricted to that space, descending),
    3. what is still equal, or everything if `own` is None, is ordered by fixed arbitrary weights
       of the coordinates; the log says so,
    4. signs follow the same weights.

    Args:
        cov: S, (d, d) symmetric, second moment of the other tasks' inputs.
        rank: How many rows. The rows for a smaller rank are the first rows for a larger one (with
            `cholesky` up to its precision).
        own: C_t, (d, d), second moment of the own task's inputs.
        solver: "eigh" decomposes all of S: exact, O(d^3) with a large constant. "cholesky"
            factors S once and iterates, see `osrm.solvers.smallest_of`: many times faster, the
            energy within about 1 % of the optimum; it knows null spaces, but no other equal
            eigenvalues, and falls back on "eigh" where it cannot work. "auto" takes "cholesky"
            from d = 2048 on if the rank is at most d / 32.

    Returns:
        (rank, d) float32 with orthonormal rows, ascending eigenvalue; solved in float64 on one
        thread, so the number of threads changes nothing.

    Raises:
        UserError: rank outside 1..d, a matrix that is not a second moment, or no such solver.
    """
    _check_moment(cov, "cov")
    d = len(cov)
    _check_rank(rank, d)
    # Restricted to almost every subspace it has a unique eigenbasis.
    ties = [_weights(cov)]
    if own is not None:
        _check_own(own, d, "cov")
        ties.insert(0, own)
    with single_thread():
        cov = with_rounding(cov)
        null = null_level(cov)
        iterate = choose_solver(solver, d, rank) == "cholesky"
        pairs = smallest_of(cov, rank, null) if iterate else None
        values, vectors = pairs or _all_of(cov)
        groups = _equal_groups(values, null, TIE_TOLERANCE / NULL_TOLERANCE * null)
        zero = int((values <= null).sum())
        if own is None and zero > rank:
            logger.info(
                "the null space has %d dimensions, more than the rank %d, and there is no own"
                " covariance: directions in it are chosen by fixed arbitrary weights",
                zero,
                rank,
            )
        parts = [_ordered(vectors[:, group], ties) for group in groups if group.start < rank]
    return _fix_signs(torch.cat(parts, dim=1)[:, :rank].T).float().contiguous()


def contrastive_subspace(
    own: Tensor, others: Tensor, rank: int, rho: float = 0.05, solver: Solver = "auto"
) -> Tensor:
    """The rows of A with the most own-task energy per unit of energy let through from others.

    Top generalised eigenvectors of C_t v = mu (S + rho m I) v, m the mean of S's diagonal, at most
    ten times what it is without the hundredth with the most energy, orthonormalised in their order,
    so that the first r rows span the best r. Own-task awareness is what InfLoRA (arXiv 2404.00228),
    CorDA (arXiv 2406.05223) and SC-LoRA (arXiv 2505.23724) add to data-driven initialisation in
    their settings; as in OSRM (arXiv 2505.22934) all that is needed is second moments. S + rho m I
    is factored once (Cholesky), whitening turns the problem into an ordinary symmetric one.

    Args:
        own: C_t, (d, d) symmetric, second moment of the own task's inputs.
        others: S, (d, d) symmetric, second moment of the other tasks' inputs.
        rank: How many rows. The rows for a smaller rank are the first rows for a larger one.
        rho: Damping: directions where S has less than this share of m gain nothing from having less
            still.
        solver: As for `bottom_subspace`; "cholesky" iterates on the whitened problem (block
            Krylov) until the values mu are within about 1 %.

    Returns:
        (rank, d) float32 with orthonormal rows; solved in float64 on one thread.

    Raises:
        UserError: rank outside 1..d, a matrix that is not a second moment or zero, rho not
            positive, or own energy in fewer than `rank` directions.
    """
    rows = contrastive_rows(own, others, rank, rho, solver)
    if len(rows) < rank:
        raise UserError(
            f"own has energy in {len(rows)} directions only and rank {rank} asks for more: collect"
            " it from more tokens or choose a smaller rank"
        )
    return rows


def contrastive_rows(
    own: Tensor, others: Tensor, rank: int, rho: float, solver: Solver = "auto"
) -> Tensor:
    """`contrastive_subspace`, with fewer rows where `own` has energy in fewer directions."""
    _check_moment(others, "others")
    d = len(others)
    _check_rank(rank, d)
    _check_own(own, d, "others")
    if not (rho > 0 and math.isfinite(rho)):
        raise UserError(f"rho is {rho}: the damping must be a positive number, such as 0.05")
    with single_thread():
        lower = cholesky(with_rounding(others), rho * damping_level(others))
        if lower is None:
            raise UserError(
                f"others plus its damping (rho {rho}) is not positive definite: it is"
                " zero or no second moment, so collect it again"
            )

        def gain(block: Tensor) -> Tensor:
            """Minus the whitened own covariance times `block`: its smallest are the best."""
            return -solve_lower(lower, times(own, solve_upper(lower, block)))

        pairs = None
        if choose_solver(solver, d, rank) == "cholesky":
            start = start_block(d, block_size(rank), others.device)
            pairs = minimise_trace(gain, lambda block, image: image, gain(start), rank)
        values, turn = pairs or torch.linalg.eigh(
            gain(torch.eye(d, dtype=torch.float64, device=others.device))
        )
        vectors = solve_upper(lower, turn[:, :rank])
        energies = -values[:rank] / vectors.square().sum(0)
        vectors = vectors[:, energies > null_level(own)]
        rows = torch.linalg.qr(vectors).Q.T
    return _fix_signs(rows).float().contiguous()


def official_subspace(means: Tensor, rank: int) -> Tensor:
    """What the authors' released code does: the last right-singular vectors of the task means.

    One mean input vector per other task, stacked, full SVD, last `rank` right-singular vectors.
    With d > T - 1 + rank these are arbitrary members of a null space, so they depend on the LAPACK
    in use. Kept as a baseline for `bottom_subspace`, the paper's method.

    Args:
        means: (T - 1, d), one mean vector per other task.
        rank: How many rows. The rows for a smaller rank are the first rows for a larger one.

    Returns:
        (rank, d) float32 with orthonormal rows, the last singular vector first.

    Raises:
        UserError: rank outside 1..d, or means that are not a finite matrix.
    """
    if means.ndim != 2 or not means.isfinite().all():
        raise UserError(f"means of shape {tuple(means.shape)}: expected a finite (T - 1, d) matrix")
    _check_rank(rank, means.shape[1])
    with single_thread():
        _, _, right = torch.linalg.svd(means.double(), full_matrices=True)
    return _fix_signs(right.flip(0)[:rank]).float().contiguous()


def _all_of(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment.double())
    if values[0] < -100 * NULL_TOLERANCE * values.norm():
        raise UserError(
            f"cov has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}: a second moment"
            " has none below zero, collect it again"
        )
    return values, vectors


def _check_rank(rank: int, d: int) -> None:
    if not 1 <= rank <= d:
        raise UserError(
            f"rank {rank} does not fit a module that reads {d} features: choose 1 to {d}"
        )


def _check_moment(matrix: Tensor, name: str) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.isfinite().all():
        raise UserError(f"{name} of shape {tuple(matrix.shape)}: expected a finite (d, d) matrix")


def _check_own(own: Tensor, d: int, other: str) -> None:
    _check_moment(own, "own")
    if len(own) != d:
        raise UserError(f"own is {len(own)} wide and {other} {d}: both must be of the same module")


def _equal_groups(ascending: Tensor, null: float, tie: float) -> list[slice]:
    """Slices of equal eigenvalues: first all that count as zero, then runs of ties."""
    zero = int((ascending <= null).sum())
    distinct = [True, *(ascending.diff() > tie).tolist()]
    starts = [i for i, new in enumerate(distinct) if i in (0, zero) or (i > zero and new)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(ascending)], strict=True)]


def _ordered(basis: Tensor, ties: Sequence[Tensor]) -> Tensor:
    """The columns of `basis` turned, inside their span, into the order that `ties` prefer.

    A tie is settled by a symmetric matrix, or the diagonal of one: most energy of it first.
    """
    if basis.shape[1] == 1 or not ties:
        return basis
    matrix, *rest = ties
    image = matrix[:, None] * basis if matrix.ndim == 1 else times(matrix, basis)
    values, turn = torch.linalg.eigh(basis.T @ image)
    turned = basis @ turn
    null = null_level(matrix)
    groups = _equal_groups(values, null, TIE_TOLERANCE / NULL_TOLERANCE * null)
    return torch.cat([_ordered(turned[:, group], rest) for group in groups][::-1], dim=1)


def _fix_signs(rows: Tensor) -> Tensor:
    return torch.where((rows @ _weights(rows) < 0)[:, None], -rows, rows)


def _weights(matrix: Tensor) -> Tensor:
    """A weight per column in [0, 1), always the same ones, float64.

    Drawn, because in any regular sequence some weights are the mean of others, and a tie between
    such coordinates would stay one.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(matrix.shape[1], generator=generator, dtype=torch.float64)
    return weights.to(matrix.device)
