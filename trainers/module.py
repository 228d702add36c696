"""One task's training as a LightningModule: frozen backbone + LoRA adapter + head."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from trainers.backbone import token_states
from trainers.heads import TaskHead
from trainers.metrics import make_metrics
from trainers.settings import TrainSettings
from trainers.tasks import Task


class TaskModule(L.LightningModule):
    """Trains an adapter and a head, each at its own learning rate, with AdamW.

    Args:
        backbone: A PeftModel around any AutoModel; only its adapter requires gradients.
        head: The task's head; its number of outputs is that of the task.
        task: Gives the loss (cross-entropy, or squared error in standard deviations) and metrics.
        train: Learning rates, schedule, weight decay.
    """

    def __init__(
        self, backbone: nn.Module, head: TaskHead, task: Task, train: TrainSettings
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.task = task
        self.train_settings = train
        self.metrics = make_metrics(task, head.out.out_features)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of token ids and masks to logits (batch, outputs)."""
        return self.head(token_states(self.backbone, batch), batch["attention_mask"])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, or mean squared error in units of the targets' variance."""
        if self.task.kind == "regression":
            error = (logits.squeeze(-1) - labels) / self.head.target_std
            return error.square().mean()
        return nn.functional.cross_entropy(logits, labels)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        loss = self.loss(self(batch), batch["labels"])
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Collect predictions for the task's metrics."""
        self.metrics.update(self(batch), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics under val/."""
        self.log_dict({f"val/{name}": value for name, value in self.metrics.compute().items()})
        self.metrics.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over two groups and a per-step schedule with a linear warm-up."""
        steps = int(self.trainer.estimated_stepping_batches)
        return adamw(self.backbone, self.head.parameters(), self.train_settings, steps)


def adamw(
    backbone: nn.Module, heads: Iterable[nn.Parameter], settings: TrainSettings, steps: int
) -> OptimizerLRSchedulerConfig:
    """AdamW over an adapter and heads, each at its own learning rate, for so many steps.

    Args:
        backbone: What of it requires gradients is the adapter.
        heads: Parameters of the heads, if there are any.
        settings: Learning rates, schedule, warm-up, weight decay.
        steps: How many there will be.
    """
    adapter = [p for p in backbone.parameters() if p.requires_grad]
    groups = [{"params": adapter, "lr": settings.learning_rate}]
    if heads := list(heads):
        groups.append({"params": heads, "lr": settings.head_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    scheduler: LRScheduler = get_scheduler(
        schedule, optimizer, round(settings.warmup * steps), steps
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }
