"""The tasks' metrics for many weightings of the rows at once, as a bootstrap needs them.

The same numbers as trainers.metrics, which sees every row once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.predictions import Column, Predicted
from merge_algorithms.errors import UserError, suggest

Array = NDArray[np.float64]
METRICS = (
    *("accuracy", "f1", "matthews", "pearson", "spearman"),
    *("token_accuracy", "log_likelihood"),
)


def metric_of(name: str, rows: Predicted, counts: Array, classes: int) -> Array:
    """A metric of resampled rows.

    Args:
        name: A task's metric; "a+b" is the mean of a and b.
        rows: n rows.
        counts: (resamples, n), how often each row was drawn.
        classes: Number of classes; not used for a regression.

    Returns:
        (resamples,) scores; what is undefined counts as 0.
    """
    parts = [_part(part, rows, counts, classes) for part in name.split("+")]
    return np.mean(parts, axis=0)


def _part(name: str, rows: Predicted, counts: Array, classes: int) -> Array:
    labels, values, _ = rows
    match name:
        case "accuracy":
            return counts @ (labels == values) / counts.sum(axis=1)
        case "f1":
            return _f1(labels, values, counts, classes)
        case "matthews":
            return _matthews(labels, values, counts, classes)
        case "pearson":
            return _pearson(labels.astype(float), values.astype(float), counts)
        case "spearman":
            return _pearson(_ranks(labels, counts), _ranks(values, counts), counts)
        case "token_accuracy" | "log_likelihood" if values.ndim < 2:
            raise UserError(
                "these predictions of a language model are of an earlier version: run the benchmark"
                " again, which predicts anew with the adapters that are there"
            )
        case "token_accuracy":
            return (counts @ values[:, 1]) / (counts @ labels)
        case "log_likelihood":
            return -(counts @ values[:, 0]) / (counts @ labels)
        case _:
            raise UserError(
                f"the metric '{name}' cannot be computed from predictions row by row:"
                f" {suggest(name, METRICS)}"
            )


def _margins(
    labels: Column, values: Column, counts: Array, classes: int
) -> tuple[Array, Array, Array]:
    """(resamples, classes) rows of every class that were found, that there were, that were said."""
    true, said = (column[:, None] == np.arange(classes) for column in (labels, values))
    found, there, told = (counts @ matrix.astype(float) for matrix in (true & said, true, said))
    return found, there, told


def _f1(labels: Column, values: Column, counts: Array, classes: int) -> Array:
    """Of class 1 if there are two, else the mean over the classes that occur."""
    found, there, told = _margins(labels, values, counts, classes)
    scores = _ratio(2 * found, there + told)
    if classes == 2:
        return scores[:, 1]
    return _ratio(scores.sum(axis=1), (there + told > 0).sum(axis=1).astype(float))


def _matthews(labels: Column, values: Column, counts: Array, classes: int) -> Array:
    """Matthews' correlation coefficient for any number of classes (Gorodkin 2004)."""
    found, there, told = _margins(labels, values, counts, classes)
    rows = counts.sum(axis=1)
    covariance = found.sum(axis=1) * rows - (there * told).sum(axis=1)
    spread = rows**2 - (there**2).sum(axis=1), rows**2 - (told**2).sum(axis=1)
    return _ratio(covariance, np.sqrt(spread[0] * spread[1]))


def _pearson(x: Array, y: Array, counts: Array) -> Array:
    """x and y are (n,), or (resamples, n)."""
    dx, dy = (_centred(column, counts) for column in (x, y))
    covariance = (counts * dx * dy).sum(axis=1)
    variances = []
    for column, deviation in ((x, dx), (y, dy)):
        variance = (counts * deviation**2).sum(axis=1)
        # What is left of a constant after rounding is no variance.
        rounding = counts.shape[1] * (1e-12 * np.abs(column).max()) ** 2
        variances.append(np.where(variance > rounding, variance, 0.0))
    return _ratio(covariance, np.sqrt(variances[0] * variances[1]))


def _centred(column: Array, counts: Array) -> Array:
    mean = (counts * column).sum(axis=1) / counts.sum(axis=1)
    centred: Array = column - mean[:, None]
    return centred


def _ranks(column: Column, counts: Array) -> Array:
    """(resamples, n) ranks of every row's value among those drawn; equals share their mean."""
    _, group = np.unique(column, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks: Array = drawn.cumsum(axis=1) - drawn + (drawn + 1) / 2
    return ranks[:, group]


def _ratio(numerator: Array, denominator: Array) -> Array:
    """0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
