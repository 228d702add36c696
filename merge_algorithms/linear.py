"""Methods that are linear in the updates: exact as a LoRA of rank sum r_t."""

from __future__ import annotations

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.factors import stack
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors


@register(
    summary="weighted sum of the updates",
    paper="Ilharco et al. 2023, arXiv 2212.04089",
    low_rank=True,
)
def task_arithmetic(tasks: TaskVectors) -> dict[str, LowRank]:
    """sum_t w_t dW_t (arXiv 2212.04089, section 2).

    With w = 1 this is the naive LoRA summation of arXiv 2508.11985. The paper's scaling
    coefficient is `Merged.scaled`.
    """
    return {module: stack(updates, tasks.weights) for module, updates in tasks.modules.items()}


@register(
    summary="weighted mean of the updates",
    paper="Wortsman et al. 2022, arXiv 2203.05482",
    low_rank=True,
)
def average(tasks: TaskVectors) -> dict[str, LowRank]:
    """sum_t w_t dW_t / sum_t w_t (arXiv 2203.05482, algorithm 1); without weights, 1/T each.

    Raises:
        UserError: The weights sum to zero.
    """
    total = sum(tasks.weights)
    if total == 0:
        raise UserError("the weights of an average sum to 0: give weights with another sum")
    weights = [w / total for w in tasks.weights]
    return {module: stack(updates, weights) for module, updates in tasks.modules.items()}
