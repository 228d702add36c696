"""What a training loop has to do so that A stays where it belongs, whatever loop it is."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from osrm import LeakPenalty, freeze_lora_a, initialize_lora_osrm_weights, project_lora_a
from trainers.settings import Constraint


class Confinement:
    """Starts LoRA's A in a subspace, keeps it there, and punishes leaks.

    Args:
        state: Module name -> orthogonal rows (k, d_in), k at least the adapter's rank, from
            osrm.subspace_state; None leaves A as it is.
        constraint: 'init' (OSRM, arXiv 2505.22934) only starts A there; 'freeze' keeps A fixed;
            'project' lets A move inside the span of all k rows, by an exact orthogonal projection
            after every optimiser step.
        adapter_name: PEFT's name of the adapter.
        leak_penalty: gamma of `osrm.LeakPenalty`; 0 for none.
        others: What the penalty reads: module name -> S (d_in, d_in), from osrm.others_moments.

    Raises:
        UserError: A constraint without a state, or a penalty without `others`.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor] | None,
        constraint: Constraint = "init",
        adapter_name: str = "default",
        leak_penalty: float = 0.0,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        if state is None and constraint != "init":
            raise UserError(
                f"constraint '{constraint}' needs a subspace: pass what osrm.subspace_state returns"
            )
        if leak_penalty and others is None:
            raise UserError(
                "the leak penalty needs the other tasks' second moments: pass what"
                " osrm.others_moments returns as `others`"
            )
        self.state = state
        self.constraint = constraint
        self.adapter_name = adapter_name
        self.gamma = leak_penalty
        self.others = others or {}
        self.penalty: LeakPenalty | None = None

    def start(self, module: nn.Module, initialise: bool = True) -> None:
        """Call it once the adapter is there, before the optimiser is made.

        Args:
            module: Holds the adapter: a PeftModel, a module around one, or injected LoRA layers.
            initialise: Whether A starts anew; not so when training resumes from a checkpoint.
        """
        model = _peft_model(module)
        if self.state is not None and initialise:
            initialize_lora_osrm_weights(model, self.state, self.adapter_name)
        if self.constraint == "freeze":
            freeze_lora_a(model, self.adapter_name)
        if self.gamma:
            self.penalty = LeakPenalty(model, self.others, self.gamma, self.adapter_name)

    def after_step(self, module: nn.Module) -> None:
        """Undo what the optimiser step moved out of the subspace."""
        if self.constraint == "project" and self.state is not None:
            project_lora_a(_peft_model(module), self.state, self.adapter_name)


def _peft_model(module: nn.Module) -> nn.Module:
    """The PeftModel inside a module, or the module itself if layers were injected."""
    return next((child for child in module.modules() if isinstance(child, PeftModel)), module)
