from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.results import Arm, MergeInfo, Results, Score, Split, TaskInfo

TASKS = {
    "stsb": ("pearson+spearman", "regression"),
    "trec": ("accuracy", "classification"),
    "movie": ("accuracy", "classification"),
    "tweets": ("accuracy", "classification"),
    "sms": ("accuracy", "classification"),
    "bbc": ("accuracy", "classification"),
    "medsubject": ("matthews", "classification"),
    "privacy": ("f1", "classification"),
}
ALONE = dict(zip(TASKS, [0.81, 0.87, 0.81, 0.86, 0.97, 0.95, 0.54, 0.66], strict=True))
# By merge: the share of the individual score it keeps, and the coefficient it is best at.
MERGES = {
    "task_arithmetic": (0.82, 0.4),
    "ties": (0.86, 0.8),
    "orthogonal_mc_dropout": (0.74, 0.4),
    "orthogonal_mc_dropout_runtime": (0.81, 0.4),
}
GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
TOYS = ("half", "size", "same")

MakeResults = Callable[..., Results]


def _results(
    seeds: tuple[int, ...] = (0,),
    inits: tuple[str, ...] = ("lora", "osrm"),
    merges: tuple[str, ...] = tuple(MERGES),
    rename: dict[str, str] | None = None,
) -> Results:
    """Results shaped like those of the embedded suite; `rename` gives tasks other names."""
    names = {task: (rename or {}).get(task, task) for task in TASKS}
    results = Results(
        name="embedded-quick",
        suite="embedded",
        preset="quick",
        model="all-MiniLM-L6-v2",
        created="2026-01-02T03:04:05+00:00",
        tasks=[TaskInfo(names[task], *TASKS[task], test_rows=400) for task in TASKS],
        settings={"adapter": {"rank": 8, "targets": ["query", "value"]}, "seeds": list(seeds)},
        versions={"osrm-merge": "0.1.0", "torch": "2.13.0"},
    )
    for seed in seeds:
        noise = random.Random(seed)
        for init in inits:
            better = init != "lora"
            _add_arm(results, init, seed, noise, list(names.values()), merges, better)
            for task, alone in ALONE.items():
                metric = TASKS[task][0]
                alone += noise.gauss(0, 0.01)
                measured: list[tuple[str, float, bool, Split, float]] = [
                    ("individual", 1.0, True, "validation", alone + 0.01),
                    ("individual", 1.0, True, "test", alone),
                ]
                for merge in merges:
                    share, best = MERGES[merge]
                    share += 0.06 * better + noise.gauss(0, 0.03)
                    for coefficient in GRID:
                        score = alone * (share - 0.6 * (coefficient - best) ** 2)
                        measured.append(
                            (merge, coefficient, coefficient == best, "validation", score)
                        )
                    measured.append((merge, best, True, "test", alone * share - 0.01))
                    measured.append((merge, 1.0, False, "test", alone * (share - 0.3)))
                results.scores += [
                    Score(
                        results.suite,
                        seed,
                        init,
                        init,
                        "init",
                        merge,
                        coefficient,
                        chosen,
                        names[task],
                        split,
                        metric,
                        score,
                    )
                    for merge, coefficient, chosen, split, score in measured
                ]
    results.add_averages()
    return results


def _add_arm(
    results: Results,
    init: str,
    seed: int,
    noise: random.Random,
    tasks: list[str],
    merges: tuple[str, ...],
    better: bool,
) -> None:
    scale = 0.002 if better else 0.9
    before = {task: scale * math.exp(noise.gauss(0, 0.3)) for task in tasks}
    matrix = [
        [1.0 if i == j else abs(noise.gauss(0.25 if better else 0.8, 0.25)) for j in tasks]
        for i in tasks
    ]
    results.arms.append(
        Arm(
            name=init,
            init=init,
            constraint="init",
            seed=seed,
            adapters={task: f"adapters/{init}/{seed}/{i}" for i, task in enumerate(tasks)},
            diagnostics={
                "leaked_before": before,
                "leaked_after": {task: value + 0.15 for task, value in before.items()},
                "leaked_own_ratio": {
                    task: (sum(row) - 1) / (len(tasks) - 1)
                    for task, row in zip(tasks, matrix, strict=True)
                },
            },
            interference=matrix,
            merges=[
                MergeInfo(
                    merge,
                    MERGES[merge][1],
                    runtime=merge.endswith("_runtime"),
                    samples=8 if merge.endswith("_runtime") else None,
                    path=None if merge.endswith("_runtime") else f"merged/{init}/{seed}/{merge}",
                )
                for merge in merges
            ],
        )
    )


@pytest.fixture(scope="session")
def make_results() -> MakeResults:
    return _results


Run = Callable[..., str]


@pytest.fixture
def osrm(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that should succeed; returns what it printed."""

    def run(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that should be refused; returns its one sentence."""

    def run(*arguments: object) -> str:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 2, captured.out
        error = captured.err.strip().splitlines()[-1]
        assert error.startswith("osrm: ")
        assert "Traceback" not in captured.err
        return error

    return run


@pytest.fixture
def stages(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines about stages, "[1/9] adapters lora ..", printed since they were last asked for."""

    def printed() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]

    return printed


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> Path:
    """Covariances and adapters of all three toy tasks, made by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    for task in TOYS:
        covariance = folder / f"{task}.safetensors"
        command = ["covariance", "--suite", str(toy_suite), "--task", task, "-o", str(covariance)]
        assert main(command) == 0
    for task in TOYS:
        others = [str(folder / f"{other}.safetensors") for other in TOYS if other != task]
        command = ["train", "--suite", str(toy_suite), "--task", task, "--covariances", *others]
        command += ["--subspace.init", "osrm"]
        assert main([*command, "-o", str(folder / task)]) == 0
    return folder


@pytest.fixture(scope="session")
def inputs(trained: Path) -> list[Path]:
    """The adapters of the toy tasks."""
    return [trained / task for task in TOYS]
