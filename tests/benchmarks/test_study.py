"""`osrm bench --study modes` end to end: stopped by Ctrl-C, continued, looked at."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
import yaml

from benchmarks.arms import ArmSettings
from benchmarks.bench import Bench, BenchSettings
from benchmarks.cli import main
from benchmarks.results import Results
from benchmarks.study import Study, StudySettings, open_journal
from benchmarks.study_results import StudyTrial, TrialOutcome
from benchmarks.suites import load_suite
from benchmarks.workers import Done, Refused
from merge_algorithms import UserError
from trainers.backbone import ModelRef
from trainers.settings import AdapterSettings, SubspaceSettings, TrainSettings

TRIALS = 8
REFERENCES = [
    "plain LoRA",
    "the paper",
    "the released code",
    "contrastive",
    "contrastive, penalised",
    "wiener, penalised",
]


def _command(suite: Path, runs: Path) -> list[str]:
    command = ["bench", "--suite", str(suite), "--runs-dir", str(runs), "--study", "modes"]
    return [*command, "--merges", "task_arithmetic"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> Path:
    """A study of two workers that was stopped after its first trial, and finished by one."""
    runs = tmp_path_factory.mktemp("study")
    folder = runs / "toy-smoke"
    command = _command(toy_suite, runs)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cli", *command, "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (folder / "study.csv").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run again to continue" in errors
    assert "Traceback" not in errors
    assert list(folder.rglob("*.tmp")) == []
    assert main([*command, "--study-trials", str(TRIALS), "--workers", "1"]) == 0
    return folder


def _rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "study.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_reference_and_then_the_search_is_measured_once(run_dir: Path) -> None:
    rows = _rows(run_dir)
    assert len(rows) == TRIALS
    assert sorted(filter(None, (row["reference"] for row in rows))) == sorted(REFERENCES)
    assert len({row["name"] for row in rows}) == TRIALS
    for row in rows:
        assert row["refused"] == ""
        for column in ("individual", "merged", "merged_at_1", "area", "leaked_own_ratio"):
            assert abs(float(row[column])) < 10
        assert (row["mu"] != "") == (row["init"] == "wiener")
        assert (row["rho"] != "") == (row["init"] in ("contrastive", "wiener"))
        assert (row["k"] != "") == (row["constraint"] == "project")
        assert (row["scale"] == "") == (row["init"] in ("lora", "wiener"))
        assert float(row["alpha"]) == 2 * int(row["rank"])
        assert float(row["task_arithmetic"]) == float(row["merged"])


def test_the_front_is_what_nothing_beats(run_dir: Path) -> None:
    rows = _rows(run_dir)
    points = {row["name"]: (float(row["individual"]), float(row["merged"])) for row in rows}
    front = {
        name
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
    }
    marked = [row["name"] for row in rows if row["on_front"] == "True"]
    assert {points[name] for name in marked} == {points[name] for name in front}


def test_the_page_is_self_contained_and_names_every_trial(run_dir: Path) -> None:
    page = (run_dir / "study.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert "<svg" in page
    for row in _rows(run_dir):
        assert row["name"].replace("+", " +") in page


def test_finalists_come_with_plain_lora_of_their_rank_and_rate(run_dir: Path) -> None:
    arms = yaml.safe_load((run_dir / "arms.yaml").read_text(encoding="utf-8"))["arms"]
    plain = [
        {key: arm[key] for key in arm if key != "subspace"}
        for arm in arms.values()
        if arm["subspace"] == {"init": "lora", "leak_penalty": 0.0}
    ]
    for arm in arms.values():
        assert plain.count({key: arm[key] for key in arm if key != "subspace"}) == 1


def test_finalists_go_into_a_bench_that_reuses_their_adapters(
    run_dir: Path, toy_suite: Path, stages: Callable[[], list[str]]
) -> None:
    arms = yaml.safe_load((run_dir / "arms.yaml").read_text(encoding="utf-8"))["arms"]
    names = list(arms)
    validation = {row["name"]: float(row["merged"]) for row in _rows(run_dir)}
    measured = [name for name in names[:-2] if name in validation]
    new = [name for name in names[:-2] if name not in validation]
    assert names == [*measured, *new, "lora", "osrm"]
    assert len(new) <= len(measured) <= 3
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(run_dir.parent)]
    command += ["--arms", str(run_dir / "arms.yaml"), "--merges", "task_arithmetic"]
    assert main(command) == 0
    lines = stages()
    # Of an arm three tasks' adapters, and their scores alone and merged.
    for kind, stages in (("covariances", 0), ("adapters", 3), ("curves", 2)):
        found = [line for line in lines if f"] {kind}" in line]
        assert found
        assert sum("(reused)" not in line for line in found) == stages * len(new)
    results = Results.load(run_dir)
    assert results.arm_names() == names
    for name in measured:
        score = results.score(name, "task_arithmetic", "average", "validation")
        assert score.mean == pytest.approx(validation[name])


def test_runs_with_the_same_settings_are_one_study(run_dir: Path) -> None:
    journal = open_journal(run_dir / "study.log")
    (study,) = journal.get_all_studies()
    states = [trial.state.name for trial in journal.get_all_trials(study._study_id)]
    assert set(states) <= {"COMPLETE", "FAIL", "WAITING"}
    assert states.count("COMPLETE") == TRIALS
    assert "FAIL" in states, "one was interrupted"


def test_a_journal_survives_a_kill_in_the_middle_of_a_line(run_dir: Path, tmp_path: Path) -> None:
    whole = (run_dir / "study.log").read_bytes()
    (tmp_path / "study.log").write_bytes(whole + b'{"op_code": 4, "tri')
    (tmp_path / "study.log.lock").symlink_to("study.log")
    open_journal(tmp_path / "study.log").set_study_user_attr(0, "written", True)
    journal = open_journal(tmp_path / "study.log")
    assert journal.get_study_user_attrs(0) == {"written": True}
    before = open_journal(run_dir / "study.log").get_all_trials(0)
    assert len(journal.get_all_trials(0)) == len(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--inits", "lora"), "--study modes searches the arms itself"),
        (("--study-trials", "0"), "--study-trials is 0: give at least 1"),
        (("--workers", "0"), "--workers is 0: give at least 1"),
        (("--merges", "slerp"), "exactly 2 adapters"),
        (("--study", "mods"), "did you mean 'modes'"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    arguments: tuple[str, ...],
    message: str,
    toy_suite: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    assert message in refused(*_command(toy_suite, tmp_path), *arguments)
    assert list(tmp_path.iterdir()) == []


def test_limits_without_a_study_are_refused(toy_suite: Path, refused: Callable[..., str]) -> None:
    assert "add --study modes" in refused("bench", "--suite", toy_suite, "--study-trials", "3")


OUTCOME = TrialOutcome(0.5, {"ties": {1.0: 0.4}}, 0.1)


def answered(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[StudyTrial], Done | Refused]
) -> list[StudyTrial]:
    """Have trials answered in place of the processes that measure them; those that were given."""
    given: list[StudyTrial] = []

    class Here:
        idle = (0,)

        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def give(self, index: int, trial: StudyTrial) -> None:
            given.append(trial)

        def messages(self) -> Iterator[tuple[int, Done | Refused]]:
            yield 0, answer(given[-1])

    monkeypatch.setattr("benchmarks.study.Workers", Here)
    return given


def test_refused_arms_are_not_tried_again_and_a_small_space_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit: six arms, all but plain LoRA diverge, and one of those predicts nothing."""

    class Space:
        def __init__(self, *_: object) -> None:
            pass

        def choices(self) -> list[str]:
            return []

        def references(self) -> list[tuple[str, dict[str, object]]]:
            return [("plain LoRA", {"init": "lora", "rank": 8})]

        def propose(self, trial: optuna.Trial) -> ArmSettings:
            init = trial.suggest_categorical("init", ["lora", "osrm"])
            return self.arm({"init": init}, trial.suggest_categorical("rank", [8, 16, 32]))

        def arm(self, chosen: dict[str, Any], rank: int = 8) -> ArmSettings:
            subspace = SubspaceSettings(chosen["init"])
            name = f"{subspace.init}{rank}"
            return ArmSettings(name, AdapterSettings(rank=rank), TrainSettings(), subspace)

        def plain(self, arm: ArmSettings) -> ArmSettings:
            return self.arm({"init": "lora"}, arm.adapter.rank)

    outcomes = {"lora8": OUTCOME, "lora16": replace(OUTCOME, individual=math.nan)}

    def answer(trial: StudyTrial) -> Done | Refused:
        outcome = outcomes.get(trial.arm.name)
        return Done(outcome, 1.0) if outcome else Refused("training diverged")

    monkeypatch.setattr("benchmarks.study.Space", Space)
    answered(monkeypatch, answer)
    suite = SimpleNamespace(
        name="s", seeds=[2**40], preset="p", adapter=AdapterSettings(), train=TrainSettings()
    )
    bench = SimpleNamespace(
        run_dir=tmp_path,
        suite=suite,
        model=SimpleNamespace(name="m", fingerprint="f"),
        settings=SimpleNamespace(merges=["ties"]),
        describe=lambda: {"arms": []},
        data=lambda train: {},
    )
    results = Study(cast(Bench, bench), StudySettings(minutes=None)).run()
    names = [trial.arm.name for trial in results.trials]
    assert sorted(names) == ["lora16", "lora32", "lora8", "osrm16", "osrm32", "osrm8"]
    assert sorted(trial.arm.name for trial, _ in results.scored()) == ["lora16", "lora8"]
    assert [trial.arm.name for trial in results.front()] == ["lora8"]


