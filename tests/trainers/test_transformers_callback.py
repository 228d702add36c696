"""OrthogonalSubspaceTrainerCallback in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Net, expected_step, holding, inputs, lora_net, set_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from osrm import lora_a
from trainers.callbacks import OrthogonalSubspaceTrainerCallback


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = inputs()
        return {"x": x[index], "y": y[index]}


class _Loss(nn.Module):
    """What transformers' Trainer trains: a forward that returns the loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - y).square().mean()}


def _trainer(
    net: nn.Module, tmp_path: Path, *callbacks: TrainerCallback, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        **settings,
    )
    return Trainer(_Loss(net), arguments, train_dataset=_Rows(), callbacks=list(callbacks))


@pytest.mark.parametrize("filtered", [False, True])
def test_penalty_and_filter_in_transformers_trainer(filtered: bool, tmp_path: Path) -> None:
    class Later(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            set_b(net)

    net = lora_net()
    expected = expected_step(net, gamma=3.0, rate=0.05, filtered=filtered)
    callback = OrthogonalSubspaceTrainerCallback(None, **holding(filtered))
    settings = {"max_steps": 1, "learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0}
    _trainer(net, tmp_path, callback, Later(), **settings).train()
    layer = net.base_model.model.first
    torch.testing.assert_close(layer.lora_A.default.weight.detach(), expected["a"])
    torch.testing.assert_close(layer.lora_B.default.weight.detach(), expected["b"])


@pytest.mark.parametrize("constraint", ["init", "freeze", "project"])
def test_the_subspace_in_transformers_trainer(constraint: Any, tmp_path: Path) -> None:
    net = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))[0].T.float()
    callback = OrthogonalSubspaceTrainerCallback({"first": basis}, constraint)
    trainer = _trainer(net, tmp_path, callback, max_steps=5, learning_rate=0.1)
    moves = [p.requires_grad for name, p in net.named_parameters() if "lora_A" in name]
    assert moves == [constraint != "freeze"], "DDP notes it before training begins"
    trainer.train()
    (a,) = lora_a(net).values()
    outside = float((a - a @ basis.T @ basis).norm())
    if constraint == "freeze":
        assert torch.equal(a, basis[:2])
    else:
        assert not torch.allclose(a, basis[:2], atol=1e-2)
        assert (outside < 1e-5) == (constraint == "project")


def test_a_trained_adapter_goes_on_in_transformers_trainer(tmp_path: Path) -> None:
    net = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"]))
    callback = OrthogonalSubspaceTrainerCallback({"first": torch.eye(8)[:2]}, "freeze")
    b = net.base_model.model.first.lora_B.default.weight
    _trainer(net, tmp_path, callback, max_steps=3, learning_rate=0.1).train()
    trained = b.detach().clone()
    _trainer(net, tmp_path, callback, max_steps=3, learning_rate=0.0).train()
    assert trained.any()
    assert torch.equal(b, trained)
