"""A merging method that a package of its own adds to osrm.

Installing the package is all: its pyproject.toml names this module in the entry-point group
osrm.merge_methods, and `osrm merge --method trimmed_mean` knows the method and its option.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from merge_algorithms import UserError
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.tiles import Tiled


@register(
    summary="mean of each entry without its extremes",
    paper="Yin et al. 2018, arXiv 1803.01498",
)
def trimmed_mean(tasks: TaskVectors, *, cut: float = 0.25) -> dict[str, Tiled]:
    """Coordinate-wise trimmed mean of the w_t dW_t (arXiv 1803.01498, definition 2).

    Args:
        cut: Share of the adapters that is left out at either end, entry by entry, in [0, 1/2);
            rounded down to a number of adapters.
    """
    if not 0 <= cut < 0.5:
        raise UserError(f"trimmed_mean: cut={cut} is outside [0, 1/2): give a share such as 0.25")
    dropped = int(cut * len(tasks.names))

    def compute(module: str, start: int, stop: int) -> Tensor:
        updates = zip(tasks.weights, tasks.modules[module], strict=True)
        rows = torch.stack([weight * update.rows(start, stop) for weight, update in updates])
        return rows.sort(0).values[dropped : len(rows) - dropped].mean(0)

    return {
        module: Tiled(updates[0].shape, partial(compute, module), copies=len(updates))
        for module, updates in tasks.modules.items()
    }
