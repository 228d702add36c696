from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import Arm, Results, Score, TaskInfo
from merge_algorithms.errors import UserError

COLUMNS = [
    "suite",
    "seed",
    "arm",
    "init",
    "constraint",
    "merge",
    "coefficient",
    "chosen",
    "task",
    "split",
    "metric",
    "score",
]
LORA, OSRM = "lora", "osrm"


def two_tasks(scores: list[Score] | None = None, arms: list[Arm] | None = None) -> Results:
    return Results(
        name="run",
        suite="pair",
        preset="quick",
        model="tiny",
        created="2026-01-02T03:04:05+00:00",
        tasks=[TaskInfo("a", "accuracy", "classification"), TaskInfo("b", "pearson", "regression")],
        settings={},
        versions={},
        arms=arms or [],
        scores=scores or [],
    )


def row(task: str, score: float, **other: Any) -> Score:
    values: dict[str, Any] = {
        "suite": "pair",
        "seed": 0,
        "arm": "lora",
        "init": "lora",
        "constraint": "init",
        "merge": "ties",
        "coefficient": 0.5,
        "chosen": True,
        "split": "test",
        "metric": {"a": "accuracy", "b": "pearson"}[task],
    }
    return Score(**{**values, "task": task, "score": score, **other})


def averages(results: Results) -> list[Score]:
    return [score for score in results.scores if score.task == "average"]


def test_round_trip(make_results: Callable[..., Results], tmp_path: Path) -> None:
    results = make_results(seeds=(0, 1))
    results.save(tmp_path)
    assert Results.load(tmp_path) == results
    assert Results.load(tmp_path / "results.json") == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]


def test_csv_is_tidy(make_results: Callable[..., Results], tmp_path: Path) -> None:
    results = make_results()
    results.save(tmp_path)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0] == COLUMNS
    assert len(table) == 1 + len(results.scores)
    assert len({tuple(line[:-1]) for line in table[1:]}) == len(results.scores)
    for line, score in zip(table[1:], results.scores, strict=True):
        assert float(line[-1]) == score.score
        assert line[:6] == [
            score.suite,
            str(score.seed),
            score.arm,
            score.init,
            score.constraint,
            score.merge,
        ]


def test_csv_quotes_awkward_names(tmp_path: Path) -> None:
    two_tasks([row("a", 0.5, suite='comma, "quote"\nnewline')]).save(tmp_path)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        assert [line["suite"] for line in csv.DictReader(file)] == ['comma, "quote"\nnewline']


def test_averages_by_hand() -> None:
    results = two_tasks(
        [
            row("a", 0.5),
            row("b", 0.9),
            row("a", 0.1, metric="f1"),  # not the headline metric of a
            row("a", 0.2, split="validation"),
            row("b", 0.4, split="validation"),
            row("a", 0.6, coefficient=1.0, split="validation"),
            row("b", 0.8, coefficient=1.0, split="validation"),
            row("a", 1.0, seed=1),  # b is missing for this seed
        ]
    )
    results.add_averages()
    assert {
        (score.seed, score.coefficient, score.split): score.score for score in averages(results)
    } == {
        (0, 0.5, "test"): pytest.approx(0.7),
        (0, 0.5, "validation"): pytest.approx(0.3),
        (0, 1.0, "validation"): pytest.approx(0.7),
    }
    assert {score.metric for score in averages(results)} == {"mean"}
    assert {(score.init, score.constraint, score.merge) for score in averages(results)} == {
        ("lora", "init", "ties")
    }


def test_adding_averages_twice_changes_nothing(make_results: Callable[..., Results]) -> None:
    results = make_results()
    once = list(results.scores)
    results.add_averages()
    assert results.scores == once


