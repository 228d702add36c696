"""Training one adapter: what is on disk afterwards, and what decides it."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig

from benchmarks.suites import Suite
from merge_algorithms import Adapter, UserError, merge
from osrm import subspace_state, wiener_filters
from trainers.backbone import (
    ModelRef,
    load_backbone,
    load_skeleton,
    load_tokenizer,
    token_states,
)
from trainers.data import TaskData
from trainers.jobs import task_covariance
from trainers.joint import train_joint
from trainers.settings import (
    AdapterSettings,
    RowSettings,
    SubspaceSettings,
    TrainerOptions,
    effective,
)
from trainers.training import check_targets, make_adapter, task_seed, train_task


@pytest.fixture
def train(suite: Suite, data: dict[str, TaskData], tmp_path: Path) -> Callable[..., Path]:
    def run(task: str = "half", name: str = "out", **changes: object) -> Path:
        output = tmp_path / name
        output.mkdir()
        settings: dict[str, object] = {
            "adapter": suite.adapter,
            "head": suite.head,
            "train": suite.train,
            "subspace": SubspaceSettings("lora"),
        }
        model = ModelRef("toy/bert", suite.model)
        train_task(model, data[task], output, **(settings | changes))  # type: ignore[arg-type]
        return output

    return run


def test_the_adapter_is_a_stock_peft_directory(
    train: Callable[..., Path], suite: Suite, data: dict[str, TaskData]
) -> None:
    output = train()
    info = json.loads((output / "osrm.json").read_text())
    assert info["task"] == "half"
    assert info["model"] == "toy/bert"
    assert info["tasks"]["half"]["labels"] == ["high", "low"]
    assert set(info["validation"]) == {"accuracy", "f1"}
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(suite.model), output).eval()
    backbone = load_backbone(suite.model, torch.float32)  # on a GPU bfloat16 is the default
    batch = next(iter(data["half"].test_dataloader()))
    with torch.no_grad():
        base = token_states(backbone, batch)
        with merge([Adapter.load(output)]).apply_to(backbone):
            ours = token_states(backbone, batch)
        theirs = stock(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 1e-4, "the adapter has not learned anything"


def test_what_is_recorded_is_what_the_rows_were_made_with(
    train: Callable[..., Path], suite: Suite
) -> None:
    output = train(train=replace(suite.train, batch_size=7, max_length=5, epochs=2))
    info = json.loads((output / "osrm.json").read_text())
    assert info["train"] == asdict(replace(suite.train, epochs=2))
    assert info["tasks"]["half"]["max_length"] == suite.train.max_length


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    train: Callable[..., Path],
) -> None:
    weights = [
        (train(name=name, seed=seed) / "adapter_model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_no_step_follows_more_of_a_gradient_than_its_largest_norm(
    suite: Suite, train: Callable[..., Path]
) -> None:
    """AdamW steps as far by any gradient, unless it is far below the epsilon it divides by."""

    def moved(name: str, most: float) -> float:
        settings = replace(suite.train, max_grad_norm=most)
        weights = load_file(train(name=name, train=settings) / "adapter_model.safetensors")
        return max(float(tensor.abs().max()) for key, tensor in weights.items() if "lora_B" in key)

    assert moved("never", 0.0) > 1e-3
    assert moved("at_once", 1e-14) < 1e-7


def test_a_training_that_diverges_says_so(
    suite: Suite, data: dict[str, TaskData], train: Callable[..., Path], tmp_path: Path
) -> None:
    settings = replace(suite.train, learning_rate=1e30)
    with pytest.raises(UserError, match=r"'half' diverged.*--train.learning_rate"):
        train(train=settings)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    (tmp_path / "joint").mkdir()
    with pytest.raises(UserError, match="'joint' diverged"):
        train_joint(
            ModelRef("toy/bert", suite.model),
            data,
            tmp_path / "joint",
            adapter=suite.adapter,
            head=suite.head,
            train=settings,
        )


def test_no_model_outlives_its_training(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[nn.Module]] = []

    def load(*arguments: object, **options: object) -> nn.Module:
        backbone = load_backbone(*arguments, **options)  # type: ignore[arg-type]
        loaded.append(weakref.ref(backbone))
        return backbone

    monkeypatch.setattr("trainers.training.load_backbone", load)
    train()
    gc.collect()
    assert [model() for model in loaded] == [None]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("32-true", "float32"), ("64-true", "float32"), (None, "bfloat16")],
)
def test_float32_that_is_asked_for_holds_for_frozen_weights_too(
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    precision: str | None,
    expected: str,
) -> None:
    """On a GPU with bfloat16, where the frozen weights are in that by default."""
    seen: list[torch.dtype] = []

    def load(*arguments: object) -> nn.Module:
        backbone = load_backbone(*arguments)  # type: ignore[arg-type]
        seen.append(next(backbone.parameters()).dtype)
        return backbone.float()

    monkeypatch.setattr("trainers.backbone._gpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("trainers.training.load_backbone", load)
    train(trainer_options=TrainerOptions({"precision": precision} if precision else {}))
    assert seen == [getattr(torch, expected)]


def test_tasks_have_seeds_of_their_own() -> None:
    seeds = {task_seed(seed, task) for seed in range(3) for task in ("half", "size", "same")}
    assert len(seeds) == 9


@pytest.mark.parametrize(("task", "least"), [("half", 0.8), ("size", 0.7)])
def test_training_learns(task: str, least: float, suite: Suite, tmp_path: Path) -> None:
    train = replace(suite.train, epochs=12, learning_rate=1e-2)
    data = TaskData(suite.tasks[task], load_tokenizer(suite.model), train, RowSettings())
    scores = train_task(
        ModelRef("toy/bert", suite.model),
        data,
        tmp_path,
        adapter=suite.adapter,
        head=suite.head,
        train=train,
        subspace=SubspaceSettings("lora"),
    )
    assert scores[data.task.headline] > least
    assert "train/loss_epoch" in (tmp_path / "logs" / "metrics.csv").read_text()


@pytest.mark.parametrize("constraint", ["init", "freeze", "project"])
def test_what_a_may_do_while_training(
    constraint: str, train: Callable[..., Path], suite: Suite, data: dict[str, TaskData]
) -> None:
    model = ModelRef("toy/bert", suite.model)
    targets = suite.adapter.targets
    covariances = {name: task_covariance(model, rows, targets) for name, rows in data.items()}
    k = 12
    state = subspace_state(covariances, "half", k)
    output = train(
        subspace=SubspaceSettings("osrm", constraint, k),  # type: ignore[arg-type]
        state=state,
        covariances=covariances,
        adapter=AdapterSettings(rank=4, alpha=4, targets=targets),
    )
    tensors = load_file(output / "adapter_model.safetensors")
    moved, left = [], []
    for module, rows in state.items():
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        basis = rows.double()
        moved.append(float((a - basis[:4]).norm() / a.norm()))
        left.append(float((a - a @ basis.T @ basis).norm() / a.norm()))
    if constraint == "freeze":
        assert max(moved) == 0
    else:
        assert min(moved) > 1e-3
    assert (max(left) < 1e-5) == (constraint != "init")
    info = json.loads((output / "osrm.json").read_text())
    assert info["subspace"] == effective(SubspaceSettings("osrm", constraint, k))  # type: ignore[arg-type]
    assert set(info["covariances"]) == set(data)
    found = info["diagnostics"]
    assert found["leaked_before"] > 0
    angles = []
    for module, rows in state.items():
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        q, p = (torch.linalg.qr(x.double().T).Q for x in (rows[:4], a))
        angles.append(torch.linalg.svdvals(q.T @ p).clamp(max=1).arccos())
    # The arccosine near 1 is worth half the digits.
    assert found["drift_mean"] == pytest.approx(float(torch.cat(angles).mean()), abs=1e-4)
    assert found["drift_max"] == pytest.approx(float(torch.cat(angles).max()), abs=1e-4)
    assert (found["drift_max"] < 1e-6) == (constraint == "freeze")
    card = (output / "README.md").read_text()
    assert "More Information Needed" not in card, "PEFT's empty form"
    assert "library_name: peft" in card


def test_a_filter_holds_a_and_is_recorded(
    train: Callable[..., Path], suite: Suite, data: dict[str, TaskData]
) -> None:
    model = ModelRef("toy/bert", suite.model)
    targets = suite.adapter.targets
    # Few rows span few directions: what no input of the task uses is filtered away.
    few = replace(suite.rows, covariance=1)
    own = TaskData(data["half"].task, data["half"].tokenizer, suite.train, few)
    covariances = {name: task_covariance(model, rows, targets) for name, rows in data.items()}
    covariances["half"] = task_covariance(model, own, targets)
    output = train(
        subspace=SubspaceSettings("wiener"),
        covariances=covariances,
        adapter=AdapterSettings(rank=4, alpha=4, targets=targets),
    )
    tensors = load_file(output / "adapter_model.safetensors")
    filters = wiener_filters(covariances, "half")
    for module, matrix in filters.items():
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        _, values, v = torch.linalg.svd(matrix.double())
        rows = v[values > 1e-5 * values[0]]
        assert len(rows) < len(matrix) - 4
        assert float((a - a @ rows.T @ rows).norm() / a.norm()) < 1e-4
    info = json.loads((output / "osrm.json").read_text())
    assert (info["subspace"]["constraint"], info["subspace"]["leak_penalty"]) == ("filter", 30.0)
    assert 0 < info["diagnostics"]["drift_mean"] < 1.6


def test_plain_lora_without_covariances_records_its_drift(train: Callable[..., Path]) -> None:
    info = json.loads((train() / "osrm.json").read_text())
    assert set(info["diagnostics"]) == {"drift_mean", "drift_max"}
    assert 0 < info["diagnostics"]["drift_mean"] <= info["diagnostics"]["drift_max"] < 1.58


def test_rank_above_the_width_is_refused(suite: Suite) -> None:
    with pytest.raises(UserError, match=r"rank 33 is larger than 32.*output"):
        make_adapter(ModelRef("toy/bert", suite.model), AdapterSettings(rank=33))


def test_a_missing_or_damaged_model_is_one_sentence(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone("/nowhere/at/all")
    damaged = shutil.copytree(suite.model, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged' cannot be loaded"):
        load_backbone(str(damaged))


def test_a_dropout_that_is_no_probability_is_refused(suite: Suite) -> None:
    skeleton = load_skeleton(suite.model)
    for dropout in (-0.1, 1.0, 1.5):
        with pytest.raises(UserError, match=f"adapter.dropout is {dropout}: use a probability"):
            check_targets(skeleton, replace(suite.adapter, dropout=dropout))


def test_k_is_of_the_features_that_a_module_reads(suite: Suite) -> None:
    skeleton = load_skeleton(suite.model)
    narrow = replace(suite.adapter, targets=["output.dense"], rank=8)  # 32 by 32, 32 by 64
    project = SubspaceSettings("osrm", "project", k=33)
    with pytest.raises(UserError, match="k 33 is not between the rank 8 and 32, the features"):
        check_targets(skeleton, narrow, project)
    check_targets(skeleton, replace(narrow, targets=["layer.0.output.dense"]), project)
    check_targets(skeleton, narrow, replace(project, energy=0.1))


def test_a_hub_model_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(commit: str | None, written_by: str, width: int = 32) -> str:
        config = BertConfig(hidden_size=width)
        config._commit_hash, config.transformers_version = commit, written_by
        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: config)
        return ModelRef("org/bert", "org/bert").fingerprint

    for commit in ("c0ffee", None):
        assert of(commit, "5.23.0") == of(commit, "5.24.0")
        assert of(commit, "5.23.0") != of("decaf", "5.23.0")
    assert of(None, "5.23.0") != of(None, "5.23.0", width=64)


def test_validation_can_be_left_out(train: Callable[..., Path]) -> None:
    output = train(trainer_options=TrainerOptions({"limit_val_batches": 0}))
    assert json.loads((output / "osrm.json").read_text())["validation"] == {}
