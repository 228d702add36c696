"""What a training loop has to do so that A stays where it belongs, whatever loop it is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from merge_algorithms.errors import UserError, suggest
from osrm import (
    FilteredSteps,
    LeakPenalty,
    freeze_lora_a,
    initialize_lora_osrm_weights,
    project_lora_a,
)
from osrm.initialize import find_rows
from osrm.targets import base_model, is_sharded, lora_factors, lora_layers
from trainers.settings import Constraint

log = logging.getLogger(__name__)


class Confinement:
    """Starts LoRA's A in a subspace, keeps it there, filters B, and punishes leaks.

    An adapter that has been trained already goes on from where it is; with 'project' its first step
    leaves what of A is in the subspace.

    Args:
        state: Module name -> orthogonal rows (k, d_in), k at least the adapter's rank, from
            osrm.subspace_state; None leaves A as it is.
        constraint: 'init' (OSRM, arXiv 2505.22934) only starts A there; 'freeze' keeps A fixed;
            'project' lets A move inside the span of all k rows, by an exact orthogonal projection
            after every optimiser step; 'filter' lets it move through `filters` only. Default:
            'filter' with filters, else 'init'.
        adapter_name: PEFT's name of the adapter.
        leak_penalty: gamma of `osrm.LeakPenalty`; 0 for none.
        others: What the penalty reads: module name -> S (d_in, d_in), from osrm.others_moments.
        filters: In place of a state: module name -> F (d_in, d_in), from osrm.wiener_filters. The A
            that is there starts as A F.
        output_filters: Module name -> H (d_out, d_out), from osrm.output_filters, whatever the
            constraint of A: B moves through them only.

    Raises:
        UserError: An unknown constraint or one without what it needs, both a state and filters, or
            one of `leak_penalty` and `others` without the other.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor] | None = None,
        constraint: Constraint | None = None,
        adapter_name: str = "default",
        leak_penalty: float = 0.0,
        others: Mapping[str, Tensor] | None = None,
        filters: Mapping[str, Tensor] | None = None,
        output_filters: Mapping[str, Tensor] | None = None,
    ) -> None:
        constraint = constraint or ("init" if filters is None else "filter")
        if constraint not in (known := get_args(Constraint)):
            raise UserError(f"unknown constraint '{constraint}': {suggest(constraint, known)}")
        if state is not None and filters is not None:
            raise UserError("both a state and filters are given: leave one of them out")
        if constraint == "filter" and filters is None:
            raise UserError(
                "constraint 'filter' needs filters: pass what osrm.wiener_filters returns as"
                " `filters`"
            )
        if constraint == "project" and filters is not None:
            raise UserError("constraint 'project' needs a subspace; filters go with 'filter'")
        if state is None and filters is None and constraint != "init":
            raise UserError(
                f"constraint '{constraint}' needs a subspace: pass what osrm.subspace_state returns"
            )
        if leak_penalty and others is None:
            raise UserError(
                "the leak penalty needs the other tasks' second moments: pass what"
                " osrm.others_moments returns as `others`"
            )
        if others is not None and not leak_penalty:
            raise UserError(
                "`others` is what the leak penalty reads, but leak_penalty is 0: give its weight,"
                " such as 30 with filters, or leave `others` out"
            )
        self.state = state
        self.constraint = constraint
        self.adapter_name = adapter_name
        self.gamma = leak_penalty
        self.others = others or {}
        self.penalty: LeakPenalty | None = None
        self.filters = filters
        self.output_filters = output_filters or {}
        self.filtered: list[FilteredSteps] = []  # what holds while training
        self.started = False
        self._model = nn.Module()  # that of `start`, when it has been called
        self._placed: dict[str, Tensor] = {}

    def starts(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What A will be after `start`: module name -> (r, d_in), given what it is before."""
        if self.state is not None:
            return {name: find_rows(self.state, name, a)[: len(a)] for name, a in rows.items()}
        if self.filters is not None:
            return {
                name: a @ find_rows(self.filters, name, a, "filter") for name, a in rows.items()
            }
        return dict(rows)

    def start(self, module: nn.Module, initialise: bool = True) -> None:
        """Call it once the adapter is there, before the optimiser is made.

        Args:
            module: Holds the adapter: a PeftModel, injected LoRA layers, or a module around either.
                Names count from the model that PEFT has put the adapter into, or from `module`
                where those of the state, the filters or the others do.
            initialise: Whether A starts anew if the adapter is a fresh one; not so when training
                resumes from a checkpoint.

        Raises:
            UserError: nothing is changed; the adapter is not there, does not train, or trains in
                two models, FSDP has sharded it, or what it is to be confined to does not fit.
        """
        if is_sharded(module):
            raise sharded()
        model = self._model = self._training_model(module)
        initialise = initialise and self._is_fresh(model)
        self.started = True
        self._placed = {}
        self.filtered = []
        if self.output_filters:
            steps = FilteredSteps(model, self.output_filters, self.adapter_name, "outputs")
            self.filtered.append(steps)
        if self.state is not None and initialise:
            initialize_lora_osrm_weights(model, self.state, self.adapter_name)
        if self.filters is not None:
            steps = FilteredSteps(model, self.filters, self.adapter_name)
            if initialise:
                steps.start()
            if self.constraint == "filter":
                self.filtered.append(steps)
        if self.constraint == "freeze":
            self.freeze(model)
        if self.gamma:
            self.penalty = LeakPenalty(model, self.others, self.gamma, self.adapter_name)

    def freeze(self, module: nn.Module) -> None:
        """Keep A as it is."""
        freeze_lora_a(self._training_model(module), self.adapter_name)

    def before_step(self, optimizer: Optimizer | None = None, scale: float = 1.0) -> None:
        """Call it when all gradients are there, before the step of the optimiser.

        It adds the penalty's gradient, whole, however many batches the loss's is of: be they fewer
        than usual, as at the end of an epoch.

        Args:
            optimizer: Whose step it is, if there are several: what it does not hold is left alone.
            scale: What the gradients are multiplied by, if a scaler has not undone it yet.
        """
        if self.constraint == "freeze":  # PEFT makes A trainable again behind disable_adapter
            freeze_lora_a(self._model, self.adapter_name)
        if self.penalty is not None:
            self.penalty.add_gradient(optimizer, scale)
        for steps in self.filtered:
            steps.before_step(optimizer)

    def after_step(self) -> None:
        """Undo what the optimiser step moved out of the subspace, or not through the filter."""
        for steps in self.filtered:
            steps.after_step()
        if self.constraint == "project" and self.state is not None:
            if not self._placed:  # on the model's device from the first step on
                for name, (a, _) in lora_factors(self._model, self.adapter_name).items():
                    self._placed[name] = find_rows(self.state, name, a.weight).to(a.weight.device)
            project_lora_a(self._model, self._placed, self.adapter_name)

    def _training_model(self, module: nn.Module) -> nn.Module:
        """The model in a module that trains the adapter.

        It is the module itself if what A is to be confined to has the names that layers have there.
        A teacher beside a student, say, carries an adapter of the same name that does not train.

        Raises:
            UserError: the adapter trains nowhere, or in several models.
        """
        adapter = self.adapter_name
        names = {*(self.state or self.filters or {}), *self.others, *self.output_filters}
        models = {module}
        if names.isdisjoint(lora_layers(module)):
            models = _carriers(module, adapter) or models
        found = [model for model in models if _trains(model, adapter)]
        if not found:
            lora_factors(module, adapter)  # has more to say if there is no such adapter
            layers = lora_layers(module).values()
            active = sorted({name for layer in layers for name in layer.active_adapters})
            raise UserError(
                f"the adapter '{adapter}' does not train, its B is frozen, and active is"
                f" {', '.join(active)}: name the one to confine as adapter_name, or unfreeze it"
            )
        if len(found) > 1:
            raise UserError(
                f"{len(found)} models in {type(module).__name__} train an adapter '{adapter}':"
                " freeze all but one, or give them adapters of different names, and each a"
                " callback with its adapter_name"
            )
        return found[0]

    def _is_fresh(self, model: nn.Module) -> bool:
        """Whether B is zero: to start a trained adapter anew would throw its training away."""
        if self.state is None and self.filters is None:
            return True
        factors = lora_factors(model, self.adapter_name).values()
        fresh = not any(bool(b.weight.any()) for _, b in factors)
        if not (fresh or self.started):
            then = (
                "its first step drops what of A is outside the subspace; put it there with osrm"
                " convert first"
                if self.constraint == "project"
                else "it goes on from where it is; make a new one to start in the subspace"
            )
            log.warning(
                "the adapter '%s' has been trained already (its B is not zero): %s",
                self.adapter_name,
                then,
            )
        return fresh


def sharded() -> UserError:
    """Filters and penalty are products with a whole A or B, which under FSDP no rank has."""
    return UserError(
        "FSDP leaves each rank a part of A and B, which nothing can confine alone: train with DDP,"
        " or on one device"
    )


def _carriers(module: nn.Module, adapter_name: str) -> set[nn.Module]:
    """The models in a module that PEFT has put the adapter into: it leaves its settings there."""
    models = set()
    for part in module.modules():
        settings = getattr(part, "peft_config", None)
        if isinstance(settings, dict) and adapter_name in settings:
            models.add(base_model(part))  # PEFT's wrappers have them too
    return models


def _trains(model: nn.Module, adapter_name: str) -> bool:
    """Whether a B of the adapter gets gradients; A may be frozen on purpose."""
    layers = lora_layers(model).values()
    return any(
        adapter_name in layer.lora_B and layer.lora_B[adapter_name].weight.requires_grad
        for layer in layers
    )
