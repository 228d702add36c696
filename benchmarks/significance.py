"""Whether a difference is more than the luck of the test rows: a paired bootstrap.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13; paired as in
Berg-Kirkpatrick, Burkett and Klein, An Empirical Investigation of Statistical Significance in NLP
(2012). It answers for the rows: the spread over seeds is apart. What is drawn are groups of rows
(Task.group), such as the texts that answer one question, all or none: they are right or wrong
together (the cluster bootstrap of Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.predictions import Column, Predicted, Predictions, load_predictions
from benchmarks.results import CHOSEN, INDIVIDUAL, UNTUNED, Arm, Results
from benchmarks.scores import Array, metric_of
from merge_algorithms.errors import UserError, suggest

RESAMPLES = 2000
CELLS = 4_000_000  # of the counts that are held at once


class Side(NamedTuple):
    """What is compared: an arm, how its adapters are used, at which coefficient."""

    arm: str
    merge: str
    setting: str = CHOSEN

    def __str__(self) -> str:
        return f"{self.arm}/{self.merge}" + ("@1" if self.setting == UNTUNED else "")

    @classmethod
    def parse(cls, text: str) -> Side:
        """`ARM/MERGE`, with '@1' at its end for coefficient 1 in place of the chosen one."""
        arm, slash, merge = text.partition("/")
        if not slash or not arm or not merge:
            raise UserError(
                f"'{text}' names no side of a comparison: write ARM/MERGE, such as lora/ties,"
                " ARM/individual, or ARM/MERGE@1 for coefficient 1"
            )
        setting = UNTUNED if merge.endswith("@1") and merge != f"{INDIVIDUAL}@1" else CHOSEN
        return cls(arm, merge.removesuffix("@1"), setting)


@dataclass(frozen=True)
class Comparison:
    """One side against another.

    Attributes:
        first: The one.
        second: The other.
        means: Their average test scores, mean over seeds.
        difference: The first's minus the second's.
        low: Lower end of the 95 % interval of the difference.
        high: Its upper end.
        p: Two-sided: how often resampled rows would say that the other is better, twice.
    """

    first: Side
    second: Side
    means: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float


class Bootstrap:
    """Resampled average test scores of several sides, all on the same resamples.

    Groups of rows are drawn with replacement within every task; a side's score is the mean over
    tasks of the headline metric, each the mean over seeds.

    Args:
        results: Of a finished run.
        run_dir: Its directory.
        sides: What is to be compared.
        resamples: How many.
        seed: Of the resamples.

    Raises:
        UserError: A side that the run does not have, or sides scored on different rows.
    """

    def __init__(
        self,
        results: Results,
        run_dir: Path,
        sides: Sequence[Side],
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.resamples = resamples
        rows = {side: list(_predictions(results, run_dir, side)) for side in sides}
        self.means = dict.fromkeys(sides, 0.0)
        self.scores = {side: np.zeros(resamples) for side in sides}
        share = 1 / len(results.tasks)
        for index, task in enumerate(results.tasks):
            by_seed = {side: [found[task.name] for found in rows[side]] for side in sides}
            groups = _shared_rows(by_seed, task.name).groups
            once = np.ones((1, len(groups)))
            random = np.random.default_rng([seed, index])
            step = max(CELLS // len(groups), 1)
            for side in sides:
                for found in by_seed[side]:
                    score = metric_of(task.metric, found, once, task.classes)[0]
                    self.means[side] += share * float(score) / len(by_seed[side])
            for start in range(0, resamples, step):
                part = slice(start, min(start + step, resamples))
                counts = _draw(random, part.stop - start, groups)
                for side in sides:
                    for found in by_seed[side]:
                        scores = metric_of(task.metric, found, counts, task.classes)
                        self.scores[side][part] += share * scores / len(by_seed[side])

    def compare(self, first: Side, second: Side) -> Comparison:
        """The difference of two of the sides."""
        differences = self.scores[first] - self.scores[second]
        low, high = np.quantile(differences, [0.025, 0.975])
        # The rows that were really drawn count as one resample: p is never 0.
        worse, better = (1 + (differences <= 0).sum()), (1 + (differences >= 0).sum())
        return Comparison(
            first=first,
            second=second,
            means=(self.means[first], self.means[second]),
            difference=self.means[first] - self.means[second],
            low=float(low),
            high=float(high),
            p=min(1.0, 2 * float(min(worse, better)) / (self.resamples + 1)),
        )


def best_side(results: Results, arm: str) -> Side:
    """The arm's best merge on validation; its individual adapters if it has none."""
    return Side(arm, results.best_merge(arm) or INDIVIDUAL)


def paired(results: Results, run_dir: Path, first: Side, second: Side) -> bool:
    """Whether both were scored on the same test rows in the same order.

    Rows are scored longest first, so another max_length can mean another order.
    """
    one, other = (next(_predictions(results, run_dir, side)) for side in (first, second))
    return all(np.array_equal(rows.labels, other[task].labels) for task, rows in one.items())


def _predictions(results: Results, run_dir: Path, side: Side) -> Iterator[Predictions]:
    """The side's test predictions, seed by seed."""
    arms = [arm for arm in results.arms if arm.name == side.arm]
    if not arms:
        known = [arm.name for arm in results.arms]
        raise UserError(f"the run has no arm '{side.arm}': {suggest(side.arm, known)}")
    for arm in sorted(arms, key=lambda arm: arm.seed):
        yield load_predictions(run_dir / _file(arm, side), side.setting)


def _file(arm: Arm, side: Side) -> str:
    files = {merge.method: merge.predictions for merge in arm.merges}
    files |= {INDIVIDUAL: arm.predictions}
    known = [name for name, file in files.items() if file is not None]
    file = files.get(side.merge)
    if file is None:
        raise UserError(
            f"arm '{side.arm}' has no test predictions by '{side.merge}':"
            f" {suggest(side.merge, known)}"
        )
    return file


def _shared_rows(by_seed: dict[Side, list[Predicted]], task: str) -> Predicted:
    (first, reference), *others = (
        (side, rows) for side, seeds in by_seed.items() for rows in seeds
    )
    for side, rows in others:
        if not np.array_equal(rows.labels, reference.labels):
            raise UserError(
                f"{first} and {side} were not scored on the same test rows of '{task}' in the same"
                " order: compare arms of one run with one max_length"
            )
    return reference


def _draw(random: np.random.Generator, resamples: int, groups: Column) -> Array:
    """(resamples, rows): how often each row is drawn, given the (rows,) groups."""
    names, group_of = np.unique(groups, return_inverse=True)
    drawn = random.integers(0, len(names), (resamples, len(names)))
    drawn += len(names) * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * len(names))
    return counts.reshape(resamples, len(names))[:, group_of].astype(float)
