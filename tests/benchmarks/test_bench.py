"""`osrm bench` end to end on the toy suite: what it writes, reuses, and survives."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from files import write_rows

from benchmarks.cli import main
from benchmarks.results import Results
from benchmarks.suites import load_suite
from merge_algorithms import Adapter, merge
from osrm import Covariance

STAGES = ("covariances", "subspaces", "adapters", "diagnostics", "curves", "scores")
MERGES = ["task_arithmetic", "ties", "orthogonal_mc_dropout", "orthogonal_mc_dropout_runtime"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main(["bench", "--suite", str(toy_suite), "--runs-dir", str(runs)]) == 0
    return runs / "toy-smoke"


@pytest.fixture
def own_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run, for a test that goes on in it with other settings."""
    return shutil.copytree(run_dir, tmp_path / run_dir.name)


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every stage file's size and time of writing."""
    stages = [folder / kind for kind in STAGES]
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for stage in stages
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    }


def test_results_hold_every_initialisation_all_merges_and_all_tasks(run_dir: Path) -> None:
    results = Results.load(run_dir)
    with (run_dir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == [
        "suite", "seed", "arm", "init", "constraint", "merge", "coefficient", "chosen", "task",
        "split", "metric", "score",
    ]  # fmt: skip
    tested = {(row["arm"], row["merge"], row["task"]) for row in rows if row["split"] == "test"}
    tasks = ("half", "size", "same", "average")
    assert tested == {
        (init, merge, task)
        for init in ("lora", "osrm", "wiener")
        for merge in ("individual", *MERGES)
        for task in tasks
    }
    grid = {row["coefficient"] for row in rows if row["merge"] == "ties" and row["task"] == "half"}
    assert grid == {"0.5", "1.0"}
    for arm in results.arms:
        matrix = arm.interference
        assert [len(row) for row in matrix] == [3, 3, 3]
        assert all(math.isclose(matrix[i][i], 1.0) for i in range(3))
        for task, path in arm.adapters.items():
            adapter = Adapter.load(run_dir / path)
            assert adapter.name == task
            assert (run_dir / path / "head.safetensors").exists()
        for info in arm.merges:
            assert info.runtime == (info.path is None)
            if info.path:
                assert set(Adapter.load(run_dir / info.path).heads) == {"half", "size", "same"}
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "orthogonal_mc_dropout" in page


def test_the_coefficient_is_chosen_on_validation(run_dir: Path) -> None:
    results = Results.load(run_dir)
    for arm in results.arms:
        for info in arm.merges:
            curve = {
                row.coefficient: row.score
                for row in results.scores
                if (row.arm, row.merge, row.task, row.split)
                == (arm.name, info.method, "average", "validation")
            }
            assert info.coefficient == max(curve, key=lambda c: curve[c])


def test_the_card_of_a_merge_shows_its_scores(run_dir: Path) -> None:
    results = Results.load(run_dir)
    for arm in results.arms:
        for info in arm.merges:
            if info.path is not None:
                card = (run_dir / info.path / "README.md").read_text()
                tested = next(
                    row.score
                    for row in results.scores
                    if (row.arm, row.merge, row.task, row.split, row.chosen)
                    == (arm.name, info.method, "average", "test", True)
                )
                assert "| validation | test |" in card
                line = next(line for line in card.splitlines() if line.startswith("| all |"))
                assert line.endswith(f" {tested:.3f} |")


def test_osrm_starts_where_the_others_leak_least(run_dir: Path) -> None:
    before = {arm.name: arm.diagnostics["leaked_before"] for arm in Results.load(run_dir).arms}
    for task, energy in before["osrm"].items():
        assert energy < before["lora"][task]


def test_a_second_run_reuses_every_stage(
    run_dir: Path, toy_suite: Path, stages: Callable[[], list[str]]
) -> None:
    before = _snapshot(run_dir)
    scores = Results.load(run_dir).scores
    assert main(["bench", "--suite", str(toy_suite), "--runs-dir", str(run_dir.parent)]) == 0
    assert _snapshot(run_dir) == before
    assert Results.load(run_dir).scores == scores
    lines = stages()
    assert lines
    assert all("(reused)" in line for line in lines)


def test_tasks_in_another_order_keep_their_interference(own_run: Path, toy_suite: Path) -> None:
    before = Results.load(own_run)
    head, tasks = toy_suite.read_text(encoding="utf-8").split("tasks:\n")
    turned = toy_suite.with_name("turned.yaml")
    lines = "".join(reversed(tasks.splitlines(keepends=True)))
    turned.write_text(f"{head}tasks:\n{lines}", encoding="utf-8")
    command = ["bench", "--suite", str(turned), "--runs-dir", str(own_run.parent)]
    assert main([*command, "--name", own_run.name]) == 0
    after = Results.load(own_run)
    assert [task.name for task in after.tasks] == ["same", "size", "half"]
    for old, new in zip(before.arms, after.arms, strict=True):
        assert old.adapters == new.adapters
        for row, other in zip(old.interference, reversed(new.interference), strict=True):
            assert row == pytest.approx(other[::-1])


def test_plain_adapters_are_reused_whatever_their_training_does_not_read(
    own_run: Path, toy_suite: Path, stages: Callable[[], list[str]]
) -> None:
    before = {arm.name: arm for arm in Results.load(own_run).arms}
    suite = toy_suite.with_name("changed.yaml")
    text = toy_suite.read_text(encoding="utf-8")
    suite.write_text(text.replace("[accuracy, f1]", "[f1, accuracy]"), encoding="utf-8")
    command = ["bench", "--suite", str(suite), "--runs-dir", str(own_run.parent)]
    command += ["--name", own_run.name, "--inits", "lora", "osrm", "--merges", "average"]
    command += ["--tasks", "half", "size", "--rows.validation", "12", "--rows.covariance", "16"]
    assert main(command) == 0
    lines = stages()
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    for kind, reused in (("adapters lora", 2), ("adapters osrm", 0), ("diagnostics lora", 0)):
        found = [line for line in lines if f"] {kind}" in line]
        assert len(found) == 2
        assert sum("(reused)" in line for line in found) == reused
    plain, _ = Results.load(own_run).arms
    kept = before["lora"].adapters
    assert plain.adapters == {task: kept[task] for task in ("half", "size")}
    for name in ("drift_mean", "leaked_before", "leaked_after", "leaked_own_ratio"):
        old, new = (arm.diagnostics[name]["half"] for arm in (before["lora"], plain))
        assert (old == new) == (name == "drift_mean"), "it leaks to other inputs"


def test_other_names_for_the_labels_of_a_task_train_no_other_task_again(
    own_run: Path, toy_suite: Path, stages: Callable[[], list[str]]
) -> None:
    suite = toy_suite.with_name("named.yaml")
    text = toy_suite.read_text(encoding="utf-8")
    same = "same: {text: [text, other], metrics: [accuracy]}"
    suite.write_text(text.replace(same, same[:-1] + ", labels: [other, equal]}"), encoding="utf-8")
    command = ["bench", "--suite", str(suite), "--runs-dir", str(own_run.parent)]
    command += ["--name", own_run.name, "--inits", "lora", "osrm", "--merges", "average"]
    assert main(command) == 0
    built = [line.split("] ")[1] for line in stages() if "(reused)" not in line]
    assert {line for line in built if line.startswith(("covariances", "adapters"))} == {
        "adapters lora-init-seed0/same",
        "adapters osrm-init-seed0/same",
    }


def test_other_settings_keep_the_stages_they_share(
    own_run: Path, toy_suite: Path, stages: Callable[[], list[str]]
) -> None:
    before = _snapshot(own_run)
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(own_run.parent)]
    changed = ["--inits", "osrm", "--subspace.constraint", "project"]
    changed += ["--subspace.k", "8", "--merges", "average"]
    assert main([*command, *changed, "--seeds", "3"]) == 0
    after = _snapshot(own_run)
    assert before.items() <= after.items(), "a finished stage was touched"
    lines = stages()
    reused = [line for line in lines if "(reused)" in line]
    assert len(reused) == 3, "the covariances are the same"
    (arm,) = Results.load(own_run).arms
    assert (arm.name, arm.init, arm.constraint, arm.seed) == ("osrm", "osrm", "project", 3)


