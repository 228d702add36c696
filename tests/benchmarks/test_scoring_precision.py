"""Scores and statistics in bfloat16: where training is, and close to those in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cli import main
from benchmarks.evaluate import make_evaluator, scoring_dtype
from benchmarks.fusion import Fusion
from benchmarks.suites import load_suite
from merge_algorithms import Adapter
from trainers.backbone import ModelRef, load_tokenizer
from trainers.data import TaskData
from trainers.jobs import task_covariance
from trainers.settings import TrainerOptions

TASKS = ("half", "size", "same")


def test_a_small_update_is_not_rounded_away(toy_suite: Path, trained: Path) -> None:
    """What it changes is as in float32, although bfloat16 cannot tell the weights apart."""
    suite = load_suite(str(toy_suite), "smoke")
    tokenizer = load_tokenizer(suite.model)
    data = {"half": TaskData(suite.tasks["half"], tokenizer, suite.train, suite.rows)}
    adapter = Adapter.load(trained / "half", name="half")
    last = max(name for name in adapter.updates if name.endswith("value"))
    tiny = 2e-3 / float(adapter.updates[last].dense().abs().max())
    one = replace(adapter, updates={last: adapter.updates[last].scaled(tiny)})
    changes = {}
    for dtype in (torch.float32, torch.bfloat16):
        evaluator = make_evaluator(ModelRef("toy/bert", suite.model), data, [one], dtype)
        seen: list[torch.Tensor] = []
        layer = evaluator.backbone.get_submodule(last)
        layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        batch = next(iter(data["half"].test_dataloader()))
        with torch.inference_mode():
            evaluator.logits("half", batch)
            with Fusion([one], "lora_sum").on(evaluator.backbone, 1.0):
                evaluator.logits("half", batch)
        before, after = seen
        changes[dtype] = (after - before).double()
    full, half = changes[torch.float32], changes[torch.bfloat16]
    assert float(full.norm()) > 0
    assert float((half - full).norm() / full.norm()) < 0.02


@pytest.mark.parametrize("method", ["task_arithmetic", "orthogonal_mc_dropout_runtime"])
def test_logits_are_close_and_weights_stay(toy_suite: Path, trained: Path, method: str) -> None:
    suite = load_suite(str(toy_suite), "smoke")
    tokenizer = load_tokenizer(suite.model)
    data = {t: TaskData(suite.tasks[t], tokenizer, suite.train, suite.rows) for t in TASKS}
    adapters = [Adapter.load(trained / task, name=task) for task in TASKS]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        evaluator = make_evaluator(ModelRef("toy/bert", suite.model), data, adapters, dtype)
        assert {p.dtype for p in evaluator.backbone.parameters()} == {torch.float32}
        with Fusion(adapters, method, 0).on(evaluator.backbone, 1.0), torch.inference_mode():
            batch = next(iter(data["half"].test_dataloader()))
            found[dtype] = evaluator.logits("half", batch)
        assert found[dtype].dtype == torch.float32
    difference = (found[torch.float32] - found[torch.bfloat16]).abs()
    spread = found[torch.float32].std()
    assert 0 < float(difference.max()) < 0.1 * float(spread)


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "--merges", "task_arithmetic"],
        ["experiment", "orthogonal-dropout", "--parts", "text", "--draws", "1"],
    ],
)
def test_a_run_that_trains_in_bfloat16_scores_in_it(
    toy_suite: Path, tmp_path: Path, command: list[str]
) -> None:
    command = [*command, "--suite", str(toy_suite), "--runs-dir", str(tmp_path), "--name", "run"]
    assert main([*command, "--inits", "lora", "--trainer.precision", "bf16-mixed"]) == 0
    stages = list((tmp_path / "run").glob("scores/*/*/stage.json"))
    assert stages
    for stage in stages:
        assert '"torch.bfloat16"' in stage.read_text()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"precision": "32-true"}, torch.float32),
        ({"precision": 32}, torch.float32),
        ({"precision": "bf16-mixed"}, torch.bfloat16),
    ],
)
def test_the_trainers_precision_decides(options: dict[str, object], dtype: torch.dtype) -> None:
    assert scoring_dtype(TrainerOptions(options)) == dtype


def test_tuned_covariances_are_of_the_adapted_model_on_a_bfloat16_gpu_too(
    toy_suite: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that bfloat16 weights would swallow changes what the next module reads."""
    suite = load_suite(str(toy_suite), "smoke")
    data = TaskData(suite.tasks["half"], load_tokenizer(suite.model), suite.train, suite.rows)
    model = ModelRef("toy/bert", suite.model)
    adapter = Adapter.load(trained / "half", name="half")
    first = min(name for name in adapter.updates if name.endswith("value"))
    tiny = 1e-5 / float(adapter.updates[first].dense().abs().max())
    small = replace(adapter, updates={first: adapter.updates[first].scaled(tiny)})
    targets = [first.replace("self.value", "output.dense")]
    base = task_covariance(model, data, targets).matrix(targets[0])
    tuned = task_covariance(model, data, targets, tuned=small).matrix(targets[0])
    assert not torch.equal(base, tuned)
    monkeypatch.setattr("trainers.backbone._gpu_has_bfloat16", lambda: True)
    assert torch.equal(task_covariance(model, data, targets, tuned=small).matrix(targets[0]), tuned)
