"""Methods that are linear in the updates: exact as a LoRA of rank sum r_t.

A and B are never averaged apart, which is what PEFT's `linear` does: its result has the products
B_i A_j of different adapters in it.
"""

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

    The paper's scaling coefficient is `Merged.scaled`.
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
    return linear(tasks)


@register(
    summary="weighted mean or sum of the updates, as mergekit's linear",
    paper="Wortsman et al. 2022, arXiv 2203.05482; MergeKit, Goddard et al. 2024, arXiv 2403.13257",
    low_rank=True,
)
def linear(tasks: TaskVectors, *, normalize: bool = True) -> dict[str, LowRank]:
    """sum_t w_t dW_t, divided by sum_t w_t if `normalize`: `average`, else `task_arithmetic`.

    mergekit's definition on full weights, whose base model cancels if they are normalised. It
    would scale the base model by sum w_t if they are not; here the base stays as it is.

    Args:
        normalize: Divide by the sum of the weights.

    Raises:
        UserError: The weights sum to zero and are to be normalised.
    """
    if not normalize:
        return task_arithmetic(tasks)
    total = sum(tasks.weights)
    if abs(total) <= 1e-9 * sum(map(abs, tasks.weights)):
        raise UserError("the weights of an average sum to 0: give weights with another sum")
    weights = [w / total for w in tasks.weights]
    return {module: stack(updates, weights) for module, updates in tasks.modules.items()}


@register(
    summary="plain sum of the updates, each with weight 1",
    paper="Naive LoRA summation 2025, arXiv 2508.11985",
    low_rank=True,
)
def lora_sum(tasks: TaskVectors) -> dict[str, LowRank]:
    """sum_t dW_t (arXiv 2508.11985): task arithmetic with all weights and the scale at 1.

    Raises:
        UserError: A weight other than 1; that is `task_arithmetic`.
    """
    check_unweighted(tasks, "lora_sum", "use task_arithmetic for a weighted sum")
    return task_arithmetic(tasks)


def check_unweighted(tasks: TaskVectors, method: str, remedy: str) -> None:
    """Raise UserError if an adapter has a weight other than 1."""
    for name, weight in zip(tasks.names, tasks.weights, strict=True):
        if weight != 1:
            raise UserError(
                f"{method} knows no weights but adapter '{name}' has {weight:g}: {remedy}"
            )
