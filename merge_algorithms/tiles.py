"""Updates that are evaluated by row tiles, and exact order statistics over them.

An elementwise merge of T adapters needs the T dense updates, but never all of their entries at
once: a tile of rows is evaluated from the factors, used, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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


def top_threshold(updates: Sequence[Update], keep: int) -> float:
    """A threshold t such that |x| > t holds for the `keep` largest entries and for no other.

    Entries that equal the smallest of these are kept with it. Magnitudes are compared in float32.
    Exact without sorting or holding the updates: the bits of a non-negative float32, read as an
    integer, are in the order of its value. One pass counts the upper 16 bits, a second one counts
    the lower 16 of the entries that share the upper half of the value sought. The result lies
    midway between that value and the next smaller one, so that rounding (another tile shape,
    another basis of the factors) does not move an entry across it.

    Args:
        updates: The updates that are trimmed together.
        keep: How many entries to keep, at least 1; 0 is returned if there are no more than that.
    """
    if keep >= sum(update.shape[0] * update.shape[1] for update in updates):
        return 0.0
    upper, rest = _locate(_count(bits >> 16 for bits in _bits(updates)), keep)
    lower_counts = torch.zeros(2**16, dtype=torch.int64)
    below = 0  # bits of the largest entry with a smaller upper half
    for bits in _bits(updates):
        halves = bits >> 16
        lower_counts += _count([bits[halves == upper] & 0xFFFF])
        below = max(below, int((bits * (halves < upper)).max()))
    lower, _ = _locate(lower_counts, rest)
    smaller = lower_counts[:lower].nonzero()
    if smaller.numel():
        below = (upper << 16) | int(smaller[-1])
    pair = torch.tensor([(upper << 16) | lower, below], dtype=torch.int32).view(torch.float32)
    kept, dropped = pair.tolist()
    middle = torch.tensor((kept + dropped) / 2, dtype=torch.float32).item()
    return middle if middle < kept else dropped


def _bits(updates: Iterable[Update]) -> Iterator[Tensor]:
    for update in updates:
        for start, stop in row_tiles(update.shape):
            yield update.rows(start, stop).abs().float().view(torch.int32).flatten()


def _count(tiles: Iterable[Tensor]) -> Tensor:
    counts = torch.zeros(2**16, dtype=torch.int64)
    for tile in tiles:
        counts += torch.bincount(tile, minlength=2**16).cpu()
    return counts


def _locate(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest entry, and its place from the top within the bin."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, keep))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, keep - above
