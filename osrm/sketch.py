"""Second moments of wide inputs in little memory: their top directions and the rest as one number.

C ~ F^T F + sigma (I - U^T U): the rows of F, (k, d), are the top k eigenvectors of C, the rows of
U, times the roots of their eigenvalues; sigma spreads what is left of the trace evenly over the
other d - k directions, so tr(C), the mean energy of the inputs, is exact. F comes from an
incremental SVD: rows gather in a buffer, and when it is full, its best approximation of lower
rank replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algorithms.precision import full_precision

# Columns that are in float64 at a time while a buffer is compressed.
_TILE = 2048
# Directions with less than this share of the largest energy are rounding of float32 inputs.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Sketch:
    """A second moment C, (d, d), as its top directions and an isotropic remainder.

    Attributes:
        rows: F, (m, d) with orthogonal rows, descending, none with less energy than the remainder;
            m <= k, fewer if nothing is known of the others but their mean.
        trace: tr(C).
        k: The most rows that it keeps.
    """

    rows: Tensor
    trace: float
    k: int

    @classmethod
    def of(cls, rows: Tensor, trace: float, k: int) -> Sketch:
        """A sketch of those of the rows that have no less energy than it leaves to any other.

        What rows lost while data streamed by is in the trace still: the weakest may have become
        weaker than the mean of all that was left out, among which they then belong.
        """
        m, d = rows.shape
        energies = rows.double().square().sum(1)
        left = (trace - energies.cumsum(0)) / (d - torch.arange(1, m + 1))
        return cls(rows[: m - int((energies < left).sum())], trace, k)

    @property
    def remainder(self) -> float:
        """sigma, the energy of each direction outside F."""
        m, d = self.rows.shape
        left = self.trace - float(self.rows.double().square().sum())
        return max(0.0, left) / (d - m) if m < d else 0.0

    def dense(self) -> Tensor:
        """C as it is approximated, (d, d), in the dtype of the rows."""
        sigma = self.remainder
        # F^T F - sigma U^T U in one product: row i of F is row i of U times the root of its energy.
        share = (1 - sigma / self.rows.double().square().sum(1)).to(self.rows)
        with full_precision(self.rows.device):
            matrix = (self.rows.T * share) @ self.rows
        matrix.diagonal().add_(sigma)
        mirror_(matrix)
        return matrix

    def pooled(self, weight: float, other: Sketch) -> Sketch:
        """The sketch of weight * C + (1 - weight) * C_other, with the larger k; exact trace.

        The remainders add up to a level in all directions, so the top directions of the sum are
        those of what the rows have above their remainders, and have that and the level.
        """
        dtype = torch.promote_types(self.rows.dtype, other.rows.dtype)
        level, above = 0.0, []
        for sketch, share in ((self, weight), (other, 1 - weight)):
            level += share * sketch.remainder
            above.append(share**0.5 * _raised(sketch.rows.to(dtype), -sketch.remainder))
        k = max(self.k, other.k)
        trace = weight * self.trace + (1 - weight) * other.trace
        return Sketch.of(_raised(compress(torch.cat(above), k), level), trace, k)


class Moments(Mapping[str, Tensor]):
    """Second moments by key. A sketch becomes a dense matrix, (d, d), whenever it is asked for."""

    def __init__(self, kept: Mapping[str, Tensor | Sketch]) -> None:
        self.kept = dict(kept)

    def __getitem__(self, key: str) -> Tensor:
        found = self.kept[key]
        return found.dense() if isinstance(found, Sketch) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


def _raised(rows: Tensor, energy: float) -> Tensor:
    """The rows, (m, d) and none zero, with so much more energy each, but not less than none."""
    factors = (1 + energy / rows.double().square().sum(1)).clamp(min=0).sqrt()
    return rows * factors.to(rows)[:, None]


def compress(rows: Tensor, k: int) -> Tensor:
    """F with F^T F the best approximation of rank k of rows^T rows: (<= k, d), orthogonal rows.

    Through the eigenvectors of the small side, rows rows^T, in float64.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for tile in rows.split(_TILE, dim=1):
        wide = tile.double()
        gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram)
    top = vectors[:, values > _NEGLIGIBLE * values[-1:]].flip(1)[:, :k]
    return torch.cat([(top.T @ tile.double()).to(rows) for tile in rows.split(_TILE, dim=1)], dim=1)


def mirror_(matrix: Tensor, tile: int = 128) -> None:
    """Copy the upper triangle of a square matrix onto the lower one, in place.

    By tiles that fit into a processor's cache, where transposing is fast.
    """
    for start in range(0, len(matrix), tile):
        stop = start + tile
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        for other in range(stop, len(matrix), tile):
            upper = matrix[start:stop, other : other + tile]
            matrix[other : other + tile, start:stop] = upper.T
