"""The command that measures the leak penalty's cost, at its smallest size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.performance import penalty


def test_a_step_with_and_without_the_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    penalty.compare(models=["tiny"], rounds=3, batches=1, rank=2)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "tiny" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[:2] == ["tiny", "4"]
    plain, with_penalty, ratio = (float(cell) for cell in cells[2:5])
    assert min(plain, with_penalty) > 0
    low, high = (float(cell) for cell in cells[5].split(" .. "))
    assert low <= ratio <= high


def test_both_steps_train_the_same_adapter() -> None:
    model, data = penalty.make("tiny", 1, "quick")
    plain, with_penalty, modules = penalty.steps_of(model, data, penalty.targets_of("tiny"), 2)
    assert modules == 4
    factors = [p for p in model.parameters() if p.requires_grad]
    assert len(factors) == 8
    plain(data[0])  # B is zero at first, so A has no gradient
    for step in (plain, with_penalty):
        before = [p.detach().clone() for p in factors]
        step(data[0])
        assert not any(torch.equal(p, old) for p, old in zip(factors, before, strict=True))
