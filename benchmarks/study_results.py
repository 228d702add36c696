"""What a study measured: its trials, their Pareto front, and the finalists to look at again."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arms import ArmSettings
from benchmarks.results import area_under, merit, without_nan
from merge_algorithms.files import atomic_file
from trainers.settings import AdapterSettings, SubspaceSettings, TrainSettings, effective

FINALISTS = 3


@dataclass(frozen=True)
class TrialOutcome:
    """What one trial scored on validation rows, averaged over the tasks' headline metrics.

    Attributes:
        individual: Every task with its own adapter.
        curves: Merging method -> scaling coefficient -> score of the merged model.
        leaked_own_ratio: The trained updates' energy on the other tasks' inputs over that on
            their own, mean over tasks.
    """

    individual: float
    curves: dict[str, dict[float, float]]
    leaked_own_ratio: float

    @property
    def best(self) -> tuple[str, float]:
        """The method and coefficient that score highest, the first of several."""
        pairs = [(method, c) for method, curve in self.curves.items() for c in curve]
        return max(pairs, key=lambda pair: merit(self.curves[pair[0]][pair[1]]))

    @property
    def merged(self) -> float:
        """The score there."""
        method, coefficient = self.best
        return self.curves[method][coefficient]

    @property
    def curve(self) -> dict[float, float]:
        """Coefficient -> score of the best method."""
        return self.curves[self.best[0]]

    def as_json(self) -> dict[str, Any]:
        """As JSON holds it, whose keys are text."""
        return asdict(self) | {"curves": {m: list(c.items()) for m, c in self.curves.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrialOutcome:
        """What `as_json` wrote."""
        return cls(**data | {"curves": {m: dict(pairs) for m, pairs in data["curves"].items()}})


@dataclass(frozen=True)
class StudyTrial:
    """One trial.

    Attributes:
        number: Its number in the study.
        arm: How the adapters are trained.
        reference: What the arm is known as, '' for one that the search proposed.
        outcome: What it scored; None if its settings do not go together.
        seconds: How long it took, without the stages that were there already.
        refused: Why there is no outcome.
    """

    number: int
    arm: ArmSettings
    reference: str = ""
    outcome: TrialOutcome | None = None
    seconds: float = math.nan
    refused: str = ""


@dataclass
class StudyResults:
    """The finished trials of a study.

    Attributes:
        name: Name of the run.
        suite: Name of the suite.
        preset: Its preset.
        model: The base model.
        merges: Merging methods that were tried.
        trials: In the order in which they were begun.
    """

    name: str
    suite: str
    preset: str
    model: str
    merges: Sequence[str]
    trials: list[StudyTrial] = field(default_factory=list)

    def scored(self) -> list[tuple[StudyTrial, TrialOutcome]]:
        """The trials that have an outcome."""
        return [(trial, trial.outcome) for trial in self.trials if trial.outcome is not None]

    def front(self) -> list[StudyTrial]:
        """Those that no other beats in both scores, the highest individual score first.

        None with a score that is undefined.
        """
        front: list[StudyTrial] = []
        highest = -math.inf
        defined = [pair for pair in self.scored() if not any(map(math.isnan, _point(pair[0])))]
        for trial, outcome in sorted(
            defined, key=lambda pair: (-pair[1].individual, -pair[1].merged, pair[0].number)
        ):
            if outcome.merged > highest:
                highest = outcome.merged
                front.append(trial)
        return front

    def finalists(self, without: Sequence[ArmSettings] = ()) -> list[ArmSettings]:
        """At most three of the front: its ends, and the one that is farthest from both.

        Args:
            without: Arms that are there anyway.
        """
        known = [training_key(arm) for arm in without]
        front = [trial for trial in self.front() if training_key(trial.arm) not in known]
        points = [_point(trial) for trial in front]
        if len(points) <= FINALISTS:
            return [trial.arm for trial in front]
        spans = [abs(a - b) or 1.0 for a, b in zip(points[0], points[-1], strict=True)]

        def lonely(index: int) -> float:
            return min(
                math.hypot(
                    *((a - b) / s for a, b, s in zip(points[index], end, spans, strict=True))
                )
                for end in (points[0], points[-1])
            )

        middle = max(range(1, len(points) - 1), key=lonely)
        return [front[index].arm for index in (0, middle, -1)]

    def save(self, path: Path) -> None:
        """Write study.csv: one row per trial."""
        front = {trial.number for trial in self.front()}
        rows = [self._row(trial, trial.number in front) for trial in self.trials]
        with atomic_file(path) as file, file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(self._columns()), lineterminator="\n")
            writer.writeheader()
            writer.writerows(without_nan(row) for row in rows)

    def _columns(self) -> dict[str, Any]:
        settings = ("init", "mu", "rho", "constraint", "k", "scale", "leak_penalty")
        scores = ("individual", "merged", "merge", "coefficient", "merged_at_1", "area")
        each = [f"{merge}{end}" for merge in self.merges for end in ("", "_at_1", "_area")]
        names = (
            *("trial", "name", "reference", *settings),
            *("targets", "rank", "alpha", "learning_rate"),
            *(*scores, "leaked_own_ratio", *each, "seconds", "on_front", "refused"),
        )
        return dict.fromkeys(names)

    def _row(self, trial: StudyTrial, on_front: bool) -> dict[str, Any]:
        arm = trial.arm
        subspace = effective(arm.subspace)
        row = self._columns()
        row.update({name: value for name, value in subspace.items() if name in row})
        row.update(
            trial=trial.number,
            name=arm.name,
            reference=trial.reference,
            targets=" ".join(arm.adapter.targets),
            rank=arm.adapter.rank,
            alpha=arm.adapter.alpha,
            learning_rate=arm.train.learning_rate,
            seconds=round(trial.seconds, 1),
            on_front=on_front,
            refused=trial.refused,
        )
        outcome = trial.outcome
        if outcome is not None:
            row["individual"] = outcome.individual
            row["merged"] = outcome.merged
            row["merge"], row["coefficient"] = outcome.best
            row["merged_at_1"] = outcome.curve.get(1.0)
            row["area"] = area_under(outcome.curve)
            row["leaked_own_ratio"] = outcome.leaked_own_ratio
            for merge, curve in outcome.curves.items():
                row[merge] = max(curve.values(), key=merit)
                row[f"{merge}_at_1"] = curve.get(1.0)
                row[f"{merge}_area"] = area_under(curve)
        return row


def arm_from_json(name: str, settings: dict[str, Any]) -> ArmSettings:
    """The arm that `arm_as_json` described."""
    return ArmSettings(
        name,
        AdapterSettings(**settings["adapter"]),
        TrainSettings(**settings["train"]),
        SubspaceSettings(**settings["subspace"]),
    )


def arm_as_json(arm: ArmSettings) -> dict[str, Any]:
    """Everything but the name."""
    return {key: asdict(getattr(arm, key)) for key in ("adapter", "train", "subspace")}


def training_key(arm: ArmSettings) -> str:
    """The same for arms whose adapters are the same."""
    settings = arm_as_json(arm) | {"subspace": effective(arm.subspace)}
    return json.dumps(settings, sort_keys=True)


def _point(trial: StudyTrial) -> tuple[float, float]:
    assert trial.outcome is not None
    return trial.outcome.individual, trial.outcome.merged
