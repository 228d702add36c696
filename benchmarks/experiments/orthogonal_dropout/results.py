"""What the study measured: the schema of its results.json and of the tidy results.csv."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import summarise, without_nan
from merge_algorithms.files import atomic_file

SCHEMA = 1
AVERAGE = "average"
REAL, ALONE, INDIVIDUAL = "real renderings", "one adapter", "individual"


@dataclass(frozen=True)
class Row:
    """One measured number: a row of results.csv. What does not apply is left empty.

    Attributes:
        part: 'redundancy', 'images' or 'text'.
        seed: Of training and sampling.
        init: Initialisation of the adapters.
        method: How adapters act: a merging method (its run-time form where `samples` is given),
            or a reference: one adapter alone, every task with its own, real renderings.
        task: The task, or the object.
        metric: What was measured.
        value: The number.
        style: The style that the object was merged with.
        samples: Draws of the masks that were averaged.
        drop_rate: Of a single adapter.
        dropout: LoRA dropout that the adapter was trained with.
        coefficient: Scale of the merged update, chosen on validation rows.
    """

    part: str
    seed: int
    init: str
    method: str
    task: str
    metric: str
    value: float
    style: str = ""
    samples: int | None = None
    drop_rate: float | None = None
    dropout: float | None = None
    coefficient: float | None = None

    @property
    def label(self) -> str:
        """The method with its number of draws, as tables name it."""
        if self.samples is None or self.method == "direct":
            return self.method
        return f"{self.method}, K = {self.samples}"


class Mean(NamedTuple):
    """A mean, its standard error over the units that were averaged, and how many there were."""

    value: float
    error: float
    units: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Of independent units; NaN without any, or where one is not finite."""
        mean, spread, units = summarise(values)
        return cls(mean, spread / math.sqrt(max(units, 1)), units)

    def __str__(self) -> str:
        if not self.units:
            return "-"
        spread = "" if math.isnan(self.error) else f" ± {self.error:.3f}"
        return f"{self.value:.3f}{spread}"


@dataclass
class Measured:
    """Everything that the study measured.

    Attributes:
        name: Name of the run.
        created: When, ISO 8601.
        settings: What was run.
        versions: Package -> version.
        facts: Other numbers to know, such as the judges' accuracy.
        rows: Every measured number.
        pictures: Title -> PNG files of samples below the run directory.
    """

    name: str
    created: str
    settings: dict[str, Any]
    versions: dict[str, str]
    facts: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)

    def select(self, **wanted: Any) -> list[Row]:
        """The rows whose fields are these."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in wanted.items())]

    def values(self, key: str, **wanted: Any) -> list[Any]:
        """The different values of a field among such rows, in the order of their appearance."""
        return list(dict.fromkeys(getattr(row, key) for row in self.select(**wanted)))

    def mean(self, **wanted: Any) -> Mean:
        """Over all such rows."""
        return Mean.of(row.value for row in self.select(**wanted))

    def mean_of(self, label: str, styled: bool = False, **wanted: Any) -> Mean:
        """Over the rows of one label; `styled`: only those of an object in a style."""
        rows = [row for row in self.select(**wanted) if row.label == label]
        return Mean.of(row.value for row in rows if row.style or not styled)

    def difference(self, label: str, other: str, keys: Sequence[str], **wanted: Any) -> Mean:
        """Of two methods' values, paired: the mean over units that agree in `keys`."""
        rows = self.select(**wanted)
        first = {tuple(getattr(r, k) for k in keys): r.value for r in rows if r.label == label}
        second = {tuple(getattr(r, k) for k in keys): r.value for r in rows if r.label == other}
        return Mean.of(first[unit] - second[unit] for unit in first if unit in second)

    def save(self, directory: str | Path) -> None:
        """Write results.json and results.csv."""
        directory = Path(directory)
        content = {
            "schema": SCHEMA,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"},
            "rows": [asdict(row) for row in self.rows],
        }
        with atomic_file(directory / "results.json") as file:
            text = json.dumps(without_nan(content), indent=1, default=str) + "\n"
            file.write_text(text, encoding="utf-8")
        with (
            atomic_file(directory / "results.csv") as file,
            file.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
