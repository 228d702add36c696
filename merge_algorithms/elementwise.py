"""Methods that decide entry by entry: trim, elect a sign, combine what agrees.

They are dense by nature. A method picks one function for each step; `_merge` evaluates them
tile by tile, so that T tiles of rows are the most that exists at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from merge_algorithms.errors import UserError
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.tiles import Tiled, row_tiles, top_threshold

# (module, task, rows of that update (n, d_in)) -> what is left of them
Trim = Callable[[str, int, Tensor], Tensor]
# weighted rows of all tasks (T, n, d_in) -> elected sign of every entry (n, d_in), +1 or -1
Elect = Callable[[Tensor], Tensor]
# (magnitudes of the entries that agree with the elected sign, 0 where they do not (T, n, d_in),
# weights (T, 1, 1)) -> magnitudes of the merged entries (n, d_in)
Combine = Callable[[Tensor, Tensor], Tensor]


@register(
    summary="trim small entries, elect a sign, merge what agrees",
    paper="Yadav et al. 2023, arXiv 2306.01708",
)
def ties(
    tasks: TaskVectors,
    *,
    density: float = 0.2,
    scope: Literal["global", "tensor"] = "global",
    combine: Literal["mean", "sum", "weighted"] = "mean",
) -> dict[str, Tiled]:
    """TIES-Merging (arXiv 2306.01708, algorithm 1).

    Trim: of the n entries of dW_t, the density * n largest by magnitude stay (rounded down, at
    least one), and all that equal the smallest of them; comparisons are made in float32. The
    authors' code keeps one entry more (it compares with the next smaller value). A module that an
    adapter lacks counts as zeros.
    Weights: the trimmed update of task t is multiplied by w_t, and everything after uses the
    product: a task of weight 0 neither votes nor counts, one of weight 2 votes twice.
    Elect: the sign of sum_t w_t trimmed_t; where that is exactly 0, the sign of the majority of
    all elected signs over the whole model (-1 if even they cancel, as in the authors' code).
    Combine: over the tasks whose entry has the elected sign.

    Args:
        density: Share of each adapter's entries that is kept, in (0, 1].
        scope: What the share refers to: 'global' is the whole adapter (the authors), 'tensor'
            each module on its own (mergekit, PEFT).
        combine: 'mean' divides the agreeing sum by the number of agreeing tasks (the authors'
            dis-mean), 'weighted' by the sum of their |w_t|, 'sum' by nothing.

    Returns:
        Updates that are evaluated on demand; the thresholds and the majority are found here.
    """
    if not 0 < density <= 1:
        raise UserError(f"ties: density={density} is outside (0, 1]: give a share such as 0.2")
    trim = partial(_above, _thresholds(tasks, density, scope))
    return _merge(tasks, trim, partial(_sum_sign, _majority(tasks, trim)), _COMBINE[combine])


def _merge(tasks: TaskVectors, trim: Trim, elect: Elect, combine: Combine) -> dict[str, Tiled]:
    """The lazily evaluated merge made of the three steps."""

    def compute(module: str, start: int, stop: int) -> Tensor:
        rows, weights = _weighted(tasks, trim, module, start, stop)
        signs = elect(rows)
        return combine(rows.mul_(signs).clamp_(min=0), weights) * signs

    return {
        module: Tiled(updates[0].shape, partial(compute, module), copies=len(updates))
        for module, updates in tasks.modules.items()
    }


def _weighted(
    tasks: TaskVectors, trim: Trim, module: str, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Rows of w_t trimmed_t for all tasks (T, n, d_in), and the weights (T, 1, 1)."""
    updates = enumerate(tasks.modules[module])
    rows = torch.stack([trim(module, t, update.rows(start, stop)) for t, update in updates])
    weights = torch.tensor(tasks.weights, dtype=rows.dtype, device=rows.device)[:, None, None]
    return rows.mul_(weights), weights


def _thresholds(tasks: TaskVectors, density: float, scope: str) -> dict[str, list[float]]:
    """Per module, the T magnitudes from which on entries are kept."""
    groups = [[m] for m in tasks.modules] if scope == "tensor" else [list(tasks.modules)]
    thresholds: dict[str, list[float]] = {}
    for group in groups:
        shapes = [tasks.modules[module][0].shape for module in group]
        # 0.29 * 100 is a little less than 29 in floating point, but means 29.
        share = density * sum(d_out * d_in for d_out, d_in in shapes)
        keep = max(1, int(share * (1 + 1e-12)))
        found = [
            top_threshold([tasks.modules[module][t] for module in group], keep)
            for t in range(len(tasks.names))
        ]
        thresholds |= dict.fromkeys(group, found)
    return thresholds


def _above(thresholds: dict[str, list[float]], module: str, task: int, rows: Tensor) -> Tensor:
    kept = hardshrink(rows.float(), thresholds[module][task])  # x where |x| > threshold, else 0
    return kept if rows.dtype == torch.float32 else rows.where(kept != 0, 0.0)


def _majority(tasks: TaskVectors, trim: Trim) -> int:
    balance = 0
    for module, updates in tasks.modules.items():
        for start, stop in row_tiles(updates[0].shape, copies=len(updates)):
            rows, _ = _weighted(tasks, trim, module, start, stop)
            balance += int(rows.sum(0).sign_().sum(dtype=torch.float64))
    return 1 if balance > 0 else -1


def _sum_sign(majority: int, rows: Tensor) -> Tensor:
    signs = rows.sum(0).sign_()
    return signs.masked_fill_(signs == 0, majority)


def _sum(agreeing: Tensor, weights: Tensor) -> Tensor:
    return agreeing.sum(0)


def _mean(agreeing: Tensor, weights: Tensor) -> Tensor:
    return agreeing.sum(0) / agreeing.sign().sum(0).clamp_(min=1)


def _weighted_mean(agreeing: Tensor, weights: Tensor) -> Tensor:
    total = (agreeing.sign() * weights.abs()).sum(0)
    return agreeing.sum(0) / total.masked_fill_(total == 0, 1)


_COMBINE: dict[str, Combine] = {"mean": _mean, "sum": _sum, "weighted": _weighted_mean}
