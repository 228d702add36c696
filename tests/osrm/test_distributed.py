"""Two processes that collect together against one that has all the data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from osrm import Covariance

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, directory, str(rank), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return directory


def of_ranks(results: Path, scenario: str) -> list[Covariance]:
    for error in results.glob(f"{scenario}.?.error"):
        raise AssertionError(error.read_text())
    return [Covariance.load(results / f"{scenario}.{rank}.safetensors") for rank in range(2)]


def error(results: Path, scenario: str, rank: int) -> str:
    return (results / f"{scenario}.{rank}.error").read_text()


@pytest.mark.parametrize(
    "scenario",
    ["plain", "empty", "float64", "spilled", "ddp", "ddp-peft", "fsdp1", "fsdp2", "fsdp2-peft"],
)
def test_two_ranks_equal_one_process(scenario: str, results: Path) -> None:
    expected = Covariance.load(results / "reference.safetensors")
    first, second = of_ranks(results, scenario)
    assert first.fingerprint == second.fingerprint
    assert first.meta == second.meta == {"task": "a"}
    for found in (first, second):
        assert found.modules == expected.modules
        assert (found.counts, found.positions) == (expected.counts, expected.positions)
        for part in ("matrices", "means"):
            for key, tensor in getattr(expected, part).items():
                wide = getattr(found, part)[key].double()
                assert (wide - tensor).norm() <= 1e-6 * tensor.double().norm(), key
    matrix = next(iter(first.matrices.values()))
    assert matrix.dtype == (torch.float64 if scenario == "float64" else torch.float32)


def test_spilling_does_not_change_what_ranks_pool(results: Path) -> None:
    paths = [results / f"{name}.0.safetensors" for name in ("plain", "spilled")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("scenario", ["sketch", "sketch-empty"])
def test_sketches_are_pooled(scenario: str, results: Path) -> None:
    expected = Covariance.load(results / "reference-sketch.safetensors")
    first, second = of_ranks(results, scenario)
    assert first.fingerprint == second.fingerprint
    assert first.counts == expected.counts
    for key, matrix in expected.matrices.items():
        found = first.matrices[key]
        assert (found - matrix).norm() <= 0.01 * matrix.norm()
        torch.testing.assert_close(found.trace(), matrix.trace(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scenario", ["nan", "nan-fsdp2"])
def test_a_failure_on_one_rank_is_raised_on_both(scenario: str, results: Path) -> None:
    message = "the input of encoder.layer.0.attention.self.query has a NaN or infinite value"
    assert error(results, scenario, 1).startswith(f"UserError: {message} in batch 1")
    assert error(results, scenario, 0).startswith(f"UserError: rank 1 of 2 failed: {message}")


def test_bad_data_on_one_rank_is_raised_on_both(results: Path) -> None:
    assert "batch 0 is a int" in error(results, "no-mapping", 1)
    assert "rank 1 of 2 failed: batch 0 is a int" in error(results, "no-mapping", 0)


def test_no_data_at_all_is_an_error_on_both(results: Path) -> None:
    for rank in range(2):
        assert "no rank has a batch" in error(results, "no-data", rank)


def test_a_sharded_model_needs_a_batch_on_every_rank(results: Path) -> None:
    assert "rank 1 has no batch" in error(results, "empty-fsdp2", 1)
    assert "rank 1 of 2 failed: rank 1 has no batch" in error(results, "empty-fsdp2", 0)


def test_sharing_that_differs_between_ranks_is_an_error_on_both(results: Path) -> None:
    for rank in range(2):
        assert "second reads the input of second on rank 1 and that of first" in error(
            results, "sharing", rank
        )
