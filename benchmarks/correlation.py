"""Which diagnostic goes with what merging costs, over the arms and tasks of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.predictions import Predicted
from benchmarks.results import INDIVIDUAL, Results
from benchmarks.scores import metric_of

RECEIVED = "received"
LEAST = 3  # points below which a rank correlation says nothing


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a diagnostic with the loss, individual minus merged score.

    Attributes:
        diagnostic: Its name; 'received' is what the other tasks' adapters do to the task's inputs,
            each relative to what it does to its own (a column of the interference matrix).
        points: Pairs of an arm and a task.
        pooled: Over all of them.
        within: Over the arms, for every task apart; the mean over tasks.
    """

    diagnostic: str
    points: int
    pooled: float
    within: float


def correlations(results: Results) -> list[Correlation]:
    """One for every diagnostic; each arm merged as is best on validation, means over seeds."""
    losses: dict[tuple[str, str], float] = {}
    for arm in results.arm_names():
        merge = results.best_merge(arm)
        for task in (info.name for info in results.tasks):
            if merge is not None:
                alone = results.score(arm, INDIVIDUAL, task).mean
                losses[arm, task] = alone - results.score(arm, merge, task).mean
    names = dict.fromkeys(name for arm in results.arms for name in arm.diagnostics)
    by_name = {
        name: {(a, t): results.diagnostic(a, name, t).mean for a, t in losses} for name in names
    }
    by_name[RECEIVED] = _received(results)
    return [_correlation(name, values, losses) for name, values in by_name.items()]


def _correlation(
    name: str, values: dict[tuple[str, str], float], losses: dict[tuple[str, str], float]
) -> Correlation:
    known = [pair for pair in losses if math.isfinite(losses[pair] + values.get(pair, math.nan))]
    by_task = [[pair for pair in known if pair[1] == task] for task in {t: None for _, t in known}]
    within = [
        _spearman([values[pair] for pair in pairs], [losses[pair] for pair in pairs])
        for pairs in by_task
    ]
    defined = [value for value in within if not math.isnan(value)]
    return Correlation(
        diagnostic=name,
        points=len(known),
        pooled=_spearman([values[pair] for pair in known], [losses[pair] for pair in known]),
        within=statistics.fmean(defined) if defined else math.nan,
    )


def _received(results: Results) -> dict[tuple[str, str], float]:
    received = {}
    for arm in results.arm_names():
        matrix = np.array(results.interference(arm))
        for index, task in enumerate(results.tasks):
            if len(matrix) == len(results.tasks):
                others = np.delete(matrix[:, index], index)
                received[arm, task.name] = float(others.mean())
    return received


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """NaN where it says nothing: few points, or all values equal."""
    if len(x) < LEAST or len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    rows = Predicted(np.array(x), np.array(y), np.arange(len(x)))
    return float(metric_of("spearman", rows, np.ones((1, len(x))), classes=1)[0])