def test_official_variant_reads_padded_means(toy_suite: Path, tmp_path: Path) -> None:
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(tmp_path)]
    assert main([*command, "--inits", "official", "--merges", "average"]) == 0
    stages = (tmp_path / "toy-smoke" / "covariances").iterdir()
    labels = {path.name.rsplit("-", 1)[0] for path in stages}
    assert labels == {"half-padded", "size-padded", "same-padded"}


def test_methods_that_read_the_data_or_serve_one_task_take_part(
    own_run: Path, toy_suite: Path
) -> None:
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(own_run.parent)]
    assert main([*command, "--inits", "osrm", "--merges", "regmean", "emr_runtime"]) == 0
    results = Results.load(own_run)
    for arm in results.arms:
        by_regmean = Adapter.load(own_run / next(m.path for m in arm.merges if m.path))
        adapters = [Adapter.load(own_run / path, name=t) for t, path in arm.adapters.items()]
        covariances = {
            t: Covariance.load(
                next((own_run / "covariances" / f"osrm-init-seed{arm.seed}").glob(f"{t}-*/*.safe*"))
            )
            for t in arm.adapters
        }
        statistics = {task: c.by_module() for task, c in covariances.items()}
        expected = merge(adapters, "regmean", statistics=statistics)
        expected = expected.scaled(arm.merges[0].coefficient)
        for module, update in expected.updates.items():
            rows = update.rows(0, update.shape[0])
            torch.testing.assert_close(by_regmean.updates[module].dense(), rows)
        assert [info.samples for info in arm.merges] == [None, None], "neither draws masks"
    assert {row.task for row in results.scores if row.merge == "emr_runtime"} >= set(arm.adapters)


