"""Numbers about subspaces and spectra: how far apart, how much energy where."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
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


def subspace_overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of the smaller subspace lies in the larger one, for every module.

    The mean squared cosine of the principal angles: 1 if one contains the other, 0 if they are
    orthogonal, max(r, s) / d in expectation for two random ones.

    Args:
        first: A state (`subspace_state`) or A factors (`lora_a`): module name -> (r, d).
        second: Another, with the same modules: module name -> (s, d).

    Raises:
        UserError: the modules differ, or their widths.
    """
    differing = sorted(set(first) ^ set(second))
    if differing:
        raise UserError(
            f"only one of the two subspaces has the module {differing[0]}: compare subspaces of the"
            " same target modules"
        )
    return {
        module: float(principal_angles(rows, second[module]).cos().square().mean())
        for module, rows in first.items()
    }


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
