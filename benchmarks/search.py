"""Choosing a merge's free values by what they score on validation rows.

A grid over the scaling coefficient, as the papers do, or Optuna's TPE over several values at once:
the coefficient, one weight per adapter, and any option of the method.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.evaluate import Evaluator, Scores, evaluate_fusion, headline_average
from benchmarks.fusion import Fusion
from benchmarks.results import merit, without_nan
from merge_algorithms import UserError
from merge_algorithms.errors import suggest
from merge_algorithms.registry import Method, Option
from trainers.data import TaskData
from trainers.store import Report

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SCALE, WEIGHTS = "scale", "weights"
Values = dict[str, Any]
"""What a search chooses: 'scale', 'weights' (one per adapter), options of the method."""
Curve = dict[float, Scores]
"""Scaling coefficient -> validation scores."""


@dataclass(frozen=True)
class Trial:
    """Some values and what they scored on validation; the mean is over tasks' headline metrics."""

    values: Values
    scores: Scores
    mean: float


@dataclass
class Objective:
    """The validation scores of a merge as a function of its free values.

    Attributes:
        evaluator: Backbone, heads and data.
        fuse: Makes the merge of `weights` and options; called again only when those change, since
            another scale costs next to nothing.
        samples: Monte Carlo samples of a run-time merge.
        fixed: Values that are not searched, such as a given scale.
    """

    evaluator: Evaluator
    fuse: Callable[..., Fusion]
    samples: int = 1
    fixed: Values = field(default_factory=dict)
    _made: tuple[Values, Fusion] | None = None

    def fusion(self, values: Values) -> Fusion:
        """The merge that some values mean, before it is scaled."""
        needed = {name: value for name, value in values.items() if name != SCALE}
        if self._made is None or self._made[0] != needed:
            self._made = needed, self.fuse(**needed)
        return self._made[1]

    def __call__(self, values: Values, report: Report = lambda done, total: None) -> Trial:
        """Score them; `report` is told (rows done, rows in all)."""
        values = self.fixed | values
        scale = values.get(SCALE, 1.0)
        scores = evaluate_fusion(
            self.evaluator, self.fusion(values), scale, "validation", self.samples, report
        )
        return Trial(values, scores, headline_average(scores, self.evaluator.data))


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest mean, the first of several."""
    return max(trials, key=lambda trial: merit(trial.mean))


def evaluation_record(
    evaluator: Evaluator,
    searched: Mapping[str, Sequence[Any]],
    trials: int,
    scores: Mapping[str, Scores],
) -> dict[str, Any]:
    """What osrm.json and the model card say of a search, as JSON holds it (NaN as null).

    Args:
        evaluator: What scored.
        searched: Parameter -> the grid, or the range, of its values.
        trials: How many were scored.
        scores: Split -> scores with the values that were chosen.
    """
    means = {split: headline_average(found, evaluator.data) for split, found in scores.items()}
    record = {
        "searched": {name: list(values) for name, values in searched.items()},
        "trials": trials,
        "means": means,
        "scores": scores,
    }
    cleaned: dict[str, Any] = without_nan(record)
    return cleaned


def score_curve(
    evaluator: Evaluator,
    fusion: Fusion,
    coefficients: Sequence[float],
    samples: int = 1,
    report: Report = lambda done, total: None,
) -> Curve:
    """Validation scores of a merge at every scaling coefficient.

    Args:
        evaluator: Holds backbone, heads and data.
        fusion: The merge.
        coefficients: The grid.
        samples: Monte Carlo samples of a run-time merge.
        report: Told (rows done, rows in all).
    """
    objective = Objective(evaluator, lambda: fusion, samples)
    parts = len(coefficients)
    return {
        coefficient: objective({SCALE: coefficient}, part_of(report, index, parts)).scores
        for index, coefficient in enumerate(coefficients)
    }


def part_of(report: Report, index: int, parts: int) -> Report:
    """Reports the progress of one of several parts, taken to be equal."""
    return lambda done, total: report(index * total + done, parts * total)


def best_coefficient(curve: Curve, data: Mapping[str, TaskData]) -> float:
    """The coefficient with the highest average, the first of several."""
    trials = [
        Trial({SCALE: coefficient}, scores, headline_average(scores, data))
        for coefficient, scores in curve.items()
    ]
    chosen: float = best(trials).values[SCALE]
    return chosen


def tpe(
    score: Callable[[Values], Trial],
    space: Mapping[str, BaseDistribution],
    trials: int,
    seed: int = 0,
    start: Values | None = None,
) -> list[Trial]:
    """Let Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) propose the values.

    Args:
        score: Scores the proposed values. A UserError means that these values do not go together
            (DELLA's density and window, say): the trial is void and the search goes on.
        space: What `search_space` made.
        trials: How many proposals.
        seed: Same seed, same proposals.
        start: Values to try first, such as the method's defaults: the best trial is then never
            worse than they are.

    Raises:
        UserError: Fewer than 1 trial; or that of the last trial if none could be scored.
    """
    import optuna

    if trials < 1:
        raise UserError(f"a search of {trials} trials finds nothing: give at least 1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    if start is not None:
        values = {name: value for name, value in _flat(start).items() if name in space}
        study.enqueue_trial({n: v for n, v in values.items() if _within(space[n], v)})
    scored: list[Trial] = []
    failure: UserError | None = None
    for _ in range(trials):
        proposal = study.ask(dict(space))
        try:
            trial = score(_values(proposal.params))
        except UserError as error:
            failure = error
            study.tell(proposal, state=optuna.trial.TrialState.FAIL)
            continue
        scored.append(trial)
        if math.isnan(trial.mean):
            study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(proposal, trial.mean)
    if not scored and failure is not None:
        raise failure
    return scored


def search_space(
    parameters: Mapping[str, Sequence[Any]], method: Method, adapters: int
) -> dict[str, BaseDistribution]:
    """What Optuna may propose.

    Args:
        parameters: 'scale', 'weights' or an option of the method -> [lowest, highest], or the
            choices of an option that is no number. 'weights' gives every adapter one of its own.
        method: The method.
        adapters: How many there are.

    Raises:
        UserError: An unknown parameter, or values that are no range or not the option's choices.
    """
    from optuna.distributions import FloatDistribution

    options = {option.name: option for option in method.options}
    space: dict[str, BaseDistribution] = {}
    for name, values in parameters.items():
        if name == SCALE:
            space[SCALE] = FloatDistribution(*_range(name, values))
        elif name == WEIGHTS:
            low, high = _range(name, values)
            space |= {f"{WEIGHTS}.{i}": FloatDistribution(low, high) for i in range(adapters)}
        elif name in options:
            space[name] = _option_space(method.name, options[name], values)
        else:
            raise UserError(
                f"method '{method.name}' has no parameter '{name}' to search:"
                f" {suggest(name, [SCALE, WEIGHTS, *options])}"
            )
    return space


def _option_space(method: str, option: Option, values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind = _number(option.type)
    if kind is float:
        return FloatDistribution(*_range(option.name, values))
    if kind is int:
        low, high = _range(option.name, values)
        return IntDistribution(int(low), int(high))
    if not values or not all(isinstance(value, bool | int | float | str) for value in values):
        raise UserError(
            f"{option.name} cannot be searched in {list(values)}: give its choices, words or"
            " numbers, at least one"
        )
    for value in values:
        option.check(method, value)
    return CategoricalDistribution(list(values))


def _within(distribution: BaseDistribution, value: Any) -> bool:
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return value in choices
    low, high = getattr(distribution, "low", math.nan), getattr(distribution, "high", math.nan)
    return isinstance(value, int | float) and bool(low <= value <= high)


def _number(hint: Any) -> type | None:
    """int or float if that is what the type hint (or its part that is not None) is."""
    parts = [hint]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
    return parts[0] if parts in ([int], [float]) else None


def _range(name: str, values: Sequence[Any]) -> tuple[float, float]:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(values) != 2 or len(numbers) != 2 or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise UserError(
            f"the search range of {name} is {list(values)}: give its lowest and its highest value,"
            " such as [0.1, 0.9]"
        )
    return numbers[0], numbers[1]


def _flat(values: Values) -> Values:
    weights = {f"{WEIGHTS}.{i}": weight for i, weight in enumerate(values.get(WEIGHTS, ()))}
    return {name: value for name, value in values.items() if name != WEIGHTS} | weights


def _values(proposed: Values) -> Values:
    weights = [value for name, value in proposed.items() if name.startswith(f"{WEIGHTS}.")]
    rest = {k: value for k, value in proposed.items() if not k.startswith(f"{WEIGHTS}.")}
    return rest | ({WEIGHTS: weights} if weights else {})
