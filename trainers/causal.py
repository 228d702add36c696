"""Language modelling: next-token losses row by row, and the training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from merge_algorithms import UserError
from osrm.passes import evaluation_mode
from trainers.metrics import LanguageMetrics
from trainers.module import adamw
from trainers.settings import TrainSettings
from trainers.tasks import Task
from trainers.texts import IGNORED


@dataclass(frozen=True)
class RowLosses:
    """What the model thinks of each row, (n,) each.

    Attributes:
        nll: Sum over the row's counted tokens of -log p(token | what is before it), in nats,
            float64.
        tokens: How many tokens count, int64.
        correct: How many of them were the most probable ones, int64.
    """

    nll: Tensor
    tokens: Tensor
    correct: Tensor

    @staticmethod
    def cat(parts: Sequence[RowLosses]) -> RowLosses:
        """The rows of all, one after the other."""
        columns = ("nll", "tokens", "correct")
        return RowLosses(*(torch.cat([getattr(p, name) for p in parts]) for name in columns))


def next_token_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A batch of token ids, and what else the model reads, to logits (batch, length, vocabulary).

    Without a cache of keys and values, which nobody reads and with which transformers does not
    look for packed rows.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


@torch.inference_mode()
def row_losses(model: nn.Module, batch: Mapping[str, Tensor], samples: int = 1) -> RowLosses:
    """The losses of a batch's rows, on the CPU.

    Args:
        model: A causal language model.
        batch: input_ids, attention_mask, labels, (n, length) each.
        samples: Forward passes whose probabilities are averaged; more than 1 only makes sense
            where each draws masks of its own.
    """
    targets = batch["labels"][:, 1:]
    counts = targets != IGNORED
    mixed: list[Tensor] = []
    for drawn in range(samples):
        logits = next_token_logits(model, batch)[:, :-1]
        # Row by row: the probabilities of all rows would take as much memory again as the logits.
        for i, (row, keep) in enumerate(zip(logits, counts, strict=True)):
            found = row[keep].float().log_softmax(-1)
            if drawn:
                mixed[i] = torch.logaddexp(mixed[i], found)
            elif samples > 1:
                mixed.append(found)
            else:
                mixed.append(_compared(found, targets[i][keep]))
    if samples > 1:
        mean = math.log(samples)
        mixed = [_compared(m - mean, t[k]) for m, t, k in zip(mixed, targets, counts, strict=True)]
    nll, correct = torch.stack(mixed).unbind(1)
    return RowLosses(nll, counts.sum(1).cpu(), correct.long())


def _compared(logs: Tensor, targets: Tensor) -> Tensor:
    """(sum of -log p of the targets, how many of them are the most probable), float64 on the CPU.

    Args:
        logs: (tokens, vocabulary) log-probabilities.
        targets: (tokens,).
    """
    nll = -logs.gather(-1, targets[:, None]).double().sum()
    return torch.stack([nll, (logs.argmax(-1) == targets).double().sum()]).cpu()


class OwnHead(nn.Module):
    """In place of a task head: the language model predicts with its own, and nothing is trained."""


class CausalModule(L.LightningModule):
    """Trains the adapter of a causal language model with AdamW.

    Args:
        backbone: A PeftModel around an AutoModelForCausalLM; only its adapter requires gradients.
        task: Names the metrics.
        train: Learning rate, schedule, weight decay.

    Raises:
        UserError: Packed rows that the model cannot keep apart.
    """

    def __init__(self, backbone: nn.Module, task: Task, train: TrainSettings) -> None:
        super().__init__()
        if task.packing:
            check_packing(backbone)
        self.backbone = backbone
        self.head = OwnHead()
        self.task = task
        self.train_settings = train
        self.metrics = LanguageMetrics(task.metrics)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch of token ids to logits (batch, length, vocabulary)."""
        return next_token_logits(self.backbone, batch)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Mean over the batch's counted tokens of the negative log-likelihood."""
        targets = batch["labels"][:, 1:]
        counts = targets != IGNORED
        logits = self(batch)[:, :-1]
        # A batch whose answers were all cut off teaches nothing, and is no division by zero.
        loss = nn.functional.cross_entropy(logits[counts].float(), targets[counts], reduction="sum")
        loss = loss / counts.sum().clamp(min=1)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Collect losses for the task's metrics."""
        losses = row_losses(self.backbone, batch)
        self.metrics.update(losses.nll, losses.tokens, losses.correct)

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics under val/."""
        self.log_dict({f"val/{name}": value for name, value in self.metrics.scores().items()})
        self.metrics.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and a per-step schedule with a linear warm-up."""
        steps = int(self.trainer.estimated_stepping_batches)
        return adamw(self.backbone, (), self.train_settings, steps)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """UserError unless a packed row's logits are the same whatever row is before it."""
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    with evaluation_mode(model):
        first, second = (
            next_token_logits(
                model,
                {
                    "input_ids": torch.tensor([[*before, 1, 2, 3]], device=device),
                    "position_ids": positions,
                },
            )[:, 3:]
            for before in ((1, 2, 3), (3, 1, 1))
        )
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{type(model).__name__} lets packed rows see each other: set the task's packing to"
            " false"
        )
