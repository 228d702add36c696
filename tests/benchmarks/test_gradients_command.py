"""`osrm gradients`, the training that reads its files, and the arm of a bench that does both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.cli import main
from benchmarks.results import Results
from merge_algorithms import Adapter
from osrm import Gradients

Run = Callable[..., str]
TASKS = ("half", "size", "same")
TWICE = ["--subspace.init", "lora", "--subspace.output_mu", "5"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> Path:
    """Plain adapters of all tasks, and their gradients."""
    folder = tmp_path_factory.mktemp("gradients")
    for task in TASKS:
        train = ["train", "--suite", str(toy_suite), "--task", task, "--subspace.init", "lora"]
        assert main([*train, "-o", str(folder / task)]) == 0
        collect = ["gradients", str(folder / task), "--suite", str(toy_suite), "--examples", "32"]
        assert main([*collect, "-o", str(folder / f"{task}.safetensors")]) == 0
    return folder


def _files(first: Path, *tasks: str) -> list[str]:
    return ["--gradients", *(str(first / f"{task}.safetensors") for task in tasks)]


@pytest.fixture(scope="module")
def second(first: Path, toy_suite: Path) -> Path:
    """The task `half`, trained apart from what the others read."""
    output = first / "half-again"
    command = ["train", "--suite", str(toy_suite), "--task", "half", *TWICE]
    assert main([*command, *_files(first, *TASKS), "-o", str(output)]) == 0
    return output


def test_the_file_fits_the_adapter_and_says_what_it_is(first: Path) -> None:
    for task in TASKS:
        adapter = Adapter.load(first / task)
        gradients = Gradients.load(first / f"{task}.safetensors")
        assert gradients.examples == 32
        assert gradients.meta["task"] == task
        assert gradients.meta["tuned_fingerprint"] == adapter.fingerprint
        shapes = {module: len(moment) for module, moment in gradients.moments.items()}
        assert shapes == {module: update.shape[0] for module, update in adapter.updates.items()}


def test_what_others_read_is_left_alone(first: Path, second: Path) -> None:
    """Share of an update's energy in the directions that the other tasks read."""
    others = [Gradients.load(first / f"{task}.safetensors") for task in ("size", "same")]

    def read(path: Path) -> float:
        share = 0.0
        for module, update in Adapter.load(path).updates.items():
            dense = update.dense()
            for other in others:
                g = other.moments[module]
                share += float((dense.T @ g @ dense).trace() / g.trace() / dense.square().sum())
        return share

    assert read(second) < 0.5 * read(first / "half")
    assert Adapter.load(second).info["subspace"]["output_mu"] == 5


def test_gradients_make_the_filter_on_b_the_default(
    first: Path, toy_suite: Path, tmp_path: Path
) -> None:
    size = first / "covariance.safetensors"
    collect = ["covariance", "--suite", str(toy_suite), "--task", "size", "-o", str(size)]
    assert main(collect) == 0
    train = ["train", "--suite", str(toy_suite), "--task", "half", "--covariances", str(size)]
    assert main([*train, "-o", str(tmp_path / "one")]) == 0
    assert main([*train, *_files(first, "size"), "-o", str(tmp_path / "both")]) == 0
    none = ["--subspace.init", "lora", "--subspace.output_mu", "0"]
    assert main([*train[:5], *none, "-o", str(tmp_path / "plain")]) == 0
    one, both = (Adapter.load(tmp_path / name).info["subspace"] for name in ("one", "both"))
    assert (one["mu"], one["output_mu"]) == (0.05, 0)
    assert both == one | {"output_mu": 0.15}


def test_an_arm_of_a_bench_is_these_commands(
    first: Path, second: Path, toy_suite: Path, tmp_path: Path, stages: Callable[[], list[str]]
) -> None:
    arms = tmp_path / "arms.yaml"
    arms.write_text(
        "arms:\n  once: {subspace: {init: lora}}\n"
        "  twice: {subspace: {init: lora, output_mu: 5}}\n"
        "  less: {subspace: {init: lora, output_mu: 1}}\n",
        encoding="utf-8",
    )
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(tmp_path), "--arms", str(arms)]
    command += ["--merges", "task_arithmetic", "--seeds", "0", "--name", "twice"]
    assert main([*command, "--workers", "2"]) == 0
    built = stages()
    assert built[-1].startswith(f"[{len(built)}/{len(built)}]")
    assert sum("] gradients" in line for line in built) == 3, "of the first training of all arms"
    assert sum("] adapters" in line for line in built) == 3 * 3
    arm = {arm.name: arm for arm in Results.load(tmp_path / "twice").arms}["twice"]
    own = Adapter.load(tmp_path / "twice" / arm.adapters["half"])
    for module, update in Adapter.load(second).updates.items():
        torch.testing.assert_close(own.updates[module].dense(), update.dense())
    assert main(command) == 0
    again = stages()
    assert len(again) == len(built)
    assert all("(reused)" in line for line in again)


def test_a_bench_trains_behind_both_filters_in_two_rounds(
    toy_suite: Path, tmp_path: Path, stages: Callable[[], list[str]]
) -> None:
    arms = tmp_path / "arms.yaml"
    arms.write_text(
        "arms:\n  both: {subspace: {init: wiener}}\n"
        "  first: {subspace: {init: wiener, output_mu: 0}}\n",
        encoding="utf-8",
    )
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(tmp_path), "--seeds", "0"]
    command += ["--merges", "task_arithmetic", "--workers", "1", "--name", "both"]
    assert main([*command, "--arms", str(arms)]) == 0
    built = stages()
    assert sum("] gradients" in line for line in built) == 3
    assert sum("] adapters" in line for line in built) == 2 * 3, "the first round is shared"
    assert main([*command, "--inits", "wiener"]) == 0
    assert sum("(reused)" in line for line in stages() if "] adapters" in line) == 2 * 3


def test_what_is_missing_or_does_not_fit_is_said(
    refused: Run, first: Path, toy_suite: Path, tmp_path: Path
) -> None:
    command = ["train", "--suite", toy_suite, "--task", "half", "-o", tmp_path / "out"]
    assert "needs the gradients of other tasks" in refused(*command, *TWICE)
    assert "needs the gradients of other tasks" in refused(*command, *TWICE, *_files(first, "half"))
    none = ["--subspace.output_mu", "0"]
    assert "--gradients has no effect" in refused(*command, *none, *_files(first, "size"))
    plain = ["--subspace.init", "lora"]
    assert "--gradients has no effect" in refused(*command, *plain, *_files(first, "size"))
    strict = [*plain, "--subspace.output_mu", -1, *_files(first, "size")]
    assert "output_mu is -1.0" in refused(*command, *strict)
    narrow = [*TWICE, *_files(first, "size"), "--adapter.targets", "[query, key]"]
    said = refused(*command, *narrow)
    assert "no output filter for module 'encoder.layer.0.attention.self.key'" in said
    assert "collect the gradients with the adapter's target modules" in said
    weights = [*TWICE, *_files(first, "size"), "--subspace.weights", "{size: 0}"]
    assert "weights of all other tasks are 0" in refused(*command, *weights)
    file = first / "size.safetensors"
    again = ["gradients", first / "size", "--suite", toy_suite, "-o", file]
    assert "exists" in refused(*again)
    fisher = ["train", *command[1:], *TWICE, "--gradients", first / "half" / "head.safetensors"]
    assert "not a gradients file" in refused(*fisher)
