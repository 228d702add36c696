"""Correlations of diagnostics with the loss, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from benchmarks.correlation import correlations
from benchmarks.results import INDIVIDUAL, Arm, Results, Score, TaskInfo

ARMS = ("plain", "mild", "strict", "odd")
# Losses by arm of the tasks a, b.
LOSSES = {"plain": (0.4, 0.9), "mild": (0.3, 0.8), "strict": (0.2, 0.7), "odd": (0.1, 0.6)}


def run(leak: dict[str, tuple[float, float]]) -> Results:
    results = Results("run", "pair", "quick", "tiny", "", [], {}, {})
    results.tasks = [TaskInfo(task, "accuracy", "classification") for task in "ab"]
    for name in ARMS:
        matrix = [[1.0, leak[name][1]], [leak[name][0], 1.0]]
        by_task = dict(zip("ab", leak[name], strict=True))
        results.arms.append(Arm(name, "osrm", "init", 0, {}, {"leak": by_task}, matrix, []))
        for task, loss in zip("ab", LOSSES[name], strict=True):
            for merge, score in ((INDIVIDUAL, 1.0), ("ties", 1 - loss)):
                for split in ("validation", "test"):
                    results.scores.append(
                        Score(
                            suite="pair",
                            seed=0,
                            arm=name,
                            init="osrm",
                            constraint="init",
                            merge=merge,
                            coefficient=1.0,
                            chosen=True,
                            task=task,
                            split=split,  # type: ignore[arg-type]
                            metric="accuracy",
                            score=score,
                        )
                    )
    results.add_averages()
    return results


def test_a_diagnostic_that_follows_the_loss() -> None:
    by_name = {one.diagnostic: one for one in correlations(run(LOSSES))}
    assert set(by_name) == {"leak", "received"}
    for found in by_name.values():
        assert (found.points, found.pooled, found.within) == (8, pytest.approx(1), pytest.approx(1))


def test_difficulty_of_tasks_is_apart() -> None:
    # High where the loss is low within each task, but low for the easy task.
    leak = {arm: (0.5 - a, 1.9 - b) for arm, (a, b) in LOSSES.items()}
    (found, _) = correlations(run(leak))
    assert found.within == pytest.approx(-1)
    # Ranks by hand: the losses' are 4 3 2 1 | 8 7 6 5, the diagnostic's 1 2 3 4 | 5 6 7 8.
    squares = (4 - 1) ** 2 + (3 - 2) ** 2 + (2 - 3) ** 2 + (1 - 4) ** 2
    assert found.pooled == pytest.approx(1 - 6 * 2 * squares / (8 * 63))


def test_what_says_nothing_is_undefined(make_results: Callable[..., Results]) -> None:
    constant = dict.fromkeys(ARMS, (0.5, 0.5))
    assert all(math.isnan(one.pooled) for one in correlations(run(constant)))
    two = correlations(make_results())  # two arms: no correlation within a task
    assert all(math.isnan(one.within) for one in two)
    assert {one.points for one in two} == {16}
    assert correlations(make_results(merges=()))[0].points == 0
