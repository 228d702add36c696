"""What B may write freely: directions that the other tasks' losses do not read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm.gradients import Gradients
from osrm.others import check_weights
from osrm.side_by_side import side_by_side


def output_filters(
    gradients: Mapping[str, Gradients],
    task: str,
    *,
    weights: Mapping[str, float] | None = None,
    mu: float = 0.15,
) -> dict[str, Tensor]:
    """H = c (I + mu sum_u w_u G_u / g_u)^-1 for every module, g_u the mean diagonal entry of G_u.

    What B writes in the directions that the other tasks u read passes weakly, all else as it is:
    without the factor H is the matrix that minimises ||H - I||^2 + mu sum_u w_u tr(H G_u H) / g_u.
    Division by g_u makes tasks with losses of different size count alike. c keeps ||H||^2 = d_out,
    so that B learns as fast. Ours; `wiener_filters` is the same for what A reads, and together
    they keep the others' loss still, tr(dW^T G_u dW C_u), from both sides.

    Args:
        gradients: Task name -> its gradients, of at least one other task; those of `task` itself
            are not read.
        task: The task that is going to be trained.
        weights: Other task -> w_u; those not named weigh 1.
        mu: Strictness, above 0.

    Returns:
        Module name -> H, (d_out, d_out) float32, symmetric.

    Raises:
        UserError: no other task, other modules or widths, a weight of no other task or that is
            negative or not finite, no weight above 0, or a mu that is no positive number.
    """
    if not (mu > 0 and math.isfinite(mu)):
        raise UserError(f"the output filter's mu is {mu}: give a number above 0, such as 0.15")
    others = sorted(set(gradients) - {task})
    if not others:
        raise UserError(f"there are no gradients of other tasks than '{task}': collect them")
    weights = weights or {}
    check_weights(weights, others)
    if not any(weights.get(other, 1.0) for other in others):
        raise UserError("the weights of all other tasks are 0: give at least one above 0")
    first = gradients[others[0]].moments
    for other in others[1:]:
        if not _same_shapes(first, gradients[other].moments):
            raise UserError(
                f"the gradients of '{others[0]}' and '{other}' are of different modules or widths:"
                " collect both at the same modules of one model"
            )

    def solve(module: str) -> Tensor:
        read = torch.eye(len(first[module]), dtype=torch.float64)
        for other in others:
            moment = gradients[other].moments[module].double()
            if level := float(moment.diagonal().mean()):  # else the task does not read it
                read.add_(moment, alpha=mu * weights.get(other, 1.0) / level)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(read))
        return (inverse * (len(read) ** 0.5 / inverse.norm())).float()

    return side_by_side(solve, {module: len(moment) for module, moment in first.items()})


def _same_shapes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return {m: t.shape for m, t in one.items()} == {m: t.shape for m, t in other.items()}
