"""One adapter for all tasks, trained on their rows together: what merging is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import Tensor, nn

from merge_algorithms import UserError
from merge_algorithms.heads import write_heads
from trainers.backbone import ModelRef, frozen_dtype
from trainers.callbacks import StepProgress
from trainers.data import TaskData
from trainers.module import TaskModule, adamw
from trainers.settings import AdapterSettings, HeadSettings, TrainerOptions, TrainSettings
from trainers.store import versions
from trainers.training import (
    check_finite,
    describe,
    make_adapter,
    make_head,
    make_trainer,
    run_trainer,
    set_modes,
    task_seed,
    write_record,
)

JOINT = "joint"
Batch = tuple[str, dict[str, Tensor]]
"""A task's name, and a batch of its rows."""


class JointModule(L.LightningModule):
    """Trains one adapter under the heads of several tasks, a batch of one task at a time.

    Args:
        backbone: A PeftModel around any AutoModel; only its adapter requires gradients.
        parts: Task -> its module, around the same backbone: gives loss and head.
        train: Learning rates, schedule, weight decay.
    """

    def __init__(
        self, backbone: nn.Module, parts: Mapping[str, TaskModule], train: TrainSettings
    ) -> None:
        super().__init__()
        self.backbone = backbone
        # A task may be called "half": names of a ModuleDict must not be those of nn.Module.
        self.modules_of_tasks = nn.ModuleList(parts.values())
        self.parts = dict(parts)
        self.train_settings = train

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of one batch of one task."""
        task, rows = batch
        part = self.parts[task]
        loss = part.loss(part(rows), rows["labels"])
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(rows["labels"]))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the adapter and all heads, as for one task."""
        heads = [p for part in self.parts.values() for p in part.head.parameters()]
        steps = int(self.trainer.estimated_stepping_batches)
        return adamw(self.backbone, heads, self.train_settings, steps)


class JointLoader:
    """The training batches of all tasks in random order, each exactly once an epoch.

    So tasks come up in proportion to their rows, and an epoch has as many steps as theirs together.

    Args:
        data: The tasks' rows.
        seed: Decides the order of the tasks; torch's global seed that of their rows.
    """

    def __init__(self, data: Mapping[str, TaskData], seed: int) -> None:
        self.loaders = {task: rows.train_dataloader() for task, rows in data.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        batches = {task: iter(loader) for task, loader in self.loaders.items()}
        turns = [task for task, loader in self.loaders.items() for _ in range(len(loader))]
        for index in torch.randperm(len(turns), generator=self.generator).tolist():
            yield turns[index], next(batches[turns[index]])


def joint_settings(data: Mapping[str, TaskData], train: TrainSettings) -> TrainSettings:
    """`train` with the tasks' own batch size and maximal length.

    Raises:
        UserError: They are not the same for all tasks.
    """
    first, *others = data
    settings = data[first].settings_of(train)
    for name in others:
        if data[name].settings_of(train) != settings:
            raise UserError(
                f"tasks '{first}' and '{name}' are trained together, but the batch size or the"
                " maximal length of their rows differs: give both the same"
            )
    return settings


def train_joint(
    model: ModelRef,
    data: Mapping[str, TaskData],
    output: Path,
    *,
    adapter: AdapterSettings,
    head: HeadSettings,
    train: TrainSettings,
    seed: int = 0,
    trainer_options: TrainerOptions = TrainerOptions(),  # noqa: B008  # frozen
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Fine-tune one adapter on all tasks; write it with every head, osrm.json and the log.

    What is written is laid out like a merged bundle: a PEFT directory with heads/<task>.

    Args:
        model: The base model.
        data: Task -> rows.
        output: An existing directory to write into.
        adapter: LoRA's rank, scale and targets.
        head: Pooling and shape of every head.
        train: Epochs over all rows, learning rates; batch size and maximal length are those of
            `data`.
        seed: Decides initialisation, order of tasks and rows, and dropout.
        trainer_options: Further keyword arguments for Lightning's Trainer.
        report: Called with (steps done, steps in all).

    Raises:
        UserError: A task of kind causal_lm, whose adapter is for another model class; tasks whose
            batch size or maximal length differ.
    """
    train = joint_settings(data, train)
    for name, rows in data.items():
        if rows.task.kind == "causal_lm":
            raise UserError(
                f"task '{name}' is a causal_lm, which has no head: joint training is for tasks"
                " with heads, leave it out with --tasks"
            )
    own_seed = task_seed(seed, JOINT)
    L.seed_everything(own_seed, verbose=False)
    options = trainer_options.make()
    dtype = frozen_dtype(options.get("precision"))
    peft_model: PeftModel = make_adapter(model, adapter, dtype=dtype)
    set_modes(peft_model, train.backbone_dropout)
    parts = {
        name: TaskModule(peft_model, make_head(peft_model, rows, head), rows.task, train)
        for name, rows in data.items()
    }
    module = JointModule(peft_model, parts, train)
    callbacks: list[L.Callback] = [StepProgress(report)] if report is not None else []
    trainer = make_trainer(output, train, callbacks, options)
    loader = JointLoader(data, own_seed)
    run_trainer(trainer, lambda: trainer.fit(module, train_dataloaders=loader))
    check_finite(module, JOINT)

    peft_model.save_pretrained(str(output), save_embedding_layers=False)
    write_heads(output, {name: dict(part.head.state_dict()) for name, part in parts.items()})
    info: dict[str, Any] = {
        "format": 1,
        "tasks": {
            name: {
                **describe(rows),
                "head": asdict(head) | {"outputs": parts[name].head.out.out_features},
            }
            for name, rows in data.items()
        },
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "train": asdict(train),
        "seed": seed,
        "versions": versions(),
    }
    write_record(output, info, JOINT)