def test_no_trial_is_begun_that_would_end_too_late(
    toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial takes a minute: after three of them a fourth would end in the fourth minute."""
    now = 1000.0

    def answer(trial: StudyTrial) -> Done:
        nonlocal now
        now += 60
        return Done(OUTCOME, 60.0)

    given = answered(monkeypatch, answer)
    monkeypatch.setattr("benchmarks.study.time", SimpleNamespace(monotonic=lambda: now))
    command = _command(toy_suite, tmp_path)
    command[-1] = "ties"  # what OUTCOME was merged by
    assert main([*command, "--study-minutes", "3"]) == 0
    assert len(given) == 3


def bench_of(suite: Path, run_dir: Path, data: Path | None = None, **changes: Any) -> Bench:
    loaded = replace(load_suite(str(suite), data_dir=data and str(data)), **changes)
    model = ModelRef(loaded.model, loaded.model)
    return Bench(loaded, model, BenchSettings([], ["ties"]), run_dir)


def test_a_study_goes_on_while_the_rows_are_the_same(
    toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = answered(monkeypatch, lambda trial: Done(OUTCOME, 1.0))

    def measured(*data: Path, **changes: Any) -> int:
        """Trials so far, after a study of one."""
        bench = bench_of(toy_suite, tmp_path / "run", *data, **changes)
        Study(bench, StudySettings(None, trials=1)).run()
        return len(given)

    assert measured() == 1
    moved = tmp_path / "moved"
    shutil.copytree(toy_suite.parent / "data", moved)
    rows = replace(load_suite(str(toy_suite)).rows, test=10)
    assert measured(moved, rows=rows, seeds=[0, 7]) == 1, "none of it decides what a trial scores"
    train = moved / "half" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[1:]))
    assert measured(moved) == 2
    monkeypatch.setattr("benchmarks.study.versions", lambda: {"torch": "0"})
    assert measured(moved) == 3


def test_a_trial_for_which_the_memory_ran_out_is_left_to_the_next_run(
    toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Refused("out of memory: run again with fewer --workers", again=True)
    given = answered(monkeypatch, lambda trial: Done(OUTCOME, 1.0) if trial.number else out)
    bench = bench_of(toy_suite, tmp_path)
    results = Study(bench, StudySettings(None, trials=2)).run()
    assert [trial.reference for trial in given] == REFERENCES[:3]
    assert [trial.reference for trial in results.trials] == REFERENCES[1:3]
    results = Study(bench, StudySettings(None, trials=6)).run()
    assert sorted(trial.reference for trial in results.trials) == sorted(REFERENCES)
    assert not any(trial.refused for trial in results.trials)
    answered(monkeypatch, lambda trial: out)
    with pytest.raises(UserError, match="none of 5 trials could be scored: out of memory"):
        Study(bench_of(toy_suite, tmp_path / "none"), StudySettings(None)).run()
