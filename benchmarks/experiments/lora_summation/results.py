"""What the study measured: the schema of its results.json and of the tidy results.csv."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.experiments.lora_summation.predictors import PREDICTORS
from benchmarks.experiments.lora_summation.relation import ALL, FILE, Relation
from benchmarks.experiments.lora_summation.settings import PAPER, SUM, UNION
from benchmarks.experiments.lora_summation.statistics import Fit, fit
from benchmarks.results import Summary, summarise, without_nan
from merge_algorithms.files import atomic_file

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One measured perplexity: a row of results.csv.

    Attributes:
        seed: Training seed.
        init: Initialisation of the adapters that are combined.
        combination: Their tasks.
        method: A merging method; 'base' no adapter, 'individual' every task with its own, 'joint'
            one adapter trained on the merged data.
        task: Whose test rows: a task, or 'union' for those of all tasks of the combination.
        coefficient: Scale of the merged update.
        perplexity: exp of the mean loss per token.
        perplexity_stderr: Its standard error over rows.
        change: Percent by which it differs from that of 'joint' on the same rows.
        change_stderr: The standard error of that, paired over rows.
        rms_cosine: Of the combination's adapters.
        interference: Of the combination's adapters on each other's data.
    """

    seed: int
    init: str
    combination: tuple[str, ...]
    method: str
    task: str
    coefficient: float
    perplexity: float
    perplexity_stderr: float
    change: float
    change_stderr: float
    rms_cosine: float
    interference: float


@dataclass(frozen=True)
class HigherRow:
    """One subset of the higher-order study: a row of higher_order.csv.

    Attributes:
        seed: Training seed.
        init: Initialisation of the adapters.
        subset: The adapters.
        method: How they were merged.
        change_individual: Percent change in perplexity against each adapter alone on its domain.
        change_base: The same against no adapter.
        rms_cosine: Of the subset.
        interference: Of the subset.
    """

    seed: int
    init: str
    subset: tuple[str, ...]
    method: str
    change_individual: float
    change_base: float
    rms_cosine: float
    interference: float


@dataclass
class Summation:
    """Everything that the study measured.

    Attributes:
        name: Name of the run.
        suite: Name of the suite.
        preset: Name of its preset.
        model: The base model.
        created: When, ISO 8601.
        tasks: The tasks.
        truncated: Task -> part -> rows, tokens that the maximal length cut off, of_rows.
        settings: What was run.
        versions: Package -> version.
        rows: Every measured perplexity.
        higher_order: The subsets of the higher-order study.
    """

    name: str
    suite: str
    preset: str
    model: str
    created: str
    tasks: list[str]
    truncated: dict[str, dict[str, dict[str, int]]]
    settings: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    higher_order: list[HigherRow] = field(default_factory=list)

    def seeds(self) -> list[int]:
        """The seeds that are there."""
        return list(dict.fromkeys(row.seed for row in self.rows))

    def inits(self) -> list[str]:
        """The initialisations that are there."""
        return list(dict.fromkeys(row.init for row in self.rows))

    def combinations(self) -> list[tuple[str, ...]]:
        """The combinations that are there."""
        return list(dict.fromkeys(row.combination for row in self.rows))

    def methods(self) -> list[str]:
        """The methods that are there, 'base', 'individual' and 'joint' first."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def select(
        self, init: str, combination: Sequence[str], method: str, task: str = UNION
    ) -> list[Row]:
        """One measurement, by seed."""
        wanted = (init, tuple(combination), method, task)
        return [r for r in self.rows if (r.init, r.combination, r.method, r.task) == wanted]

    def mean(self, quantity: str, rows: Iterable[Row]) -> Summary:
        """Over seeds, of one number of some rows."""
        return summarise(float(getattr(row, quantity)) for row in rows)

    def points(self, init: str = ALL, means: bool = False) -> list[Row]:
        """The sums on the union: what the predictors are to predict.

        Args:
            init: One initialisation, or all.
            means: One point for each combination, the mean over seeds, in place of one per seed.
        """
        rows = [r for r in self.rows if r.method == SUM and r.task == UNION]
        rows = [row for row in rows if init in (ALL, row.init)]
        if not means:
            return rows
        grouped: defaultdict[tuple[str, tuple[str, ...]], list[Row]] = defaultdict(list)
        for row in rows:
            grouped[row.init, row.combination].append(row)
        return [
            dataclasses.replace(
                group[0],
                change=self.mean("change", group).mean,
                rms_cosine=self.mean("rms_cosine", group).mean,
                interference=self.mean("interference", group).mean,
            )
            for group in grouped.values()
        ]

    def fits(self, init: str = ALL, means: bool = False) -> dict[str, Fit]:
        """Predictor -> the line of the sum's change on it, where there can be one."""
        points = self.points(init, means)
        changes = [row.change for row in points]
        found = {p: fit([getattr(row, p) for row in points], changes) for p in PREDICTORS}
        return {predictor: line for predictor, line in found.items() if line is not None}

    def relation(self) -> Relation:
        """What `osrm inspect` predicts from."""
        fits = {init: self.fits(init) for init in (ALL, *self.inits())}
        return Relation(self.model, tuple(self.tasks), fits)

    def save(self, directory: str | Path) -> None:
        """Write results.json, results.csv, higher_order.csv and relation.json."""
        directory = Path(directory)
        content = {
            "schema": SCHEMA,
            **{
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(self)
                if f.name not in ("rows", "higher_order")
            },
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "higher_order": [dataclasses.asdict(row) for row in self.higher_order],
            "fits": {
                f"{init}{' means' if means else ''}": {
                    name: dataclasses.asdict(line) for name, line in self.fits(init, means).items()
                }
                for init in (ALL, *self.inits())
                for means in (False, True)
            },
            "paper": {"+".join(pair): figure for pair, figure in PAPER.items()},
        }
        with atomic_file(directory / "results.json") as file:
            text = json.dumps(without_nan(content), indent=1) + "\n"
            file.write_text(text, encoding="utf-8")
        _write_csv(directory / "results.csv", Row, self.rows)
        _write_csv(directory / "higher_order.csv", HigherRow, self.higher_order)
        self.relation().save(directory / FILE)


def _write_csv(path: Path, kind: type, rows: Iterable[Any]) -> None:
    names = [f.name for f in dataclasses.fields(kind)]
    with atomic_file(path) as file, file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow("+".join(v) if isinstance(v, tuple) else v for v in values)
