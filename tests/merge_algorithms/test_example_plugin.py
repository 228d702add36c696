"""A package of a third party, installed as any other: its method works by name everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merge_algorithms import Adapter

SOURCE = Path(__file__).parent / "example_plugin"
PIP = "--quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation"
# Several commands in one process: most of the time goes into imports.
COMMANDS = """
import json, sys
from benchmarks.cli import main
statuses = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(statuses)
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package as pip installs it, without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    # Building leaves files beside the source.
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / "installed"
    done = run("-m", "pip", "install", *PIP.split(), "--target", target, folder / "source")
    assert done.returncode == 0, done.stderr
    return target


def test_the_method_is_explained_and_merges(installed, random_adapter, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    adapters = [random_adapter(f"t{t}", seed=t, config=config) for t in range(5)]
    for adapter in adapters:
        adapter.save(tmp_path / adapter.name)
    paths = [str(tmp_path / adapter.name) for adapter in adapters]
    weights = [1.0, 2.0, 0.5, 1.5, 1.0]
    merge = ["merge", *paths, "--method", "trimmed_mean", "--weights", *map(str, weights)]
    commands = [
        ["methods", "trimmed_mean"],
        [*merge, "--cut", "0.4", "-o", str(tmp_path / "merged")],
        [*merge, "--cut", "0.5", "-o", str(tmp_path / "refused")],
    ]
    done = run("-c", COMMANDS, json.dumps(commands), PYTHONPATH=str(installed), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 2]", done.stderr

    assert "mean of each entry without its extremes" in done.stdout
    assert "--cut  float, 0.25" in done.stdout
    found = Adapter.load(tmp_path / "merged")
    for module, update in found.updates.items():
        dense = zip(weights, (adapter.updates[module].dense() for adapter in adapters), strict=True)
        # Two of five are cut at either end: the median is left.
        median = torch.stack([weight * rows for weight, rows in dense]).median(0).values
        torch.testing.assert_close(update.dense(), median, rtol=0, atol=1e-4)
    record = json.loads((tmp_path / "merged" / "osrm.json").read_text())["merge"]
    assert (record["method"], record["options"]) == ("trimmed_mean", {"cut": 0.4})
    assert "cut=0.5 is outside [0, 1/2)" in done.stderr
    assert not (tmp_path / "refused").exists()
