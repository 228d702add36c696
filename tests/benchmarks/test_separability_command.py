"""`osrm separability` on covariance files on disk, with good and with bad input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from factories import covariance_of

from benchmarks.cli import main
from osrm import Covariance, separations

TASKS = ("half", "size", "same")


@pytest.fixture
def files(trained: Path) -> list[str]:
    return [str(trained / f"{task}.safetensors") for task in TASKS]


def printed(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> list[list[str]]:
    """The rows of the table."""
    assert main(["separability", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_modules_where_the_tasks_differ_come_first(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    found = separations({Path(file).stem: Covariance.load(file) for file in files}, mu=0.5)
    modules = list(found["half"])
    rows = printed(capsys, [*files, "--mu", "0.5", "--all"])
    assert sorted(row[0] for row in rows) == sorted(modules)
    assert [float(row[2]) for row in rows] == sorted(float(row[2]) for row in rows)
    for module, own, leaked, worst in rows:
        of = [found[task][module] for task in TASKS]
        assert float(own) == pytest.approx(sum(s.own for s in of) / 3, abs=6e-4)
        assert float(leaked) == pytest.approx(sum(s.leaked for s in of) / 3, abs=6e-4)
        assert float(worst) == pytest.approx(max(s.leaked for s in of), abs=6e-4)
    kinds = printed(capsys, files)
    assert len(kinds) < len(modules)
    assert all(".*." in row[0] for row in kinds)


def test_the_worst_task_is_so_in_the_mean_over_layers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Of one number, all that a filter can do is to scale it: what leaks is the others' energy over
    # the own, 4 and 1 for the quiet task in the two layers, 1/4 and 1 for the loud one.
    for task, size in (("quiet", 1.0), ("loud", 2.0)):
        inputs = {"layer.0.key": torch.tensor([[size]]), "layer.1.key": torch.tensor([[1.0]])}
        covariance_of(inputs, task=task).save(tmp_path / f"{task}.safetensors")
    files = [str(tmp_path / f"{task}.safetensors") for task in ("quiet", "loud")]
    ((kind, _, leaked, worst),) = printed(capsys, files)
    assert kind == "layer.*.key"
    assert float(leaked) == pytest.approx((4 + 1 + 1 / 4 + 1) / 4, abs=6e-4)
    assert float(worst) == pytest.approx((4 + 1) / 2, abs=6e-4)


def test_bad_input(files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tuned = Covariance.load(files[0])
    tuned.meta["tuned"] = "half"
    tuned.save(tmp_path / "tuned.safetensors")
    cases = [
        ([str(tmp_path / "tuned.safetensors"), *files[1:]], "'half' was collected with --tuned"),
        (files[:1], "there is one task, 'half': give the covariance files of at least two"),
        ([*files, "--mu", "0"], "mu is 0"),
        ([files[0], files[0]], "second covariance of 'half'"),
        ([files[0], str(tmp_path / "none.safetensors")], "none.safetensors"),
    ]
    for arguments, expected in cases:
        assert main(["separability", *arguments]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert "Traceback" not in said
