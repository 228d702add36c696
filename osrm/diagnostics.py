"""Numbers about subspaces and spectra: how far apart, how much energy where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm.covariance import Covariance
from osrm.side_by_side import of_every_task
from osrm.solvers import single_thread


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between the row spans of two matrices (Bjoerck and Golub, 1973).

    Args:
        a: (r, d) of full row rank.
        b: (s, d) of full row rank.

    Returns:
        (min(r, s),) float64 in radians, ascending: all 0 if the smaller span lies in the larger.

    Raises:
        UserError: the widths differ.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"there are no angles between rows of shapes {tuple(a.shape)} and {tuple(b.shape)}:"
            " expected (r, d) and (s, d), they are of different modules"
        )
    small, large = sorted((a, b), key=len)
    with single_thread():
        q, p = (torch.linalg.qr(rows.detach().double().cpu().T).Q for rows in (small, large))
        inside = p.T @ q
        cosines = torch.linalg.svdvals(inside)
        # Small angles are lost in their cosine, near 1; the sine keeps them.
        sines = torch.linalg.svdvals(q - p @ inside).flip(0)
    return torch.atan2(sines, cosines)


def drift(a0: Tensor, a1: Tensor) -> Tensor:
    """Principal angles between the row spans of A before and after training.

    Args:
        a0: (r, d) at the start, of full row rank.
        a1: (r, d) later, of full row rank.

    Returns:
        (r,) float64 in radians, ascending: all 0 if the span has not moved.

    Raises:
        UserError: the shapes differ.
    """
    if a0.ndim != 2 or a0.shape != a1.shape:
        raise UserError(
            f"A has shape {tuple(a0.shape)} before and {tuple(a1.shape)} after: expected the same"
            " (r, d), they are of different modules"
        )
    return principal_angles(a0, a1)


def overlap_matrix(subspaces: Sequence[Tensor | None]) -> Tensor:
    """How much of the smaller subspace lies in the larger one, for every pair.

    The mean squared cosine of the principal angles: 1 if one contains the other, 0 if they are
    orthogonal, max(r, s) / d in expectation for two random ones. Dependent rows count once.

    Args:
        subspaces: n row spans of one module, (r, d) each with r of its own; None is no subspace.

    Returns:
        (n, n) float64, NaN where a subspace is missing or all its rows are zero.

    Raises:
        UserError: the widths differ.
    """
    present = {i: _basis(rows) for i, rows in enumerate(subspaces) if rows is not None}
    widths = {basis.shape[1] for basis in present.values()}
    if len(widths) > 1:
        raise UserError(
            f"there is no overlap between subspaces of widths {sorted(widths)}: they are of"
            " different modules"
        )
    found = torch.full((len(subspaces),) * 2, torch.nan, dtype=torch.float64)
    for i, q in present.items():
        for j, p in present.items():
            smaller = min(len(q), len(p))
            if smaller:
                found[i, j] = (q @ p.T).square().sum() / smaller
    return found


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span, (numerical rank, d) float64."""
    with single_thread():
        _, values, basis = torch.linalg.svd(rows.detach().double().cpu(), full_matrices=False)
    return basis[values > 1e-6 * values[0]]


def spectrum(cov: Tensor) -> Tensor:
    """Eigenvalues of a second moment, (d,) float64, ascending; those below 0, rounding, are 0.

    Raises:
        UserError: not a finite square matrix.
    """
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or not cov.isfinite().all():
        raise UserError(f"cov of shape {tuple(cov.shape)}: expected a finite (d, d) matrix")
    with single_thread():
        return torch.linalg.eigvalsh(cov.double().cpu()).clamp(min=0)


def effective_rank(values: Tensor) -> float:
    """In how many directions the energy is: exp of the entropy of the eigenvalues' shares.

    Roy and Vetterli, The effective rank, EUSIPCO 2007, definition 1, for a second moment. d if
    all eigenvalues are equal, 1 if one is left, 0 if none is.

    Args:
        values: What `spectrum` returns.
    """
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def bottom_share(values: Tensor, count: int) -> float:
    """Share of the energy in the `count` smallest eigenvalues: the least that so many rows leak.

    Args:
        values: What `spectrum` returns.
        count: The rank r, or k.

    Raises:
        UserError: count outside 1..d.
    """
    if not 1 <= count <= len(values):
        raise UserError(
            f"there is no bottom {count} of {len(values)} eigenvalues: choose 1 to {len(values)}"
        )
    total = float(values.sum())
    return float(values[:count].sum()) / total if total > 0 else 0.0


class InputSpectrum(NamedTuple):
    """Where the energy of what a module reads on a task's data is.

    Attributes:
        effective_rank: See `effective_rank`.
        bottom: See `bottom_share`, for every count asked for.
    """

    effective_rank: float
    bottom: tuple[float, ...]


def input_spectra(
    covariances: Mapping[str, Covariance], counts: Sequence[int], progress: bool = False
) -> dict[str, dict[str, InputSpectrum]]:
    """Decompose every task's covariance, each input once, side by side.

    Args:
        covariances: Task name -> its covariance.
        counts: Numbers of bottom directions, such as r and k; a module that reads fewer features
            takes them all.
        progress: Show a progress bar.

    Returns:
        Task name -> module name -> its spectrum.

    Raises:
        UserError: a count below 1.
    """

    def decompose(task: str, key: str) -> InputSpectrum:
        values = spectrum(covariances[task].matrices[key])
        shares = (bottom_share(values, min(count, len(values))) for count in counts)
        return InputSpectrum(effective_rank(values), tuple(shares))

    return of_every_task(decompose, covariances, "Spectra" if progress else None)
