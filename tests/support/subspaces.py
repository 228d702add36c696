"""Subspaces by what does not depend on a basis."""

from __future__ import annotations

from torch import Tensor


def projector(rows: Tensor) -> Tensor:
    """(d, d) float64, onto the span of (r, d) orthonormal rows."""
    return rows.double().T @ rows.double()
