"""What a benchmark run measured: the schema of results.json and of the tidy results.csv."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_file

SCHEMA = 2
INDIVIDUAL = "individual"
RUNTIME_SUFFIX = "_runtime"  # of a merge's name: its run-time form
ALIGNED_SUFFIX = "_aligned"  # of a merge's name: with heads aligned at every coefficient
AVERAGE = "average"
AVERAGE_METRIC = "mean"
CHOSEN, UNTUNED = "chosen", "untuned"  # predictions at the chosen coefficient, and at 1

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Score:
    """One measured number: a row of results.csv.

    Attributes:
        suite: Name of the suite.
        seed: Seed of the run.
        arm: Name of the settings that the adapters were trained with.
        init: How A was initialised.
        constraint: What A was allowed to do while training.
        merge: Merge method; 'individual' is every task with its own adapter, at coefficient 1.
        coefficient: Global scale lambda of the merged update.
        chosen: Whether the validation average chose this coefficient.
        task: Task name, or 'average'.
        split: 'validation' rows cover the whole grid of coefficients; 'test' rows only the one
            that was chosen and 1, at which nothing is tuned.
        metric: Name of the metric, or 'mean' for the average of the headline metrics.
        score: Its value; NaN where it is undefined, such as a perplexity of no tokens.
    """

    suite: str
    seed: int
    arm: str
    init: str
    constraint: str
    merge: str
    coefficient: float
    chosen: bool
    task: str
    split: Split
    metric: str
    score: float


@dataclass(frozen=True)
class TaskInfo:
    """A task of the suite: its headline metric, its kind, how many rows its test score has, and
    its number of classes (1 where there are none).
    """

    name: str
    metric: str
    kind: str
    test_rows: int | None = None
    classes: int = 1


@dataclass(frozen=True)
class MergeInfo:
    """One merge of an arm: chosen coefficient, and samples (run time) or path (saved adapter).

    `lost_energy` is the largest share of a module's squared norm that the saved adapter lacks: a
    dense merge, such as TIES, is scored in full but saved at the sum of the adapters' ranks.
    `predictions` is the file of its test predictions, see benchmarks.predictions.
    """

    method: str
    coefficient: float
    runtime: bool = False
    samples: int | None = None
    path: str | None = None
    lost_energy: float | None = None
    predictions: str | None = None


@dataclass(frozen=True)
class Arm:
    """The adapters of one arm and one seed, with their diagnostics.

    Attributes:
        name: The arm's name.
        init: How A was initialised.
        constraint: What A was allowed to do while training.
        seed: Seed of the run.
        adapters: Adapter directory of every task, relative to the run directory.
        diagnostics: What was measured of the adapters, by name and task:

            - leaked_before: tr(A S A^T) / ||A||_F^2 averaged over modules right after
              initialisation, S the mean second moment of the other tasks' inputs (OSRM,
              arXiv 2505.22934),
            - leaked_after: the same after training,
            - leaked_own_ratio: the trained update's mean energy on the other tasks' inputs
              divided by that on its own,
            - whatever else the trainer measures.
        interference: T x T; row i holds adapter i's output energy on the inputs of every task j
            divided by that on its own, so the diagonal is 1.
        merges: The merges of these adapters.
        predictions: File of the individual test predictions, relative to the run directory.
    """

    name: str
    init: str
    constraint: str
    seed: int
    adapters: dict[str, str]
    diagnostics: dict[str, dict[str, float]]
    interference: list[list[float]]
    merges: list[MergeInfo]
    predictions: str | None = None


class Summary(NamedTuple):
    """Mean and sample standard deviation over `n` seeds; NaN where they are undefined."""

    mean: float
    spread: float
    n: int


def summarise(values: Iterable[float]) -> Summary:
    """Mean over seeds (NaN if any value is) and sample standard deviation (NaN below two)."""
    values = list(values)
    if not values or not all(map(math.isfinite, values)):
        return Summary(math.nan, math.nan, len(values))
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Summary(statistics.fmean(values), spread, len(values))


def merit(score: float) -> float:
    """The score; where it is undefined (the correlation of a constant), worse than any."""
    return -math.inf if math.isnan(score) else score


def area_under(curve: Mapping[float, float]) -> float:
    """Mean height of a score-coefficient curve: the area by trapezoids over the grid's width.

    Args:
        curve: Coefficient -> score, in any order; of one coefficient, its score.
    """
    points = sorted(curve.items())
    if len(points) < 2:
        return points[0][1] if points else math.nan
    area = sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(points))
    return area / (points[-1][0] - points[0][0])


@dataclass
class Results:
    """Everything a run measured, with what is needed to repeat it."""

    name: str
    suite: str
    preset: str
    model: str
    created: str
    tasks: list[TaskInfo]
    settings: dict[str, Any]
    versions: dict[str, str]
    arms: list[Arm] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    schema: int = SCHEMA

    def add_averages(self) -> None:
        """Append the mean over tasks of the headline metric, replacing averages already there.

        One row for every seed, arm, merge, coefficient and split that has a score of every task;
        it is NaN if one of them is.
        """
        self.scores = [row for row in self.scores if row.task != AVERAGE]
        headline = {task.name: task.metric for task in self.tasks}
        groups: defaultdict[Score, dict[str, float]] = defaultdict(dict)
        for row in self.scores:
            if headline.get(row.task) == row.metric:
                key = dataclasses.replace(row, task=AVERAGE, metric=AVERAGE_METRIC, score=0.0)
                groups[key][row.task] = row.score
        self.scores += [
            dataclasses.replace(key, score=statistics.fmean(by_task.values()))
            for key, by_task in groups.items()
            if len(by_task) == len(headline)
        ]

    def save(self, run_dir: str | Path) -> None:
        """Write results.json and results.csv into `run_dir`, each whole or not at all."""
        run_dir = Path(run_dir)
        text = json.dumps(without_nan(dataclasses.asdict(self)), indent=1, allow_nan=False)
        with atomic_file(run_dir / "results.json") as path:
            path.write_text(text + "\n", encoding="utf-8")
        columns = [column.name for column in dataclasses.fields(Score)]
        with (
            atomic_file(run_dir / "results.csv") as path,
            path.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(without_nan(dataclasses.astuple(row)) for row in self.scores)

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results.json, given the file or its run directory.

        Raises UserError if the file is missing, is not a results file or has another schema.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist: expected the results.json of a finished run"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON ({error}): expected the results.json of a finished run"
            ) from None
        if isinstance(data, dict) and "rows" in data:  # as experiments have, whose schema is theirs
            raise UserError(
                f"{path} is an experiment's and no result of osrm bench: give the directory of a"
                " finished run of osrm bench"
            )
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise UserError(
                f"{path} has results schema {schema}, expected {SCHEMA}: read it with the version"
                " of osrm that wrote it, or run the benchmark again"
            )
        try:
            return cls(
                **{
                    **data,
                    "tasks": [TaskInfo(**task) for task in data["tasks"]],
                    "arms": [_arm(arm) for arm in data["arms"]],
                    "scores": [
                        Score(**{**row, "score": _number(row["score"])}) for row in data["scores"]
                    ],
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a complete results file ({error}): run the benchmark again"
            ) from None

    def arm_names(self) -> list[str]:
        """Every arm's name, in the order of the scores."""
        return list(dict.fromkeys(row.arm for row in self.scores))

    def diagnosed(self) -> list[str]:
        """The arms that have adapters of their own for every task, and so diagnostics."""
        known = {arm.name for arm in self.arms if arm.diagnostics}
        return [name for name in self.arm_names() if name in known]

    def merges(self) -> list[str]:
        """Every merge method, in the order of the scores, without 'individual'."""
        return list(dict.fromkeys(row.merge for row in self.scores if row.merge != INDIVIDUAL))

    def seeds(self) -> list[int]:
        """Every seed, ascending."""
        return sorted({row.seed for row in self.scores})

    def score(self, arm: str, merge: str, task: str, split: Split = "test") -> Summary:
        """The headline metric of `task` (or 'average') over the seeds, each at what it chose."""
        rows = self._headline(arm, merge, task, split)
        return summarise(row.score for row in rows if row.chosen)

    def untuned(self, arm: str, merge: str, task: str) -> Summary:
        """The same on test rows at coefficient 1."""
        rows = self._headline(arm, merge, task, "test")
        return summarise(row.score for row in rows if row.coefficient == 1)

    def percent(self, arm: str, merge: str, task: str) -> float:
        """The merge's mean test score in % of the individual one; NaN unless that is positive."""
        individual = self.score(arm, INDIVIDUAL, task).mean
        merged = self.score(arm, merge, task).mean
        return 100 * merged / individual if individual > 0 else math.nan

    def best_merge(self, arm: str) -> str | None:
        """The arm's merge with the highest average on validation, the first of several."""
        means = {
            merge: self.score(arm, merge, AVERAGE, "validation").mean for merge in self.merges()
        }
        defined = {merge: mean for merge, mean in means.items() if not math.isnan(mean)}
        return max(defined, key=lambda merge: defined[merge], default=None)

    def coefficients(self, arm: str, merge: str) -> list[float]:
        """The coefficients the seeds chose, ascending, each once."""
        rows = self._headline(arm, merge, AVERAGE, "test")
        return sorted({row.coefficient for row in rows if row.chosen})

    def curve(self, arm: str, merge: str) -> dict[float, Summary]:
        """Validation average by coefficient, ascending."""
        points: defaultdict[float, list[float]] = defaultdict(list)
        for row in self._headline(arm, merge, AVERAGE, "validation"):
            points[row.coefficient].append(row.score)
        return {coefficient: summarise(points[coefficient]) for coefficient in sorted(points)}

    def diagnostic(self, arm: str, name: str, task: str) -> Summary:
        """One of the diagnostics of `task`, or of the mean over tasks, over the seeds."""
        tasks = [info.name for info in self.tasks] if task == AVERAGE else [task]
        return summarise(
            statistics.fmean(one.diagnostics.get(name, {}).get(t, math.nan) for t in tasks)
            for one in self._arms(arm)
        )

    def interference(self, arm: str) -> list[list[float]]:
        """The T x T interference matrix, averaged over the seeds; empty without arms."""
        matrices = [one.interference for one in self._arms(arm)]
        return [
            [statistics.fmean(cells) for cells in zip(*rows, strict=True)]
            for rows in zip(*matrices, strict=True)
        ]

    def _headline(self, arm: str, merge: str, task: str, split: Split) -> list[Score]:
        metric = {info.name: info.metric for info in self.tasks}.get(task, AVERAGE_METRIC)
        wanted = (arm, merge, task, split, metric)
        return [
            row
            for row in self.scores
            if (row.arm, row.merge, row.task, row.split, row.metric) == wanted
        ]

    def _arms(self, name: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.name == name]


def without_nan(value: Any) -> Any:
    """The same nested value with null for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _arm(data: dict[str, Any]) -> Arm:
    diagnostics = {
        name: {task: _number(value) for task, value in by_task.items()}
        for name, by_task in data["diagnostics"].items()
    }
    matrix = [[_number(cell) for cell in row] for row in data["interference"]]
    merges = [MergeInfo(**merge) for merge in data["merges"]]
    return Arm(**{**data, "diagnostics": diagnostics, "interference": matrix, "merges": merges})
