"""The first step of the elementwise methods: which entries of each update stay, rescaled or not.

A trim maps (module, first row, rows of all T updates (T, n, d_in)) to what is left of these rows,
which it may overwrite. It gives a row the same result whatever tile the row is part of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.threshold import top_threshold
from merge_algorithms.tiles import Stack, row_tiles

Trim = Callable[[str, int, Tensor], Tensor]
# Probabilities are multiples of 1 / _LEVELS: a mask costs 16 random bits for each entry.
_LEVELS = 2**16


def keep_largest(tasks: TaskVectors, density: float, scope: str, skip: float = 0.0) -> Trim:
    """Keep the share `density` of an update that is largest by magnitude, after a share `skip`.

    The shares refer to each adapter as a whole (scope 'global') or to each of its modules
    ('tensor'). Entries that equal the smallest one kept stay as well; comparisons are made in
    float32.
    """
    bands: dict[str, list[tuple[float, float]]] = {}
    for group in tasks.groups(scope):
        total = sum(math.prod(tasks.modules[module][0].shape) for module in group)
        skipped, kept = int_share(skip, total), max(1, int_share(density, total))
        found = []
        for t in range(len(tasks.names)):
            updates = [tasks.modules[module][t] for module in group]
            high = top_threshold(updates, skipped) if skipped else math.inf
            found.append((top_threshold(updates, skipped + kept), high))
        bands |= dict.fromkeys(group, found)

    def trim(module: str, start: int, rows: Tensor) -> Tensor:
        for tile, (low, high) in zip(rows, bands[module], strict=True):
            _keep_band(tile, low, high)
        return rows

    return trim


def drop_at_random(tasks: TaskVectors, density: float, rescale: bool) -> Trim:
    """Keep every entry with probability `density`, divided by it if `rescale`."""
    levels, factors = _levels(torch.tensor([density], dtype=torch.float64), rescale)

    def trim(module: str, start: int, rows: Tensor) -> Tensor:
        kept = _draws(tasks, module, start, rows).lt_(levels.to(rows.device))
        return rows.mul_(kept.mul_(factors.to(rows.device)))

    return trim


def drop_small_at_random(tasks: TaskVectors, density: float, epsilon: float, rescale: bool) -> Trim:
    """Keep entries with a probability that rises with their rank by magnitude within the row.

    From density - epsilon for the smallest to density + epsilon for the largest entry, linear in
    the rank; divided by that probability if `rescale`. A row of one entry has `density`.
    """

    def trim(module: str, start: int, rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        ranks = torch.arange(width, dtype=torch.float64)
        slope = 2 * ranks / (width - 1) - 1 if width > 1 else ranks
        levels, factors = _levels(density + epsilon * slope, rescale)
        kept = _draws(tasks, module, start, rows).lt_(levels.to(rows.device))
        return _times_by_rank(rows, kept.mul_(factors.to(rows.device)))

    return trim


def keep_middle_of_rows(density: float, skip: float) -> Trim:
    """Of every row, drop the share `skip` that is largest, then keep the `density` next to it.

    Both are shares of the whole row, rounded down; at least one entry is kept.
    """

    def trim(module: str, start: int, rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        skipped, kept = int_share(skip, width), max(1, int_share(density, width))
        by_rank = torch.zeros(width, dtype=torch.float32, device=rows.device)
        by_rank[max(0, width - skipped - kept) : width - skipped] = 1
        return _times_by_rank(rows, by_rank.expand_as(rows))

    return trim


def matched(tasks: TaskVectors, trim: Trim) -> Trim:
    """`trim`, then each module of each update scaled back to the sum of |entries| that it had."""

    @cache
    def factors(module: str) -> Tensor:
        updates = tasks.modules[module]
        stack = Stack(updates)
        sums = torch.zeros(2, len(updates), dtype=torch.float64, device=updates[0].b.device)
        for start, stop in row_tiles(updates[0].shape, copies=len(updates)):
            rows = stack.rows(start, stop)
            sums[0] += rows.abs().sum((1, 2))
            sums[1] += trim(module, start, rows).abs().sum((1, 2))
        # mergekit leaves a tensor as it is if either sum is below 1e-7.
        ratios = torch.where((sums < 1e-7).any(0), 1.0, sums[0] / sums[1])
        return ratios.to(updates[0].b.dtype)[:, None, None]

    return lambda module, start, rows: trim(module, start, rows).mul_(factors(module))


def int_share(share: float, total: int) -> int:
    """Share * total, rounded down: 0.29 * 100, a little less than 29 in floating point, is 29."""
    return int(share * total * (1 + 1e-12))


def _keep_band(tile: Tensor, low: float, high: float) -> None:
    """Set entries to zero in place unless low < |x| <= high in float32."""
    if tile.dtype != torch.float32:
        kept = tile.float()
        _keep_band(kept, low, high)
        tile.mul_(kept != 0)
    elif high == math.inf:
        torch.hardshrink(tile, low, out=tile)  # x where |x| > low, else 0
    else:
        tile.copy_(torch.hardshrink(tile, low) - torch.hardshrink(tile, high))


def _levels(probabilities: Tensor, rescale: bool) -> tuple[Tensor, Tensor]:
    """Draws below the level keep an entry; times the factor its mean is exact (float64 in)."""
    levels = (probabilities * _LEVELS).round().clamp(1, _LEVELS)
    factors = _LEVELS / levels if rescale else torch.ones_like(levels)
    return (levels - _LEVELS // 2).float(), factors.float()


def _draws(tasks: TaskVectors, module: str, start: int, rows: Tensor) -> Tensor:
    """Uniform draws for the entries of these rows, float32 integers in [-2^15, 2^15).

    A row's draws depend on the seed, the module, the adapter's name and the row's number, nothing
    else: the generator (PCG64, on the CPU for every device) is moved on to the row.
    """
    _, height, width = rows.shape
    words = -(-width // 4)  # 64 random bits are four draws
    draws = torch.empty(rows.shape, dtype=torch.float32)
    for name, tile in zip(tasks.names, draws, strict=True):
        source = np.random.PCG64(tasks.generator(f"{module}\n{name}").initial_seed())
        source.advance(start * words)
        bits = source.random_raw(height * words).view(np.int16).reshape(height, 4 * words)
        tile.copy_(torch.from_numpy(bits)[:, :width])
    return draws.to(rows.device)


def _times_by_rank(rows: Tensor, by_rank: Tensor) -> Tensor:
    """Rows times factors (.., d_in), the first of which is for the smallest entry of the row."""
    keys = rows.abs().float().view(torch.int32).long().bitwise_left_shift_(32)
    keys |= torch.arange(rows.shape[-1], device=rows.device)
    # The bits of a magnitude are in the order of its value, so that sorting these integers sorts
    # the columns by magnitude. numpy's vectorised sort is 20 times as fast as torch's on a CPU.
    if rows.device.type == "cpu":
        keys.numpy().sort(axis=-1)
    else:
        keys = keys.sort(dim=-1).values
    columns = keys.bitwise_and_(2**32 - 1)
    return rows.mul_(torch.empty_like(by_rank).scatter_(-1, columns, by_rank))
