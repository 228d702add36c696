"""Updates that are evaluated by row tiles.

An elementwise merge of T adapters needs the T dense updates, but never all of their entries at
once: a tile of rows is evaluated from the factors, used, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.precision import full_precision

# Working set of one tile over all tasks. Tiles of a few MB stay in the processor's cache.
TILE_BYTES = 4 * 2**20


class Update(Protocol):
    """A change dW of one module's weight, in any representation."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of dW, (stop - start, d_in), float32 or wider."""

    def scaled(self, factor: float) -> Update:
        """Factor * dW."""


def row_tiles(shape: tuple[int, int], copies: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover a matrix, `copies` float32 tiles of which fill TILE_BYTES."""
    d_out, d_in = shape
    step = max(1, TILE_BYTES // (4 * max(1, d_in) * copies))
    for start in range(0, d_out, step):
        yield start, min(start + step, d_out)


@dataclass(frozen=True)
class Tiled:
    """An update that is computed on demand, tile by tile.

    Attributes:
        shape: (d_out, d_in).
        compute: (start, stop) -> rows of the unscaled update.
        copies: Tiles that `compute` holds at once.
        factor: Multiplies the rows.
    """

    shape: tuple[int, int]
    compute: Callable[[int, int], Tensor]
    copies: int
    factor: float = 1.0

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, (stop - start, d_in)."""
        tiles = row_tiles((stop - start, self.shape[1]), self.copies)
        parts = [self.compute(start + first, start + last) for first, last in tiles]
        rows = torch.cat(parts) if parts else self.compute(start, stop)
        return rows if self.factor == 1.0 else rows * self.factor

    def scaled(self, factor: float) -> Tiled:
        """Factor * dW; whatever `compute` has prepared is shared, not computed again."""
        return Tiled(self.shape, self.compute, self.copies, self.factor * factor)


class Stack:
    """The updates of T tasks for one module, factors side by side, so that one product gives rows.

    Smaller ranks are filled up with zeros, which change no bit of any entry.
    """

    def __init__(self, updates: Sequence[LowRank]) -> None:
        ranks = [update.a.shape[0] for update in updates]
        (d_out, _), (_, d_in) = updates[0].b.shape, updates[0].a.shape
        self._b = updates[0].b.new_zeros(len(ranks), d_out, max(ranks))
        self._a = updates[0].a.new_zeros(len(ranks), max(ranks), d_in)
        for t, (update, rank) in enumerate(zip(updates, ranks, strict=True)):
            self._b[t, :, :rank] = update.b
            self._a[t, :rank] = update.a

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of every dW_t, (T, stop - start, d_in)."""
        with full_precision(self._b.device):
            return torch.bmm(self._b[:, start:stop], self._a)
