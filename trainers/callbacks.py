"""Lightning callbacks: the subspace for A, and progress that a caller can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from peft import PeftModel
from torch import Tensor, nn

from osrm import freeze_lora_a, initialize_lora_osrm_weights, project_lora_a
from trainers.settings import Constraint


class OrthogonalSubspace(L.Callback):
    """Starts LoRA's A in a subspace and keeps it there as the constraint says.

    Works on any LightningModule that holds PEFT LoRA layers by the time `setup` is called; see
    osrm.subspace_state for how to compute the subspaces.

    Args:
        state: Module name -> orthonormal rows (k, d_in), k at least the adapter's rank.
        constraint: 'init' (OSRM, arXiv 2505.22934) only starts A there; 'freeze' keeps A fixed;
            'project' lets A move inside the span of all k rows, by an exact orthogonal projection
            after every optimiser step.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        constraint: Constraint = "init",
        adapter_name: str = "default",
    ) -> None:
        self.state = dict(state)
        self.constraint = constraint
        self.adapter_name = adapter_name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Initialise before the optimiser is built, so that frozen matrices never enter it."""
        if stage != "fit":
            return
        model = _peft_model(pl_module)
        initialize_lora_osrm_weights(model, self.state, self.adapter_name)
        if self.constraint == "freeze":
            freeze_lora_a(model, self.adapter_name)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Undo what the optimiser step moved out of the subspace."""
        if self.constraint == "project":
            project_lora_a(_peft_model(pl_module), self.state, self.adapter_name)


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


def _peft_model(module: nn.Module) -> nn.Module:
    """The PeftModel inside a LightningModule, or the module itself if layers were injected."""
    return next((child for child in module.modules() if isinstance(child, PeftModel)), module)
