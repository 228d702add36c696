"""The leaks that a training records, and the A that it says it starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.suites import Suite
from merge_algorithms import Adapter
from osrm import Covariance, lora_a
from trainers.backbone import ModelRef
from trainers.confinement import Confinement
from trainers.data import TaskData
from trainers.jobs import task_covariance
from trainers.settings import SubspaceSettings
from trainers.training import START, leaks, train_task


@pytest.fixture(scope="module")
def covariances(suite: Suite, data: dict[str, TaskData]) -> dict[str, Covariance]:
    model = ModelRef("toy/bert", suite.model)
    return {
        name: task_covariance(model, rows, suite.adapter.targets) for name, rows in data.items()
    }


@pytest.fixture
def trained(
    suite: Suite,
    data: dict[str, TaskData],
    covariances: dict[str, Covariance],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Trains the task 'half' into a directory of its own."""

    def train(subspace: SubspaceSettings, rate: float = 1e-2, measure: bool = True) -> Path:
        output = tmp_path_factory.mktemp("half")
        train_task(
            ModelRef("toy/bert", suite.model),
            data["half"],
            output,
            adapter=suite.adapter,
            head=suite.head,
            train=replace(suite.train, learning_rate=rate),
            subspace=subspace,
            covariances=covariances,
            measure=measure,
        )
        return output

    return train


@pytest.mark.parametrize("init", ["wiener", "lora"])
def test_recorded_leaks_are_those_of_the_tensors(
    init: Any, trained: Callable[..., Path], covariances: dict[str, Covariance]
) -> None:
    """The other tasks count alike in what is recorded, whatever their weights in training."""

    def train(rate: float) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
        output = trained(SubspaceSettings(init, weights={"size": 3.0}), rate)
        tensors = load_file(output / "adapter_model.safetensors")
        factors = {}
        for module in covariances["half"].modules:
            name = f"base_model.model.{module}.lora_"
            factors[module] = tensors[f"{name}A.weight"], tensors[f"{name}B.weight"]
        return json.loads((output / "osrm.json").read_text())["diagnostics"], factors

    def moments(module: str) -> tuple[Tensor, Tensor]:
        half, size, same = (
            covariances[task].matrix(module).double() for task in ("half", "size", "same")
        )
        return (size + same) / 2, half

    def leaked(factors: dict[str, tuple[Tensor, Tensor]]) -> float:
        found = []
        for module, (a, _) in factors.items():
            a = a.double()
            found.append(float((a @ moments(module)[0] @ a.T).trace() / a.square().sum()))
        return sum(found) / len(found)

    _, start = train(0.0)  # the same seed at a rate of 0: where A starts
    recorded, end = train(1e-2)
    shifts = torch.zeros(2, dtype=torch.float64)  # of the others' inputs, of the own ones
    for module, (a, b) in end.items():
        dw = b.double() @ a.double()
        shifts += torch.stack([(dw @ moment @ dw.T).trace() for moment in moments(module)])
    assert recorded["leaked_before"] == pytest.approx(leaked(start), rel=1e-5)
    assert recorded["leaked_after"] == pytest.approx(leaked(end), rel=1e-5)
    assert recorded["leaked_own_ratio"] == pytest.approx(float(shifts[0] / shifts[1]), rel=1e-5)
    assert leaked(end) != pytest.approx(leaked(start), rel=1e-3), "A has not moved"


@pytest.mark.parametrize("init", ["wiener", "lora"])
def test_leaks_that_are_measured_afterwards_are_the_same(
    init: Any, trained: Callable[..., Path], covariances: dict[str, Covariance]
) -> None:
    measured = trained(SubspaceSettings(init))
    plain = trained(SubspaceSettings(init), measure=False)
    info, bare = (json.loads((path / "osrm.json").read_text()) for path in (measured, plain))
    for file in ("adapter_model.safetensors", "head.safetensors"):
        assert (measured / file).read_bytes() == (plain / file).read_bytes()
    assert "validation" not in bare
    assert not (measured / START).exists()
    found = leaks(load_file(plain / START), Adapter.load(plain, name="half"), covariances)
    assert bare["diagnostics"] | found == pytest.approx(info["diagnostics"], rel=1e-9)


RANDOM = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))  # not symmetric


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"filters": {"0": RANDOM}}, lambda a: a @ RANDOM),
        ({"state": {"0": RANDOM[:5]}, "constraint": "project"}, lambda a: RANDOM[:2]),
        ({}, lambda a: a),
    ],
)
def test_the_start_is_foretold(parts: dict[str, Any], expected: Callable[[Tensor], Tensor]) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
    before = lora_a(model)
    confinement = Confinement(**parts)
    foretold = confinement.starts(before)
    confinement.start(model)
    torch.testing.assert_close(foretold, {"0": expected(before["0"])})
    torch.testing.assert_close(foretold, lora_a(model))
