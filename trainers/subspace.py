"""What the subspace settings ask for: rows for A, filters, a penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from merge_algorithms.errors import UserError, suggest
from osrm import (
    Covariance,
    Gradients,
    others_moments,
    output_filters,
    subspace_state,
    wiener_filters,
)
from osrm.wiener import check_filter
from trainers.callbacks import OrthogonalSubspace
from trainers.settings import SubspaceSettings
from trainers.tasks import Task


def check_constraint(settings: SubspaceSettings) -> None:
    """UserError for a constraint, budget, damping or penalty that cannot be."""
    wiener, kept = settings.init == "wiener", settings.kept
    if (kept == "filter" and not wiener) or (kept == "project" and wiener):
        raise UserError(
            f"init '{settings.init}' cannot go with constraint '{kept}': 'filter' is for init"
            " 'wiener', which has no subspace to project on; choose another of the two"
        )
    if wiener or settings.init == "contrastive":
        check_filter(settings.mu, settings.rho)
    if kept == "project" and settings.energy is not None and not 0 < settings.energy < 1:
        raise UserError(f"the energy budget is {settings.energy}: give a share between 0 and 1")
    if not (settings.nu >= 0 and math.isfinite(settings.nu)):
        raise UserError(f"output_mu is {settings.output_mu}: give at least 0, such as 0.15")
    if not (settings.gamma >= 0 and math.isfinite(settings.gamma)):
        raise UserError(f"the leak penalty's gamma is {settings.gamma}: give at least 0")


def check_tasks(settings: SubspaceSettings, tasks: Mapping[str, Task]) -> None:
    """UserError for settings that cannot be those of a job of these tasks."""
    for task in tasks.values():
        check_kind(settings, task)
    for name, weight in settings.weights.items():
        if name not in tasks:
            raise UserError(
                f"there is a weight for '{name}', which is no task; {suggest(name, tasks)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of task '{name}' is {weight}: give a number of at least 0")
    for name in tasks:
        if not any(settings.weights.get(other, 1) for other in tasks if other != name):
            raise UserError(
                f"the weights of all tasks other than '{name}' are 0: give at least one above 0"
            )


def check_kind(settings: SubspaceSettings, task: Task) -> None:
    """UserError for settings that a task of this kind cannot have."""
    if settings.needs_gradients and task.kind == "causal_lm":
        raise UserError(
            f"task '{task.name}' is a causal_lm, and the filter on what B writes is for tasks with"
            " heads: leave out its gradients and output_mu"
        )


def task_subspace(
    covariances: Mapping[str, Covariance],
    task: str,
    rank: int,
    settings: SubspaceSettings,
    progress: bool = False,
) -> dict[str, Tensor] | None:
    """Rows for A of every module (k, d_in) as the settings say; None if it starts as PEFT's.

    Raises:
        UserError: as `osrm.subspace_state`, such as for a task without others.
    """
    if settings.init == "lora" or settings.init == "wiener":
        return None
    projected = settings.kept == "project"
    energy = settings.energy if projected else None
    return subspace_state(
        covariances,
        task,
        rank,
        settings.init,
        k=settings.k if projected and energy is None else None,
        energy=energy,
        scale=settings.scale,
        weights=other_weights(settings, task),
        rho=settings.rho,
        progress=progress,
    )


def other_weights(settings: SubspaceSettings, task: str) -> dict[str, float]:
    """The weights c_u of the tasks other than `task`; one setting serves all tasks of a job."""
    return {name: weight for name, weight in settings.weights.items() if name != task}


def make_confinement(
    task: str,
    state: Mapping[str, Tensor] | None,
    settings: SubspaceSettings,
    covariances: Mapping[str, Covariance],
    gradients: Mapping[str, Gradients],
) -> OrthogonalSubspace:
    """The callback that holds A and B where the settings want; arguments as of `train_task`."""
    weights = other_weights(settings, task)
    others = others_moments(covariances, task, weights) if settings.gamma else None
    filters = None
    if settings.init == "wiener":
        filters = wiener_filters(
            covariances, task, weights=weights, mu=settings.mu, rho=settings.rho
        )
    written = None
    if settings.needs_gradients:
        known = {name: weight for name, weight in weights.items() if name in gradients}
        written = output_filters(gradients, task, weights=known, mu=settings.nu)
    return OrthogonalSubspace(
        state,
        "init" if settings.init == "lora" else settings.kept,
        leak_penalty=settings.gamma,
        others=others,
        filters=filters,
        output_filters=written,
    )