@pytest.mark.parametrize(
    ("method", "reason"), [("slerp", "exactly 2 adapters"), ("fisher", "osrm fisher")]
)
def test_methods_that_cannot_take_part_are_refused_before_anything_is_trained(
    method: str, reason: str, toy_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(tmp_path)]
    assert main([*command, "--merges", method]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_run_directory_in_use_is_refused(
    run_dir: Path, toy_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(run_dir / ".lock"):
        status = main(["bench", "--suite", str(toy_suite), "--runs-dir", str(run_dir.parent)])
    assert status == 2
    assert "in use by another process" in capsys.readouterr().err


def test_processes_side_by_side_build_the_same(
    toy_suite: Path, tmp_path: Path, stages: Callable[[], list[str]]
) -> None:
    arms = tmp_path / "arms.yaml"
    arms.write_text(
        "arms: {a: {subspace: {init: osrm}}, b: {train: {epochs: 2}}, j: {joint: true}}"
    )
    command = ["bench", "--suite", str(toy_suite), "--arms", str(arms), "--seeds", "0", "1"]
    command += ["--merges", "regmean", "orthogonal_mc_dropout_runtime"]
    tables, lines = [], []
    for workers in ("1", "2"):
        run = ["--workers", workers, "--runs-dir", str(tmp_path / workers)]
        assert main([*command, *run]) == 0
        said = [line.split("] ")[1] for line in stages()]
        lines.append(said)
        tables.append((tmp_path / workers / "toy-smoke" / "results.csv").read_text())
    assert tables[0] == tables[1]
    assert sorted(lines[0]) == sorted(lines[1])
    assert not any("(reused)" in line for line in lines[1])
    assert main([*command, *run]) == 0
    again = [line.split("] ")[1] for line in stages()]
    assert sorted(again) == sorted(f"{line} (reused)" for line in lines[1])


def test_no_workers_are_refused(toy_suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", str(toy_suite), "--workers", "0"]) == 2
    assert "--workers is 0: give at least 1" in capsys.readouterr().err


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start `osrm` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cli", *command],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("after", "workers"),
    [("covariances", "1"), ("adapters", "1"), ("curves", "1"), ("scores", "2")],
)
def test_ctrl_c_at_any_stage_leaves_whole_stages_and_a_rerun_continues(
    after: str,
    workers: str,
    start: Callable[[list[str]], subprocess.Popen[str]],
    toy_suite: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(tmp_path)]
    command += ["--inits", "osrm", "--train.epochs", "3", "--workers", workers]
    process = start(command)
    folder = tmp_path / "toy-smoke" / after
    deadline = time.monotonic() + 120
    while not folder.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the processes it started get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run again to continue" in errors
    assert "Traceback" not in errors
    left = list((tmp_path / "toy-smoke").rglob("*.tmp"))
    assert left == []
    stages = [
        path
        for path in (tmp_path / "toy-smoke").rglob("*")
        if re.search(r"-[0-9a-f]{10}$", path.name)
    ]
    assert stages or after == "covariances"
    for stage in stages:
        assert (stage / "stage.json").exists()

    assert main(command) == 0
    assert (tmp_path / "toy-smoke" / "report.html").exists()
    assert "average" in capsys.readouterr().out


def test_a_suite_of_150_classes(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    for split, copies in (("train", 4), ("test", 1)):
        for task in ("many", "few"):
            classes = 150 if task == "many" else 2
            path = tmp_path / "data" / task / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["words", "topic"])
                for i in range(150 * copies):
                    writer.writerow([f"w{i % 60} w{i // 60} w{i % 7}", f"topic {i % classes}"])
    task = "{text: [words], label: topic, metrics: [accuracy, f1]}"
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        f"model: {tiny_model('bert')}\ndata: {{dir: data}}\ntasks: {{many: {task}, few: {task}}}\n"
        "train: {max_length: 16}\nrows: {train: null, validation: null, test: null}\n"
    )
    command = ["bench", "--suite", str(suite), "--preset", "smoke", "--runs-dir", str(tmp_path)]
    rows = ["--rows.train", "null", "--rows.validation", "null", "--rows.test", "null"]
    assert main([*command, *rows, "--inits", "lora", "--merges", "ties"]) == 0
    (arm,) = Results.load(tmp_path / "mine-smoke").arms
    info = json.loads((tmp_path / "mine-smoke" / arm.adapters["many"] / "osrm.json").read_text())
    assert len(info["tasks"]["many"]["labels"]) == 150
    assert info["tasks"]["many"]["head"]["outputs"] == 150


# One for each kind of model: the other sizes of Llama are the same at this size.
PAPER = {"glue-roberta-large": "roberta", "glue-t5-large": "t5", "glue-llama-3-8b": "llama"}


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations_run_on_a_tiny_model_of_the_same_architecture(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    columns = {"cola": ("sentence",), "mnli": ("premise", "hypothesis")}
    for task, text in columns.items():
        rows = [dict.fromkeys(text, f"w{i} w{i % 5}") | {"label": i % 2} for i in range(40)]
        for split in ("train", "validation"):
            write_rows(tmp_path / "data" / task / f"{split}.jsonl", rows)
    command = ["bench", "--suite", name, "--data-dir", str(tmp_path / "data"), "--preset", "smoke"]
    small = ["--train.max_length", "16", "--adapter.rank", "4", "--runs-dir", str(tmp_path)]
    model = ["--model", str(tiny_model(PAPER[name])), "--merges", "task_arithmetic"]
    assert main([*command, *small, *model, "--tasks", "cola", "mnli"]) == 0
    arms = Results.load(tmp_path / f"{name}-smoke").arms
    assert [arm.init for arm in arms] == ["lora", "osrm", "wiener"]
    for arm in arms:
        info = json.loads(
            (tmp_path / f"{name}-smoke" / arm.adapters["mnli"] / "osrm.json").read_text()
        )
        assert info["tasks"]["mnli"]["head"]["pooling"] == load_suite(name).head.pooling
