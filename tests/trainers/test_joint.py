"""One adapter for all tasks: which batches it sees, and what is on disk afterwards."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from benchmarks.evaluate import evaluate_fusion, make_evaluator
from benchmarks.fusion import Fusion
from benchmarks.suites import Suite
from merge_algorithms import Adapter, UserError
from trainers.backbone import ModelRef, load_tokenizer
from trainers.data import TaskData
from trainers.joint import JointLoader, train_joint
from trainers.settings import RowSettings
from trainers.tasks import Task


@pytest.fixture(scope="module")
def data(suite: Suite) -> dict[str, TaskData]:
    tokenizer = load_tokenizer(suite.model)
    rows = {"half": 320, "size": 64, "same": 16}
    return {
        name: TaskData(task, tokenizer, suite.train, RowSettings(rows[name], 16, 40, 32))
        for name, task in suite.tasks.items()
    }


def train(suite: Suite, data: dict[str, TaskData], output: Path, seed: int = 0) -> list[int]:
    output.mkdir()
    steps: list[int] = []
    train_joint(
        ModelRef("toy/bert", suite.model),
        data,
        output,
        adapter=suite.adapter,
        head=suite.head,
        train=suite.train,
        seed=seed,
        report=lambda done, total: steps.extend((done, total)),
    )
    return steps


def test_an_epoch_is_every_batch_of_every_task_once(data: dict[str, TaskData]) -> None:
    torch.manual_seed(3)
    loader = JointLoader(data, 5)
    assert len(loader) == 20 + 4 + 1
    first, second = list(loader), list(loader)
    for epoch in (first, second):
        assert Counter(task for task, _ in epoch) == {"half": 20, "size": 4, "same": 1}
        for task, rows in data.items():
            found = [float(x) for name, batch in epoch if name == task for x in batch["labels"]]
            assert sorted(found) == pytest.approx(sorted(row.label for row in rows.rows("train")))
    assert [task for task, _ in first] != [task for task, _ in second]
    assert [task for task, _ in first] != sorted(task for task, _ in first)


def test_the_adapter_is_laid_out_like_a_bundle_and_has_learned(
    suite: Suite, data: dict[str, TaskData], tmp_path: Path
) -> None:
    suite = replace(suite, train=replace(suite.train, epochs=4))
    steps = train(suite, data, tmp_path / "joint")
    assert steps[-2:] == [100, 100]
    adapter = Adapter.load(tmp_path / "joint", name="joint")
    assert set(adapter.heads) == {"half", "size", "same"}
    info = json.loads((tmp_path / "joint" / "osrm.json").read_text())
    assert info["tasks"]["half"]["labels"] == ["high", "low"]
    assert info["tasks"]["size"]["head"]["outputs"] == 1
    card = (tmp_path / "joint" / "README.md").read_text(encoding="utf-8")
    assert "size" in card
    assert str(suite.model) not in card
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(suite.model), tmp_path / "joint")
    assert stock.peft_config["default"].r == suite.adapter.rank
    evaluator = make_evaluator(ModelRef("toy/bert", suite.model), data, [adapter])
    fusion = Fusion([adapter], "task_arithmetic")
    trained = evaluate_fusion(evaluator, fusion, 1.0, "test")
    without = evaluate_fusion(evaluator, fusion, 0.0, "test")
    assert trained["half"]["accuracy"] > max(without["half"]["accuracy"] + 0.1, 0.8)
    assert trained["size"]["pearson+spearman"] > without["size"]["pearson+spearman"]


@pytest.mark.parametrize("changes", [{"batch_size": 7}, {"max_length": 9}])
def test_rows_are_made_with_the_same_settings_which_are_recorded(
    suite: Suite, data: dict[str, TaskData], tmp_path: Path, changes: dict[str, int]
) -> None:
    other = replace(suite, train=replace(suite.train, **changes))
    train(other, data, tmp_path / "joint")
    info = json.loads((tmp_path / "joint" / "osrm.json").read_text())
    assert info["train"] == asdict(suite.train)
    assert {task["max_length"] for task in info["tasks"].values()} == {suite.train.max_length}
    half = data["half"]
    mixed = data | {"half": TaskData(half.task, half.tokenizer, other.train, half.row_settings)}
    with pytest.raises(UserError, match=r"'half' and 'size' .*: give both the same"):
        train(suite, mixed, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_seed_decides_everything(
    suite: Suite, data: dict[str, TaskData], tmp_path: Path
) -> None:
    tensors = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(suite, data, tmp_path / name, seed)
        tensors.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert tensors[0] == tensors[1] != tensors[2]


def test_a_task_without_a_head_is_refused(
    suite: Suite, data: dict[str, TaskData], tmp_path: Path
) -> None:
    task = Task("prose", ("text",), data["half"].task.data, label=None, kind="causal_lm")
    prose = TaskData(task, load_tokenizer(suite.model), suite.train, suite.rows)
    with pytest.raises(UserError, match="'prose' is a causal_lm"):
        train(suite, data | {"prose": prose}, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
