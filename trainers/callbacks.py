"""Callbacks: the subspace for A and the leak penalty, and progress that a caller can show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from merge_algorithms.errors import UserError
from trainers.confinement import Confinement, sharded


class OrthogonalSubspace(Confinement, L.Callback):
    """`Confinement` for Lightning: arguments as there.

    Works on any LightningModule that holds PEFT LoRA layers by the time `setup` is called; see
    osrm.subspace_state for how to compute the subspaces.
    """

    _hooks: tuple[RemovableHandle, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Initialise before the optimiser is built, so that frozen matrices never enter it."""
        if stage == "fit":
            acts = self.gamma or self.output_filters or self.constraint in ("filter", "project")
            if acts and isinstance(trainer.strategy, DeepSpeedStrategy):
                raise _deepspeed()
            if acts and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
                raise sharded()
            self.start(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Project or filter each step right behind it: weight averaging, say, reads A next."""
        self.on_train_end(trainer, pl_module)
        self._hooks = tuple(
            optimizer.register_step_post_hook(lambda *_: self.after_step())
            for optimizer in trainer.optimizers
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the optimisers alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient, and filter it all, if wanted; then Lightning clips."""
        scale = 1.0
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: undoes it in the step
            scaler = getattr(trainer.precision_plugin, "scaler", None)  # of float16
            scale = scaler.get_scale() if scaler is not None else 1.0
        self.before_step(optimizer, scale)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Forget a step that was announced and then skipped, as float16's scaler does."""
        for steps in self.filtered:
            steps.after_step()


class OrthogonalSubspaceTrainerCallback(Confinement, TrainerCallback):
    """`Confinement` for transformers' Trainer: arguments as there.

    The penalty's gradient is added, and everything filtered, after the Trainer has clipped the
    loss's gradient; Lightning clips what is added and filtered.
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Freeze A before DDP notes which parameters it waits for, if that is the constraint."""
        if self.constraint == "freeze" and kwargs["model"] is not None:
            with suppress(UserError):  # an adapter that comes later is frozen when training begins
                self.freeze(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Initialise, unless training resumes. A frozen A gets no gradient, so it never moves."""
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise _deepspeed()
        self.start(kwargs["model"], initialise=state.global_step == 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient, and filter it all, if wanted."""
        self.before_step()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Project or filter the step, if that is the constraint."""
        self.after_step()


def _deepspeed() -> UserError:
    """DeepSpeed's engine steps in its backward pass, from copies of its own of the weights."""
    return UserError(
        "DeepSpeed takes its steps where no callback can confine them: train with DDP, or on one"
        " device"
    )


class StepProgress(L.Callback):
    """Calls `report(steps done, steps in all)` after every training batch."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Report the global step."""
        self.report(trainer.global_step, int(trainer.estimated_stepping_batches))
