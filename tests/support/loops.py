"""Somebody else's small net, its training, and what one step of it is by definition."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader


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


def fit(module: L.LightningModule, *callbacks: L.Callback) -> None:
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


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    return x, x.sum(dim=1, keepdim=True)


def moment() -> Tensor:
    h = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    return h.T @ h / 50


B = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))
FILTER = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
OUTPUT_FILTER = torch.randn(8, 8, generator=torch.Generator().manual_seed(5)) / 3


def expected_step(net: Any, gamma: float, rate: float, filtered: bool) -> dict[str, Tensor]:
    """A and B after one step of gradient descent on the loss plus the penalty's definition.

    With filters the step is one on M and N, where A = M F and B = H N, and M starts as the A that
    is there.
    """
    x, y = inputs()
    net = copy.deepcopy(net)
    layer = net.base_model.model.first
    s, w0 = moment(), layer.base_layer.weight
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    b.data.copy_(B)
    if filtered:
        a.data = a.data @ FILTER
    dw = layer.scaling["default"] * b @ a
    leaked = (dw @ s @ dw.T).trace() / (w0 @ s @ w0.T).trace()
    loss = (net(x) - y).square().mean() + gamma * leaked
    gradients = torch.autograd.grad(loss, [a, b])
    if filtered:
        h = OUTPUT_FILTER
        gradients = gradients[0] @ FILTER.T @ FILTER, h @ h.T @ gradients[1]
    moved = [p.detach() - rate * g for p, g in zip((a, b), gradients, strict=True)]
    return dict(zip("ab", moved, strict=True))


def lora_net() -> Any:
    torch.manual_seed(0)
    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))


def set_b(net: Any) -> None:
    """B as it may be in the middle of a training: A gets a gradient."""
    net.base_model.model.first.lora_B.default.weight.data.copy_(B)


def holding(filtered: bool) -> dict[str, Any]:
    """Arguments of a callback: the penalty, and perhaps the filters."""
    filters = {"filters": {"first": FILTER}, "output_filters": {"first": OUTPUT_FILTER}}
    penalty = {"leak_penalty": 3.0, "others": {"first": moment()}}
    return penalty | (filters if filtered else {})
