"""The paired bootstrap against row-by-row resampling with the metrics that score the suites."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.predictions import Column, Predicted, load_predictions, save_predictions
from benchmarks.report.significance import comparisons_of
from benchmarks.results import Arm, MergeInfo, Results, Score, TaskInfo
from benchmarks.scores import metric_of
from benchmarks.significance import Bootstrap, Side
from merge_algorithms.errors import UserError
from trainers.metrics import LanguageMetrics, make_metrics
from trainers.tasks import Task

LORA, OSRM = Side("lora", "ties"), Side("osrm", "ties")


def alone(labels: Column, values: Column) -> Predicted:
    """Rows of which none belong together."""
    return Predicted(labels, values, np.arange(len(labels)))


def rows_of(
    kind: str, classes: int, count: int = 60, skill: float = 0.7, seed: int = 0
) -> Predicted:
    random = np.random.default_rng([seed, classes])
    if kind == "regression":
        labels = np.round(random.normal(3, 1, count), 1).astype(np.float32)
        values = skill * labels + random.normal(0, 0.5, count).astype(np.float32)
        return alone(labels, np.round(values, 1).astype(np.float32))
    labels = random.integers(0, classes, count)
    wrong = random.integers(0, classes, count)
    noise = np.random.default_rng([seed, classes, int(1000 * skill)]).random(count)
    return alone(labels, np.where(noise < skill, labels, wrong))


@pytest.mark.parametrize("name", ["token_accuracy", "log_likelihood"])
def test_language_models_are_resampled_like_any_other(name: str) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 9, 25)
    losses, correct = random.random(25) * tokens, random.binomial(tokens, 0.4)
    drawn = random.integers(0, 25, (12, 25))
    counts = np.stack([np.bincount(draw, minlength=25) for draw in drawn]).astype(float)
    found = metric_of(name, alone(tokens, np.stack([losses, correct], 1)), counts, 1)
    for score, draw in zip(found, drawn, strict=True):
        metrics = LanguageMetrics((name,))
        metrics.update(*(torch.from_numpy(column[draw]) for column in (losses, tokens, correct)))
        assert score == pytest.approx(metrics.scores()[name])
    with pytest.raises(UserError, match="run the benchmark again"):
        metric_of(name, alone(tokens, losses), counts, 1)


def scored(name: str, kind: str, rows: Predicted, classes: int) -> float:
    """The metric as trainers.metrics computes it."""
    task = Task("t", ("text",), {"dir": "d"}, kind=kind, metrics=(name,))  # type: ignore[arg-type]
    metrics = make_metrics(task, classes)
    values = torch.from_numpy(rows.values)
    if kind == "classification":
        values = torch.nn.functional.one_hot(values.long(), classes).float()
    metrics.update(values, torch.from_numpy(rows.labels))
    return metrics.compute()[name]


@pytest.mark.parametrize(
    ("name", "kind", "classes"),
    [
        ("accuracy", "classification", 4),
        ("f1", "classification", 2),
        ("f1", "classification", 5),
        ("matthews", "classification", 2),
        ("matthews", "classification", 5),
        ("accuracy+f1", "classification", 2),
        ("pearson", "regression", 1),
        ("spearman", "regression", 1),
        ("pearson+spearman", "regression", 1),
    ],
)
def test_resampled_metrics_are_those_of_the_resampled_rows(
    name: str, kind: str, classes: int
) -> None:
    rows = rows_of(kind, classes, count=25)
    random = np.random.default_rng(1)
    drawn = random.integers(0, 25, (12, 25))
    drawn[0] = 3  # one row only: correlations are undefined
    counts = np.stack([np.bincount(draw, minlength=25) for draw in drawn]).astype(float)
    found = metric_of(name, rows, counts, classes)
    expected = [
        scored(name, kind, alone(rows.labels[draw], rows.values[draw]), classes) for draw in drawn
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def run_of(
    folder: Path, arms: Mapping[str, Mapping[int, Mapping[str, Predicted]]], **metrics: str
) -> Results:
    """A finished run: arm -> seed -> task -> rows, all of them by 'ties'."""
    results = Results("run", "pair", "quick", "tiny", "", [], {}, {})
    for name, seeds in arms.items():
        for seed, tasks in seeds.items():
            file = f"{name}{seed}.npz"
            save_predictions(folder / file, {"chosen": dict(tasks)})
            info = MergeInfo("ties", 0.5, predictions=file)
            results.arms.append(Arm(name, name, "init", seed, {}, {}, [], [info]))
    (tasks,) = (dict(next(iter(seeds.values()))) for seeds in list(arms.values())[:1])
    for task, rows in tasks.items():
        regression = np.issubdtype(rows.labels.dtype, np.floating)
        classes = 1 if regression else int(rows.labels.max()) + 1
        kind = "regression" if regression else "classification"
        results.tasks.append(TaskInfo(task, metrics[task], kind, len(rows.labels), classes))
    return results


def test_a_comparison_against_a_slow_one(tmp_path: Path) -> None:
    arms = {
        arm: {
            seed: {
                "a": rows_of("classification", 3, 80, skill + seed / 50),
                "b": rows_of("regression", 1, 50, skill),
            }
            for seed in (0, 1)
        }
        for arm, skill in (("lora", 0.5), ("osrm", 0.65))
    }
    metrics = {"a": "accuracy", "b": "pearson"}
    results = run_of(tmp_path, arms, **metrics)
    found = Bootstrap(results, tmp_path, [OSRM, LORA], resamples=400, seed=3).compare(OSRM, LORA)

    def score(task: str, rows: Predicted, draw: np.ndarray) -> float:
        labels, values = rows.labels[draw].astype(float), rows.values[draw].astype(float)
        return np.corrcoef(labels, values)[0, 1] if task == "b" else np.mean(labels == values)

    def average(arm: str, draws: Mapping[str, np.ndarray]) -> float:
        return statistics.fmean(
            score(task, rows, draws[task])
            for tasks in arms[arm].values()
            for task, rows in tasks.items()
        )

    whole = {"a": np.arange(80), "b": np.arange(50)}
    means = average("osrm", whole), average("lora", whole)
    assert found.means == pytest.approx(means, abs=1e-5)
    assert found.difference == pytest.approx(means[0] - means[1], abs=1e-5)
    random = np.random.default_rng(9)
    slow = []
    for _ in range(400):
        draws = {task: random.integers(0, len(rows), len(rows)) for task, rows in whole.items()}
        slow.append(average("osrm", draws) - average("lora", draws))
    spread = statistics.stdev(slow)
    assert found.low == pytest.approx(np.quantile(slow, 0.025), abs=0.4 * spread)
    assert found.high == pytest.approx(np.quantile(slow, 0.975), abs=0.4 * spread)


def test_rows_of_one_group_are_drawn_together(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    sizes = random.integers(1, 12, 30)
    groups = np.repeat(random.permutation(30), sizes)
    labels = random.integers(0, 2, len(groups))
    # All rows of a group are right or wrong together, but for a tenth.
    right = {side: random.random(30) < skill for side, skill in (("lora", 0.5), ("osrm", 0.7))}
    arms = {}
    for side, known in right.items():
        is_right = known[groups] ^ (random.random(len(groups)) < 0.1)
        arms[side] = {0: {"a": Predicted(labels, np.where(is_right, labels, 1 - labels), groups)}}
    results = run_of(tmp_path, arms, a="accuracy")
    found = Bootstrap(results, tmp_path, [OSRM, LORA]).compare(OSRM, LORA)

    members = [np.flatnonzero(groups == group) for group in range(30)]
    correct = {side: rows[0]["a"].values == labels for side, rows in arms.items()}

    def difference(drawn: np.ndarray) -> float:
        return float(np.mean(correct["osrm"][drawn]) - np.mean(correct["lora"][drawn]))

    slow = [
        difference(np.concatenate([members[group] for group in random.integers(0, 30, 30)]))
        for _ in range(2000)
    ]
    single = [difference(random.integers(0, len(groups), len(groups))) for _ in range(2000)]
    spread = statistics.stdev(slow)
    assert found.low == pytest.approx(np.quantile(slow, 0.025), abs=0.25 * spread)
    assert found.high == pytest.approx(np.quantile(slow, 0.975), abs=0.25 * spread)
    assert spread > 1.5 * statistics.stdev(single), "groups make no difference here"


def test_what_is_the_same_differs_by_nothing_and_what_is_better_surely(tmp_path: Path) -> None:
    rows = rows_of("classification", 2, 400)
    arms = {
        "lora": {0: {"a": rows}},
        "same": {0: {"a": rows}},
        "better": {0: {"a": alone(rows.labels, rows.labels)}},
    }
    results = run_of(tmp_path, arms, a="accuracy")
    same, better = Side("same", "ties"), Side("better", "ties")
    bootstrap = Bootstrap(results, tmp_path, [LORA, same, better], resamples=500)
    equal = bootstrap.compare(same, LORA)
    assert (equal.difference, equal.low, equal.high, equal.p) == (0, 0, 0, 1)
    found = bootstrap.compare(better, LORA)
    assert found.low > 0
    assert found.p == pytest.approx(2 / 501)
    back = bootstrap.compare(LORA, better)
    expected = (-found.difference, -found.high, -found.low)
    assert (back.difference, back.low, back.high) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_interval_and_large_runs_take_seconds(tmp_path: Path) -> None:
    arms = {
        arm: {
            seed: {f"t{i}": rows_of("classification", 3, 800, skill, i) for i in range(8)}
            for seed in range(2)
        }
        for arm, skill in (("lora", 0.6), ("osrm", 0.7))
    }
    results = run_of(tmp_path, arms, **{f"t{i}": "accuracy" for i in range(8)})
    began = time.process_time()
    first = Bootstrap(results, tmp_path, [OSRM, LORA]).compare(OSRM, LORA)
    assert time.process_time() - began < 10
    again = Bootstrap(results, tmp_path, [LORA, OSRM]).compare(OSRM, LORA)
    assert first == again
    assert first != Bootstrap(results, tmp_path, [OSRM, LORA], seed=1).compare(OSRM, LORA)


def test_files_are_small_and_read_back(tmp_path: Path) -> None:
    rows = {f"t{i}": rows_of("classification", 150, 1500, seed=i) for i in range(8)}
    save_predictions(tmp_path / "p.npz", {"chosen": rows, "untuned": rows})
    assert (tmp_path / "p.npz").stat().st_size < 80_000
    read = load_predictions(tmp_path / "p.npz", "untuned")
    for task, expected in rows.items():
        assert read[task].labels.tolist() == expected.labels.tolist()
        assert read[task].values.tolist() == expected.values.tolist()
        assert read[task].groups.tolist() == expected.groups.tolist()


def test_sides_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    rows, other = rows_of("classification", 2), rows_of("classification", 2, seed=5)
    results = run_of(tmp_path, {"lora": {0: {"a": rows}}, "osrm": {0: {"a": other}}}, a="accuracy")
    with pytest.raises(UserError, match="not scored on the same test rows of 'a'"):
        Bootstrap(results, tmp_path, [OSRM, LORA])
    with pytest.raises(UserError, match="did you mean 'lora'"):
        Bootstrap(results, tmp_path, [Side("lara", "ties")])
    with pytest.raises(UserError, match="did you mean 'ties'"):
        Bootstrap(results, tmp_path, [Side("lora", "tie")])
    with pytest.raises(UserError, match="no 'untuned' predictions"):
        Bootstrap(results, tmp_path, [Side.parse("lora/ties@1")])
    np.savez(tmp_path / "lora0.npz", **{f"chosen/a/{f}": rows.labels for f in ("labels", "values")})
    with pytest.raises(UserError, match=r"lacks .*earlier version.*run the benchmark"):
        Bootstrap(results, tmp_path, [LORA])
    (tmp_path / "lora0.npz").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read as predictions"):
        Bootstrap(results, tmp_path, [LORA])
    with pytest.raises(UserError, match="names no side"):
        Side.parse("lora")


def test_each_way_of_comparing_has_the_rows_of_its_own_first_arm(tmp_path: Path) -> None:
    """A joint arm, which has no individual scores, and arms that saw rows in another order."""
    rows, other = rows_of("classification", 2), rows_of("classification", 2, seed=5)
    arms = {"joint": rows, "lora": other, "osrm": other, "same": rows}
    results = run_of(tmp_path, {name: {0: {"a": found}} for name, found in arms.items()}, a="f1")
    results.arms = [
        replace(arm, predictions=arm.merges[0].predictions if arm.name != "joint" else None)
        for arm in results.arms
    ]
    results.scores = [
        Score("pair", 0, arm, arm, "init", "ties", 0.5, True, "a", "validation", "f1", 0.5)
        for arm in arms
    ]
    results.add_averages()
    pairs = [(str(c.first), str(c.second)) for c in comparisons_of(results, tmp_path)]
    assert pairs == [("same/ties", "joint/ties"), ("osrm/individual", "lora/individual")]


def test_the_command_compares_arms(
    tmp_path: Path, osrm: Callable[..., str], refused: Callable[..., str]
) -> None:
    rows = rows_of("classification", 2, 300)
    perfect = alone(rows.labels, rows.labels)
    results = run_of(
        tmp_path, {"lora": {0: {"a": rows}}, "osrm": {0: {"a": perfect}}}, a="accuracy"
    )
    results.save(tmp_path)
    text = osrm("compare", tmp_path, "osrm/ties", "--baseline", "lora/ties", "--resamples", 200)
    accuracy = float((rows.labels == rows.values).mean())
    assert f"{1 - accuracy:+.3f}" in text
    assert "paired" in text
    assert "Rows of one group" in " ".join(text.split())
    file = tmp_path / "results.json"
    arguments = ("osrm/ties", "--baseline", "lora/ties", "--resamples", 200)
    assert osrm("compare", file, *arguments) == text
    assert "--resamples 3" in refused("compare", tmp_path, "osrm/ties", "--resamples", 3)
    data = json.loads((tmp_path / "results.json").read_text())
    data["arms"] = data["arms"][:1]
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert "no arm 'osrm'" in refused("compare", tmp_path, "osrm/ties", "--baseline", "lora/ties")
