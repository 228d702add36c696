"""Perplexities with standard errors, paired changes, and the regression of one on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.causal import RowLosses

Column = NDArray[np.float64]

LARGEST = 700.0  # whose exponential a float holds


@dataclass(frozen=True)
class Rows:
    """Test rows under one model, in a fixed order.

    Attributes:
        nll: Summed -log p of every row, (n,).
        tokens: Counted tokens of every row, (n,).
        sizes: How many rows each domain has, one domain after the other; all are of one by default.
    """

    nll: Column
    tokens: Column
    sizes: tuple[int, ...] = ()

    @staticmethod
    def of(losses: RowLosses) -> Rows:
        """The rows that a model was scored on."""
        return Rows(losses.nll.numpy(), losses.tokens.numpy().astype(float))

    @staticmethod
    def from_json(content: dict[str, list[float]]) -> Rows:
        """What `as_json` gave."""
        return Rows(np.array(content["nll"]), np.array(content["tokens"]))

    def as_json(self) -> dict[str, list[float]]:
        """For a file."""
        return {"nll": self.nll.tolist(), "tokens": self.tokens.tolist()}

    @staticmethod
    def union(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, each of which is a domain."""
        return Rows(
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            tuple(len(part.nll) for part in parts),
        )

    @property
    def loss(self) -> float:
        """Nats per token, every token weighing the same."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def residuals(self) -> Column:
        """nll - loss * tokens: what each row adds to the variance of the loss."""
        return self.nll - self.loss * self.tokens


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error over rows."""

    value: float
    stderr: float


def perplexity(rows: Rows) -> Estimate:
    """exp(loss), with the delta method's standard error for a ratio over independent rows."""
    value = math.exp(min(rows.loss, LARGEST))
    return Estimate(value, value * _stderr(rows.residuals, rows))


def change(rows: Rows, reference: Rows) -> Estimate:
    """Percent by which the perplexity differs from the reference's on the same rows.

    100 (exp(L - L_ref) - 1); the error is that of the paired difference, whose rows' common
    difficulty cancels.
    """
    ratio = math.exp(min(rows.loss - reference.loss, LARGEST))
    error = _stderr(rows.residuals - reference.residuals, rows)
    return Estimate(100 * (ratio - 1), 100 * ratio * error)


def _stderr(residuals: Column, rows: Rows) -> float:
    """Of a mean over tokens; how many rows each domain has is chosen, so only rows within vary."""
    domains = np.split(residuals, np.cumsum(rows.sizes)[:-1])
    if min(map(len, domains)) < 2:
        return math.inf
    variance = sum(len(domain) * float(domain.var(ddof=1)) for domain in domains)
    return math.sqrt(variance) / float(rows.tokens.sum())


@dataclass(frozen=True)
class Fit:
    """A straight line y = intercept + slope x by least squares, and how well it does.

    Attributes:
        intercept: y at x = 0.
        slope: Change of y with x.
        slope_stderr: Its standard error.
        r2: Share of the variance of y that the line explains.
        spearman: Rank correlation of x and y.
        p: Share of the orders of y whose rank correlation is at least as large either way.
        points: How many.
        x_mean: Mean of x.
        x_spread: Sum of the squared distances of x from it.
        x_range: Least and largest x.
        residual_std: Spread of y around the line, with points - 2 degrees of freedom.
    """

    intercept: float
    slope: float
    slope_stderr: float
    r2: float
    spearman: float
    p: float
    points: int
    x_mean: float
    x_spread: float
    x_range: tuple[float, float]
    residual_std: float

    @staticmethod
    def from_json(content: dict[str, Any]) -> Fit:
        """What asdict gave; ValueError, KeyError, TypeError or AttributeError for anything else."""
        low, high = content["x_range"]
        numbers: dict[str, Any] = {
            name: math.nan if value is None else float(value)
            for name, value in content.items()
            if name != "x_range"
        }
        numbers["points"] = int(numbers["points"])
        return Fit(**numbers, x_range=(float(low), float(high)))

    def predict(self, x: float, confidence: float = 0.95) -> tuple[float, float]:
        """The expected y at x, and the half width of its prediction interval: for one new point."""
        y = self.intercept + self.slope * x
        if self.points < 3 or not self.x_spread:
            return y, math.inf
        error = self.residual_std * math.sqrt(
            1 + 1 / self.points + (x - self.x_mean) ** 2 / self.x_spread
        )
        return y, student_quantile((1 + confidence) / 2, self.points - 2) * error


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The line through points; None of fewer than 3, or if all x are equal."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    centred = xs - xs.mean() if len(xs) else xs
    spread = float(centred @ centred)
    if len(xs) < 3 or not spread:
        return None
    slope = float(centred @ ys) / spread
    intercept = float(ys.mean()) - slope * float(xs.mean())
    residuals = ys - intercept - slope * xs
    total = float(((ys - ys.mean()) ** 2).sum())
    unexplained = float(residuals @ residuals)
    std = math.sqrt(unexplained / (len(xs) - 2))
    rho, p = spearman(xs, ys)
    return Fit(
        intercept=intercept,
        slope=slope,
        slope_stderr=std / math.sqrt(spread),
        r2=1 - unexplained / total if total else math.nan,
        spearman=rho,
        p=p,
        points=len(xs),
        x_mean=float(xs.mean()),
        x_spread=spread,
        x_range=(float(xs.min()), float(xs.max())),
        residual_std=std,
    )


def spearman(x: Column, y: Column, draws: int = 10_000) -> tuple[float, float]:
    """Spearman's rank correlation, ties at their mean rank, and its two-sided permutation p.

    The p counts points as exchangeable: those of one seed share adapters, so it flatters. It is
    from `draws` seeded permutations, at least 1 / (draws + 1).
    """
    rx, ry = (_centred_ranks(values) for values in (x, y))
    scale = math.sqrt(float(rx @ rx) * float(ry @ ry))
    if not scale:
        return math.nan, math.nan
    rho = float(rx @ ry) / scale
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(np.tile(ry, (draws, 1)), axis=1) @ rx / scale
    return rho, (1 + int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())) / (draws + 1)


def _centred_ranks(values: Column) -> Column:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return np.asarray(ranks - ranks.mean(), float)


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else to about 1 %.

    Cornish and Fisher's expansion around the normal quantile (Abramowitz and Stegun 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
