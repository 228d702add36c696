"""Every setting of an adapter and of its training has the effect that its description promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.suites import Suite
from trainers.backbone import ModelRef, load_backbone, load_tokenizer
from trainers.data import TaskData
from trainers.settings import AdapterSettings, SubspaceSettings
from trainers.training import make_adapter, train_task


@pytest.fixture
def train(suite: Suite, tmp_path: Path) -> Callable[..., None]:
    """Train the task `half`, four steps an epoch, with changes to its settings."""

    def run(adapter: AdapterSettings | None = None, **changes: Any) -> None:
        settings = replace(suite.train, **changes)
        train_task(
            ModelRef("toy/bert", suite.model),
            TaskData(suite.tasks["half"], load_tokenizer(suite.model), settings, suite.rows),
            tmp_path,
            adapter=adapter or suite.adapter,
            head=suite.head,
            train=settings,
            subspace=SubspaceSettings("lora"),
        )

    return run


# What is left of the peak learning rate after this share of the steps behind the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "constant": lambda share: 1.0,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_warm_up_and_then_follow_the_schedule(
    schedule: str, train: Callable[..., None]
) -> None:
    seen: list[list[dict[str, Any]]] = []

    def watch(optimizer: Optimizer, *_: object) -> None:
        seen.append([dict(group) for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(watch)
    try:
        train(
            epochs=3,
            learning_rate=2e-3,
            head_learning_rate=7e-3,
            weight_decay=0.03,
            warmup=0.3,  # of 12 steps: 3.6, so 4
            schedule=schedule,
        )
    finally:
        handle.remove()
    shares = [step / 4 if step < 4 else SCHEDULES[schedule]((step - 4) / 8) for step in range(12)]
    for group, peak, tensors in ((0, 2e-3, 8), (1, 7e-3, 2)):
        steps = [groups[group] for groups in seen]
        assert [step["lr"] for step in steps] == pytest.approx([peak * share for share in shares])
        assert {step["weight_decay"] for step in steps} == {0.03}
        # A and B of query and value in two layers; the head's weight and bias.
        assert {len(step["params"]) for step in steps} == {tensors}


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_an_adapter_has_the_scale_and_dropout_of_its_settings(
    rslora: bool, scaling: float, suite: Suite
) -> None:
    settings = AdapterSettings(4, alpha=6, dropout=0.25, targets=["query"], rslora=rslora)
    model = make_adapter(ModelRef("toy/bert", suite.model), settings)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2
    for layer in layers:
        assert layer.r["default"] == 4
        assert layer.scaling["default"] == pytest.approx(scaling)
        dropout = layer.lora_dropout["default"]
        assert isinstance(dropout, nn.Dropout)
        assert dropout.p == 0.25


@pytest.mark.parametrize("wanted", [False, True])
def test_the_backbone_drops_out_if_wanted_and_the_adapter_always(
    wanted: bool, suite: Suite, train: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, adapter = set(), set()

    def load(*arguments: object) -> nn.Module:
        backbone = load_backbone(*arguments)  # type: ignore[arg-type]

        def watch(embeddings: nn.Module, inputs: object) -> None:
            if torch.is_grad_enabled():  # not in validation
                for name, module in backbone.named_modules():
                    if "lora_dropout" in name:
                        adapter.add(module.training)
                    elif "lora_" not in name:
                        frozen.add(module.training)

        backbone.get_submodule("embeddings").register_forward_pre_hook(watch)
        return backbone

    monkeypatch.setattr("trainers.training.load_backbone", load)
    train(replace(suite.adapter, dropout=0.1), epochs=1, backbone_dropout=wanted)
    assert frozen == {wanted}
    assert adapter == {True}
