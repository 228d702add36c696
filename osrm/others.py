"""The other tasks as one: the weighted mean of their second moments."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from merge_algorithms.errors import UserError, suggest
from osrm.covariance import Covariance, others_of


def others_moments(
    covariances: Mapping[str, Covariance],
    task: str,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """S = sum c_u C_u over the tasks u other than `task`, for every module.

    Args:
        covariances: Task name -> its covariance; `task` among them and at least one other.
        task: The task that is left out.
        weights: Other task -> c_u before normalisation to sum 1; those not named weigh 1,
            a pool as many as the tasks in it.

    Returns:
        Module name -> (d, d) float32; modules with the same input share one tensor.

    Raises:
        UserError: as `shares`.
    """
    of = shares(covariances, task, weights)
    own = covariances[task]
    moments = {key: mean_moment(covariances, of, key).float() for key in own.matrices}
    return {module: moments[key] for module, key in own.modules.items()}


def shares(
    covariances: Mapping[str, Covariance],
    task: str,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Other task -> its share c_u in S, the shares sum to 1; sorted by name.

    Raises:
        UserError: no such task, no other task, covariances that do not fit together, a weight
            that is negative, not finite or of no other task, or no weight above 0.
    """
    others = others_of(covariances, task)
    check_weights(weights or {}, others)
    values = {name: weight_of(covariances, name, weights) for name in others}
    total = sum(values.values())
    if total == 0:
        raise UserError("the weights of all other tasks are 0: give at least one above 0")
    return {name: value / total for name, value in values.items()}


def check_weights(weights: Mapping[str, float], others: Collection[str]) -> None:
    """UserError for a weight that is negative, not finite or of no other task."""
    for name, weight in weights.items():
        if name not in others:
            raise UserError(
                f"there is a weight for '{name}', which is no other task; {suggest(name, others)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of task '{name}' is {weight}: give a number of at least 0")


def weight_of(
    covariances: Mapping[str, Covariance], name: str, weights: Mapping[str, float] | None
) -> float:
    """What a task weighs among the others, before normalisation."""
    return float((weights or {}).get(name, covariances[name].pooled))


def mean_moment(covariances: Mapping[str, Covariance], of: Mapping[str, float], key: str) -> Tensor:
    """sum c_u C_u for one key, (d, d) float64; the memory of one matrix besides what is there."""
    (first, share), *rest = of.items()
    total = covariances[first].matrices[key].to(torch.float64, copy=True).mul_(share)
    for name, share in rest:
        total.add_(covariances[name].matrices[key], alpha=share)
    return total


def leave_one_out(
    covariances: Mapping[str, Covariance], task: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (key, S, C_t) for every key, both (d, d) float64, the other tasks weighing the same.

    Raises:
        UserError: as `shares`.
    """
    of = shares(covariances, task)
    for key, own in covariances[task].matrices.items():
        yield key, mean_moment(covariances, of, key), own.double()


def damping_level(moment: Tensor) -> float:
    """What damping is a share of: the mean energy of a feature, at most ten times the others' mean.

    The others are all features but the hundredth with the most energy. A decoder's few enormous
    activations (Sun et al. 2024, arXiv 2402.17762) can raise a module's mean to thousands of times
    that, and damping by the mean would leave only these few to be read. In MiniLM, which has none,
    the mean is below five times that, and so the level is the mean. It never falls below a ten
    thousandth of the mean, so that next to nothing in most features does not switch damping off.

    Args:
        moment: (d, d), a second moment.
    """
    energies = moment.diagonal().double().sort().values
    mean, few = float(energies.mean()), -(-len(energies) // 100)
    others = float(energies[:-few].mean()) if len(energies) > few else mean
    return min(mean, max(10 * others, 1e-4 * mean))
