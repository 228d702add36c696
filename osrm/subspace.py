"""The subspace that A starts in: where the other tasks' inputs have the least energy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from merge_algorithms.errors import UserError

logger = logging.getLogger(__name__)

# Eigenvalues up to this share of the largest one count as zero. Covariances are float32 (unit
# roundoff 6e-8), so anything smaller is rounding, not data.
NULL_TOLERANCE = 1e-6
# Above that, eigenvalues closer than this share of the largest one count as equal: the rounding
# of a float64 eigensolver.
TIE_TOLERANCE = 1e-12


def bottom_subspace(cov: Tensor, rank: int, own: Tensor | None = None) -> Tensor:
    """The rows of A that let through the least energy of `cov`.

    Solves min tr(A S A^T) subject to A A^T = I (arXiv 2505.22934, section 3.2): A holds the
    eigenvectors of the `rank` smallest eigenvalues. Where S leaves a choice - a null space, from
    fewer tokens than d or linearly dependent features, or equal eigenvalues - every choice has the
    same energy, and what an eigensolver returns there is an accident. The choice made here:

    1. eigenvalues up to NULL_TOLERANCE of the largest form the null space; it comes first,
    2. inside it, and inside equal eigenvalues, the directions with the most energy of `own` come
       first (eigenvectors of `own` restricted to that space, descending),
    3. what is still equal, or everything if `own` is None, is ordered by fixed arbitrary weights
       of the coordinates; the log says so,
    4. signs follow the same weights.

    Args:
        cov: S, (d, d), second moment of the other tasks' inputs.
        rank: How many rows. The rows for a smaller rank are the first rows for a larger one.
        own: C_t, (d, d), second moment of the own task's inputs.

    Returns:
        (rank, d) float32 with orthonormal rows, ascending eigenvalue; solved in float64.

    Raises:
        UserError: rank outside 1..d, or a matrix that is not a second moment.
    """
    moment = _second_moment(cov, "cov")
    d = len(moment)
    _check_rank(rank, d)
    # Restricted to almost every subspace it has a unique eigenbasis.
    ties = [torch.diag(_weights(moment))]
    if own is not None:
        ties.insert(0, _second_moment(own, "own"))
        if len(ties[0]) != d:
            raise UserError(
                f"own is {len(ties[0])} wide and cov {d}: both must be of the same module"
            )
    with single_thread():
        values, vectors = torch.linalg.eigh(moment)
        if values[0] < -100 * NULL_TOLERANCE * values[-1].abs():
            raise UserError(
                f"cov has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}: a second moment"
                " has none below zero, collect it again"
            )
        groups = _equal_groups(values, values[-1])
        null = groups[0].stop if values[0] <= NULL_TOLERANCE * values[-1] else 0
        if own is None and null > rank:
            logger.info(
                "the null space has %d dimensions, more than the rank %d, and there is no own"
                " covariance: directions in it are chosen by fixed arbitrary weights",
                null,
                rank,
            )
        rows = torch.cat([_ordered(vectors[:, group], ties) for group in groups], dim=1).T
    return _fix_signs(rows)[:rank].float().contiguous()


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


@contextmanager
def single_thread() -> Iterator[None]:
    """Run LAPACK on one thread: several spin-wait on a busy machine, up to 40 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_rank(rank: int, d: int) -> None:
    if not 1 <= rank <= d:
        raise UserError(
            f"rank {rank} does not fit a module that reads {d} features: choose 1 to {d}"
        )


def _second_moment(matrix: Tensor, name: str) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.isfinite().all():
        raise UserError(f"{name} of shape {tuple(matrix.shape)}: expected a finite (d, d) matrix")
    matrix = matrix.double()
    return (matrix + matrix.T) / 2


def _equal_groups(ascending: Tensor, largest: Tensor) -> list[slice]:
    """Slices of equal eigenvalues: first all that count as zero, then runs of ties."""
    zero = int((ascending <= NULL_TOLERANCE * largest).sum())
    distinct = [True, *(ascending.diff() > TIE_TOLERANCE * largest).tolist()]
    starts = [i for i, new in enumerate(distinct) if i in (0, zero) or (i > zero and new)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(ascending)], strict=True)]


def _ordered(basis: Tensor, ties: Sequence[Tensor]) -> Tensor:
    """The columns of `basis` turned, inside their span, into the order that `ties` prefer."""
    if basis.shape[1] == 1 or not ties:
        return basis
    matrix, *rest = ties
    values, turn = torch.linalg.eigh(basis.T @ matrix @ basis)
    turned = basis @ turn
    largest = torch.linalg.eigvalsh(matrix)[-1]
    groups = [_ordered(turned[:, group], rest) for group in _equal_groups(values, largest)]
    return torch.cat(groups[::-1], dim=1)


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
