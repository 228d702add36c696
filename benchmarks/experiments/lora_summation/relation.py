"""The fitted relation between a predictor and the change in perplexity, as a file and in use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from benchmarks.experiments.lora_summation.predictors import Predictors
from benchmarks.experiments.lora_summation.statistics import Fit
from benchmarks.results import without_nan
from merge_algorithms import Adapter, UserError
from merge_algorithms.files import atomic_file
from osrm import Covariance

FORMAT = 1
ALL = "all"
FILE = "relation.json"
OUTCOME = (
    "percent by which the perplexity of the adapters' plain sum differs from that of one adapter"
    " trained on the merged data (less is better)"
)


class Prediction(NamedTuple):
    """What to expect of summing some adapters, as far as the past goes.

    Attributes:
        combination: The adapters' names.
        predictor: What it is predicted from, a key of PREDICTORS.
        init: The initialisation whose line was used, or 'all'.
        value: The predictor's value.
        expected: Percent change in perplexity against joint training.
        margin: Half width of the 95 % prediction interval.
        outside: Whether the value lies outside what the relation was fitted on.
        spearman: Rank correlation of predictor and change there.
        p: Of the hypothesis that it is zero.
    """

    combination: tuple[str, ...]
    predictor: str
    init: str
    value: float
    expected: float
    margin: float
    outside: bool
    spearman: float
    p: float


@dataclass(frozen=True)
class Relation:
    """A line for each initialisation and predictor.

    Attributes:
        model: The base model that it was measured on.
        tasks: The tasks of the study.
        fits: Initialisation of the adapters, or 'all' for all together -> predictor -> line; only
            those that could be fitted.
    """

    model: str
    tasks: tuple[str, ...]
    fits: dict[str, dict[str, Fit]]

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        content = {
            "format": FORMAT,
            "experiment": "lora-summation",
            "outcome": OUTCOME,
            "model": self.model,
            "tasks": list(self.tasks),
            "fits": {
                init: {name: asdict(fit) for name, fit in fits.items()}
                for init, fits in self.fits.items()
            },
        }
        with atomic_file(path) as file:
            text = json.dumps(without_nan(content), indent=2) + "\n"
            file.write_text(text, encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Relation:
        """Read what `osrm experiment lora-summation` wrote.

        Raises:
            UserError: No such file, or not one of these.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["experiment"] != "lora-summation":
                raise KeyError("format")
            fits = {
                init: {name: Fit.from_json(values) for name, values in lines.items()}
                for init, lines in content["fits"].items()
            }
            return Relation(content["model"], tuple(content["tasks"]), fits)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read as a fitted relation ({type(error).__name__}: {error}):"
                f" expected {FILE} of osrm experiment lora-summation"
            ) from error

    def predict(
        self, combination: Sequence[str], values: Mapping[str, float], init: str = ALL
    ) -> list[Prediction]:
        """One prediction for each predictor that has a line here and a value there.

        Args:
            combination: The adapters' names.
            values: Predictor -> value.
            init: Their initialisation; without a line of its own, that of all together is taken.
        """
        chosen = init if self.fits.get(init) else ALL
        found = []
        for name, fit in self.fits.get(chosen, {}).items():
            value = values.get(name, math.nan)
            if math.isfinite(value):
                expected, margin = fit.predict(value)
                low, high = fit.x_range
                outside = not low <= value <= high
                line = (chosen, value, expected, margin, outside, fit.spearman, fit.p)
                found.append(Prediction(tuple(combination), name, *line))
        return found


def expected_changes(
    adapters: Sequence[Adapter],
    relation: Relation,
    covariances: Mapping[str, Covariance] | None = None,
) -> list[Prediction]:
    """What the relation expects of every pair of adapters and of all together.

    An extrapolation from one study: other models, tasks and training change the line, and the
    margin knows only of the scatter within the study.

    Args:
        adapters: At least two of one base model, named as their tasks.
        relation: The fitted lines.
        covariances: Task -> covariance, if there are any, for the interference.

    Raises:
        UserError: Fewer than two adapters, or as `interference_matrix`.
    """
    if len(adapters) < 2:
        raise UserError("a change on merging needs at least two adapters: name another")
    predictors = Predictors(adapters, covariances)
    names = [adapter.name for adapter in adapters]
    groups = list(combinations(names, 2)) + ([tuple(names)] if len(names) > 2 else [])
    inits = {adapter.info.get("subspace", {}).get("init", "lora") for adapter in adapters}
    init = inits.pop() if len(inits) == 1 else ALL
    return [p for group in groups for p in relation.predict(group, predictors.of(group), init)]
