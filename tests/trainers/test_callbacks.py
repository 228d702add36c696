"""OrthogonalSubspace on somebody else's LightningModule."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from merge_algorithms import UserError
from osrm import lora_a
from trainers.callbacks import OrthogonalSubspace, StepProgress


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Foreign(L.LightningModule):
    """Knows nothing of osrm."""

    def __init__(self, wrap: bool) -> None:
        super().__init__()
        config = LoraConfig(r=2, target_modules=["first"])
        if wrap:
            self.net: Any = get_peft_model(Net(), config)
        else:
            self.net = inject_adapter_in_model(config, Net())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        self.trained = len(trainable)
        return torch.optim.AdamW(trainable, lr=0.1)


def _fit(module: L.LightningModule, *callbacks: L.Callback) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    rows = list(zip(x, x.sum(dim=1, keepdim=True), strict=True))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(rows, batch_size=8))  # type: ignore[arg-type]


@pytest.mark.parametrize("constraint", ["init", "freeze", "project"])
@pytest.mark.parametrize("wrap", [True, False], ids=["PeftModel", "injected layers"])
def test_any_module_with_lora_layers(constraint: Any, wrap: bool) -> None:
    module = Foreign(wrap)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    name = "first" if wrap else "net.first"
    _fit(module, OrthogonalSubspace({name: basis}, constraint))
    (a,) = lora_a(module.net).values()
    outside = float((a - a @ basis.T @ basis).norm())
    if constraint == "freeze":
        assert torch.equal(a, basis[:2])
        assert module.trained == 1, "a frozen A must not reach the optimiser"
    else:
        assert not torch.allclose(a, basis[:2], atol=1e-2)
        assert (outside < 1e-5) == (constraint == "project")


def test_a_state_of_another_model_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="first"):
        _fit(Foreign(wrap=True), OrthogonalSubspace({"frist": torch.eye(8)[:2]}))


def test_progress_counts_every_step() -> None:
    seen: list[tuple[int, int]] = []
    _fit(Foreign(wrap=True), StepProgress(lambda done, total: seen.append((done, total))))
    assert seen == [(step, 8) for step in range(1, 9)]