def test_undefined_score(tmp_path: Path) -> None:
    results = two_tasks([row("a", 0.5), row("b", math.nan)])
    results.add_averages()
    assert [math.isnan(score.score) for score in averages(results)] == [True]
    results.save(tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert [score["score"] for score in json.loads(text)["scores"]] == [0.5, None, None]
    assert "NaN" not in text
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        assert [line["score"] for line in csv.DictReader(file)] == ["0.5", "", ""]
    loaded = Results.load(tmp_path)
    assert [math.isnan(score.score) for score in loaded.scores] == [False, True, True]
    assert math.isnan(loaded.score(LORA, "ties", "average").mean)
    assert loaded.score(LORA, "ties", "a").mean == 0.5


def test_undefined_diagnostics(make_results: Callable[..., Results], tmp_path: Path) -> None:
    results = make_results(inits=("lora",))
    results.arms[0].diagnostics["leaked_own_ratio"]["stsb"] = math.nan
    results.arms[0].interference[0][1] = math.inf
    results.save(tmp_path)
    arm = Results.load(tmp_path).arms[0]
    assert math.isnan(arm.diagnostics["leaked_own_ratio"]["stsb"])
    assert math.isnan(arm.interference[0][1])
    assert arm.interference[0][2] == results.arms[0].interference[0][2]


def test_mean_and_spread_over_seeds() -> None:
    scores = [row("a", score, seed=seed) for seed, score in enumerate([0.5, 0.6, 0.85])]
    results = two_tasks(scores)
    summary = results.score(LORA, "ties", "a")
    assert summary.mean == pytest.approx(0.65)
    # Deviations -0.15, -0.05, 0.2: squares sum to 0.065, over n - 1 = 2.
    assert summary.spread == pytest.approx(math.sqrt(0.0325))
    assert summary.n == 3
    alone = two_tasks(scores[:1]).score(LORA, "ties", "a")
    assert (alone.mean, alone.n) == (0.5, 1)
    assert math.isnan(alone.spread)
    assert results.score(OSRM, "ties", "a").n == 0


def test_percent_of_individual() -> None:
    individual = {"merge": "individual", "coefficient": 1.0}
    results = two_tasks(
        [row("a", 0.8, **individual), row("a", 0.6), row("b", -0.1, **individual), row("b", 0.2)]
    )
    assert results.percent(LORA, "ties", "a") == pytest.approx(75)
    assert math.isnan(results.percent(LORA, "ties", "b"))  # of a negative score: meaningless


def test_coefficients_and_curve() -> None:
    results = two_tasks(
        [
            row(task, score + shift, seed=seed, coefficient=coefficient, split="validation")
            for task, shift in (("a", 0.0), ("b", 0.2))
            for seed, scores in enumerate([{1.0: 0.3, 0.5: 0.5}, {1.0: 0.6, 0.5: 0.4}])
            for coefficient, score in scores.items()
        ]
        + [row(task, 0.5, seed=0, coefficient=0.5) for task in "ab"]
        + [row(task, 0.5, seed=1, coefficient=1.0) for task in "ab"]
    )
    results.add_averages()
    assert results.coefficients(LORA, "ties") == [0.5, 1.0]
    curve = results.curve(LORA, "ties")
    assert list(curve) == [0.5, 1.0]
    assert curve[0.5].mean == pytest.approx(0.55)  # (0.6 + 0.5) / 2
    assert curve[1.0].mean == pytest.approx(0.55)  # (0.4 + 0.7) / 2
    assert curve[1.0].spread == pytest.approx(0.3 / math.sqrt(2))


def test_diagnostics_over_seeds(make_results: Callable[..., Results]) -> None:
    results = make_results(seeds=(0, 1, 2))
    arms = [arm for arm in results.arms if arm.init == "osrm"]
    leak = results.diagnostic(OSRM, "leaked_after", "trec")
    values = [arm.diagnostics["leaked_after"]["trec"] for arm in arms]
    assert leak.mean == pytest.approx(sum(values) / 3)
    assert leak.spread == pytest.approx(statistics.stdev(values))
    average = results.diagnostic(OSRM, "leaked_before", "average").mean
    assert average == pytest.approx(
        sum(value for arm in arms for value in arm.diagnostics["leaked_before"].values()) / 24
    )
    matrix = results.interference(OSRM)
    assert matrix[2][5] == pytest.approx(sum(arm.interference[2][5] for arm in arms) / 3)
    assert results.interference("frozen") == []


def test_untuned_scores_are_apart(make_results: Callable[..., Results]) -> None:
    results = two_tasks([row("a", 0.5), row("a", 0.3, coefficient=1.0, chosen=False)])
    assert (results.score(LORA, "ties", "a").mean, results.score(LORA, "ties", "a").n) == (0.5, 1)
    assert results.untuned(LORA, "ties", "a").mean == 0.3
    assert results.coefficients(LORA, "ties") == []
    chosen = two_tasks([row("a", 0.5, coefficient=1.0)])
    assert chosen.untuned(LORA, "ties", "a").mean == 0.5


def test_names_in_order(make_results: Callable[..., Results]) -> None:
    results = make_results(seeds=(2, 0), merges=("ties", "task_arithmetic"))
    assert results.arm_names() == [LORA, OSRM]
    assert results.merges() == ["ties", "task_arithmetic"]
    assert results.seeds() == [0, 2]


def test_a_failed_save_leaves_the_old_file(
    make_results: Callable[..., Results], tmp_path: Path
) -> None:
    results = make_results()
    results.save(tmp_path)
    broken = dataclasses.replace(results, settings={"not": object()})
    with pytest.raises(TypeError):
        broken.save(tmp_path)
    assert Results.load(tmp_path) == results
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "does not exist"),
        ("{", "not JSON"),
        ("[]", "schema None, expected 2"),
        ('{"schema": 99}', "schema 99, expected 2"),
        ('{"schema": 1, "rows": []}', "an experiment's and no result of osrm bench: give the dir"),
        ('{"schema": 2}', "not a complete results file"),
        ('{"schema": 2, "tasks": [{"title": "a"}]}', "not a complete results file"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str | None, complaint: str) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint) as caught:
        Results.load(tmp_path / "results.json")
    assert "results.json" in str(caught.value)
