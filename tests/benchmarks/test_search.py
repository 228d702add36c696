"""Choosing a merge's values on validation: the search itself, then the search on adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.commands.scoring import base_model, load_evaluator
from benchmarks.evaluate import Evaluator, evaluate_fusion
from benchmarks.fusion import Fusion
from benchmarks.search import (
    Objective,
    Trial,
    Values,
    best,
    best_coefficient,
    score_curve,
    search_space,
    tpe,
)
from benchmarks.suites import load_suite
from merge_algorithms import Adapter, UserError
from merge_algorithms.registry import get_method


def scored(function: Callable[[Values], float]) -> Callable[[Values], Trial]:
    return lambda values: Trial(values, {}, function(values))


def bowl(values: Values) -> float:
    """Best at scale 0.6 and where the agreeing entries are summed."""
    return -((values["scale"] - 0.6) ** 2) - (values.get("combine", "sum") != "sum")


def space_of(**parameters: list[Any]) -> dict[str, Any]:
    return search_space(parameters, get_method("ties"), adapters=2)


def test_tpe_finds_the_top_of_a_hill() -> None:
    space = space_of(scale=[0.0, 4.0], combine=["mean", "sum", "weighted"])
    trials = tpe(scored(bowl), space, 40)
    assert len(trials) == 40
    assert all(0 <= trial.values["scale"] <= 4 for trial in trials)
    top = best(trials)
    assert top.values["combine"] == "sum"
    assert top.values["scale"] == pytest.approx(0.6, abs=0.15)


def test_the_seed_decides_the_proposals() -> None:
    space = space_of(scale=[0.0, 4.0], weights=[0, 2])
    first, again, other = (
        [t.values for t in tpe(scored(bowl), space, 12, seed)] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert all(len(values["weights"]) == 2 for values in first)


def test_the_defaults_are_tried_first_where_they_may_be() -> None:
    start = {"scale": 1.0, "density": 0.2, "weights": [1.0, 1.0], "combine": "mean"}
    space = space_of(scale=[0.0, 4.0], density=[0.1, 0.9], weights=[0, 2])
    trials = tpe(scored(bowl), space, 3, start=start)
    assert trials[0].values == {"scale": 1.0, "density": 0.2, "weights": [1.0, 1.0]}
    outside = tpe(scored(bowl), space_of(scale=[2.0, 4.0]), 3, start=start)
    assert all(2 <= trial.values["scale"] <= 4 for trial in outside)


def test_values_that_do_not_go_together_are_passed_over() -> None:
    def score(values: Values) -> Trial:
        if values["scale"] > 1:
            raise UserError("too large")
        return Trial(values, {}, math.nan if values["scale"] < 0.3 else bowl(values))

    trials = tpe(score, space_of(scale=[0.0, 2.0]), 40)
    assert 10 < len(trials) < 40
    assert best(trials).values["scale"] == pytest.approx(0.6, abs=0.1)
    with pytest.raises(UserError, match="too large"):
        tpe(score, space_of(scale=[1.5, 2.0]), 5)


def test_an_undefined_mean_is_never_the_best() -> None:
    trials = [Trial({"scale": i}, {}, mean) for i, mean in enumerate([math.nan, 0.2, 0.5, 0.5])]
    assert best(trials).values == {"scale": 2}
    assert best(trials[:1]).values == {"scale": 0}


def test_parameters_that_cannot_be_searched() -> None:
    cases: dict[str, dict[str, Any]] = {
        "did you mean 'density'": {"densty": [0.1, 0.9]},
        "range of density is \\[0.9, 0.1\\]": {"density": [0.9, 0.1]},
        "range of scale is \\[1, 2, 3\\]": {"scale": [1, 2, 3]},
        "range of weights is \\['a', 'b'\\]": {"weights": ["a", "b"]},
        "range of scale is \\[0, inf\\]": {"scale": [0, math.inf]},
        "combine cannot be searched in": {"combine": []},
        "did you mean 'sum'": {"combine": ["mean", "smu"]},
    }
    for message, parameters in cases.items():
        with pytest.raises(UserError, match=message):
            space_of(**parameters)
    with pytest.raises(UserError, match=r"drop_rates cannot be searched in \[\[0.5, 0.5\]\]"):
        search_space({"drop_rates": [[0.5, 0.5]]}, get_method("mc_dropout"), 2)
    with pytest.raises(UserError, match="at least 1"):
        tpe(scored(bowl), space_of(scale=[0, 1]), 0)


# On adapters


@pytest.fixture(scope="module")
def adapters(trained: Path) -> list[Adapter]:
    return [Adapter.load(trained / task) for task in ("half", "size", "same")]


@pytest.fixture(scope="module")
def evaluator(adapters: list[Adapter], toy_suite: Path) -> Evaluator:
    suite = load_suite(str(toy_suite))
    return load_evaluator(suite, base_model(None, adapters), adapters)


def test_the_grid_takes_the_best_on_validation(
    evaluator: Evaluator, adapters: list[Adapter]
) -> None:
    fusion = Fusion(adapters, "task_arithmetic")
    told: list[tuple[int, int]] = []
    grid = [0.0, 3.0, 1.0]
    curve = score_curve(evaluator, fusion, grid, report=lambda *rows: told.append(rows))
    headline = {"half": "accuracy", "size": "pearson+spearman", "same": "accuracy"}
    means = {}
    for coefficient in grid:
        alone = evaluate_fusion(evaluator, fusion, coefficient, "validation")
        assert curve[coefficient] == alone
        means[coefficient] = sum(alone[task][metric] for task, metric in headline.items()) / 3
    assert best_coefficient(curve, evaluator.data) == max(grid, key=lambda c: means[c])
    assert all(before <= after for (before, _), (after, _) in pairwise(told))
    assert told[-1] == (3 * 3 * 16, 3 * 3 * 16)


def test_another_scale_is_not_another_merge(evaluator: Evaluator, adapters: list[Adapter]) -> None:
    made: list[Values] = []

    def fuse(**values: Any) -> Fusion:
        made.append(values)
        return Fusion(adapters, "ties", **values)

    objective = Objective(evaluator, fuse, fixed={"density": 0.3})
    weights = [1.0, 0.0, 2.0]
    for scale in (0.5, 1.0):
        trial = objective({"scale": scale, "weights": weights})
    assert made == [{"density": 0.3, "weights": weights}]
    assert trial.values == {"density": 0.3, "scale": 1.0, "weights": weights}
    expected = Fusion(adapters, "ties", weights=weights, density=0.3)
    assert trial.scores == evaluate_fusion(evaluator, expected, 1.0, "validation")
    objective({"scale": 1.0, "weights": [1.0, 1.0, 1.0]})
    assert len(made) == 2


def test_emr_is_scored_with_each_tasks_own_model(
    evaluator: Evaluator, adapters: list[Adapter]
) -> None:
    """Attached for another task, or for its own by hand: the scores tell which it was."""
    fusion = Fusion(adapters, "emr_runtime")
    assert fusion.per_task
    scores = evaluate_fusion(evaluator, fusion, 1.0, "test")
    assert list(scores) == ["half", "size", "same"]
    by_hand = {
        served: evaluate_fusion(
            evaluator, Fusion(adapters, "emr_runtime", task=served), 1.0, "test"
        )
        for served in scores
    }
    for task, found in scores.items():
        assert found == by_hand[task][task]
    assert any(by_hand[a]["size"] != by_hand["size"]["size"] for a in ("half", "same"))
    with pytest.raises(UserError, match="one number"):
        evaluate_fusion(evaluator, fusion, {"query": 0.5}, "test")


def test_weights_of_a_run_time_merge_are_scaled_too(
    evaluator: Evaluator, adapters: list[Adapter]
) -> None:
    """Direct addition of outputs is the sum of the updates."""
    weights = [0.5, 1.0, 2.0]
    attached = Fusion(adapters, "direct_runtime", weights=weights)
    added = Fusion(adapters, "task_arithmetic", weights=weights)
    for coefficient in (0.7, 0.0):
        for task, scores in evaluate_fusion(evaluator, attached, coefficient, "test").items():
            expected = evaluate_fusion(evaluator, added, coefficient, "test")[task]
            assert scores == pytest.approx(expected, abs=1e-4)
