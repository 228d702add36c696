"""Methods that read statistics of every adapter's data: RegMean and Fisher merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.factors import stack
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.tiles import Tiled, row_tiles


@register(
    summary="least squares: on each task's inputs, close to what its own adapter does",
    paper="Jin et al. 2023, arXiv 2212.09849",
    low_rank=True,
    needs="covariance",
)
def regmean(
    tasks: TaskVectors, *, off_diagonal: float = 0.9, ridge: float = 1e-6
) -> dict[str, LowRank]:
    """argmin_dW sum_t w_t E_t ||(dW - dW_t) h||^2 (arXiv 2212.09849, section 3 and algorithm 1).

    With C_t the second moment of task t's inputs the solution is
    dW = (sum_t w_t dW_t C~_t) (sum_t w_t C~_t)^-1, a LoRA of rank sum r_t again: A_t becomes
    (sum_u w_u C~_u)^-1 C~_t A_t^T w_t, B_t stays. C~_t is C_t with its off-diagonal entries times
    `off_diagonal` (the paper's alpha, section 3), plus `ridge` times its mean diagonal entry. Both
    sides use the same C~_t, so one adapter alone comes out as it went in; the paper solves for
    full weights, from which the base model cancels for that reason only. C_t is a mean over
    tokens, so a task's number of tokens gives it no more weight; w_t does. The paper takes the
    inputs of each fine-tuned model; the base model's are an approximation to them.

    Solved in float64; modules that share their covariances, such as query, key and value of one
    block, share one Cholesky factor. Covariances are read one at a time: memory beyond the inputs
    is a few (d_in, d_in) float64 matrices, whatever the number of adapters.

    Args:
        off_diagonal: What the off-diagonal entries of the covariances are multiplied by, in
            [0, 1]. Less than 1 keeps covariances of fewer tokens than features well conditioned.
        ridge: Added to every covariance's diagonal, as a share of its mean. 0 is the paper.

    Raises:
        UserError: An option out of range, a negative weight, a covariance that
            is not finite, or covariances whose sum is singular.
    """
    if not 0 <= off_diagonal <= 1:
        raise UserError(f"regmean: off_diagonal={off_diagonal} is outside [0, 1]: 0.9 is usual")
    if ridge < 0:
        raise UserError(f"regmean: ridge={ridge} is negative: give 0 or a small number")
    _check_weights(tasks, "regmean")
    # Module groups with the very same T covariances, which stay referenced: ids must not recur.
    groups: dict[tuple[int, ...], tuple[list[Tensor], list[str]]] = {}
    for module in tasks.modules:
        covariances = [statistics[module] for statistics in tasks.statistics]
        key = tuple(map(id, covariances))
        groups.setdefault(key, (covariances, []))[1].append(module)
    merged: dict[str, LowRank] = {}
    for covariances, group in groups.values():
        merged |= _least_squares(tasks, group, covariances, off_diagonal, ridge)
    return merged


def _least_squares(
    tasks: TaskVectors,
    group: Sequence[str],
    covariances: Sequence[Tensor],
    off_diagonal: float,
    ridge: float,
) -> dict[str, LowRank]:
    """RegMean of modules that share their covariances."""
    updates = [tasks.modules[module] for module in group]
    like = updates[0][0].a
    total = like.new_zeros(like.shape[1], like.shape[1], dtype=torch.float64)
    terms: list[list[LowRank]] = [[] for _ in group]  # w_t dW_t C~_t of every module
    rows = sum(update.rank for module in updates for update in module)
    batch = max(1, len(covariances) * len(total) // max(1, rows))
    for first in range(0, len(covariances), batch):
        chosen = range(first, min(first + batch, len(covariances)))
        stacks = [torch.cat([module[t].a for module in updates]).double() for t in chosen]
        products = _products(
            tasks, group[0], chosen, covariances, stacks, total, off_diagonal, ridge
        )
        for t, product in zip(chosen, products, strict=True):
            parts = product.split([module[t].rank for module in updates])
            for found, module, part in zip(terms, updates, parts, strict=True):
                found.append(LowRank(module[t].b.double(), part))
                if sum(term.rank for term in found) > 2 * len(total):
                    found[:] = [_sum(found)]  # of rank d, whatever T is
    factor, failed = torch.linalg.cholesky_ex(total)
    # What is left of a feature's energy once the features before it explain what they can. Below
    # the covariances' own rounding it is noise, whether or not the factorisation came through.
    left = (factor.diagonal().square() / total.diagonal()).min()
    if failed or not left > torch.finfo(covariances[0].dtype).eps:
        raise UserError(
            f"regmean: the sum of the covariances is singular at {group[0]}: raise ridge"
            f" ({ridge:g}), lower off_diagonal ({off_diagonal:g}), or collect from more rows"
        )
    sums = [_sum(found) for found in terms]
    # Two triangular solves take half the time of torch.cholesky_solve.
    solved = torch.linalg.solve_triangular(factor, torch.cat([x.a for x in sums]).T, upper=False)
    solved = torch.linalg.solve_triangular(factor.T, solved, upper=True).T
    factors = solved.split([x.rank for x in sums])
    return {
        module: LowRank(product.b, a).to(like.device, like.dtype)
        for module, product, a in zip(group, sums, factors, strict=True)
    }


def _products(
    tasks: TaskVectors,
    module: str,
    chosen: Sequence[int],
    covariances: Sequence[Tensor],
    stacks: Sequence[Tensor],
    total: Tensor,
    off_diagonal: float,
    ridge: float,
) -> list[Tensor]:
    """w_t A_t C~_t of some tasks; adds their w_t C~_t to `total`, on and left of the diagonal.

    Tile by tile over all of them, so that a tile of the sum stays in the processor's cache.
    """
    added, products = [], []
    for t, a in zip(chosen, stacks, strict=True):
        diagonal = tasks.weights[t] * covariances[t].diagonal().to(a)
        added.append((1 - off_diagonal) * diagonal + ridge * diagonal.mean())
        products.append(a * added[-1])
    for start, stop in row_tiles((len(total), len(total)), copies=4):
        for t, a, product in zip(chosen, stacks, products, strict=True):
            rows = covariances[t][start:stop].to(a)
            if not rows.sum().isfinite():
                raise UserError(
                    f"the covariance of '{tasks.names[t]}' is not finite at {module}: collect it"
                    " again"
                )
            weight = tasks.weights[t] * off_diagonal
            total[start:stop, :stop].add_(rows[:, :stop], alpha=weight)
            product[:, start:stop].addmm_(a, rows.T, alpha=weight)
    total.diagonal().add_(torch.stack(added).sum(0))
    return products


def _sum(terms: Sequence[LowRank]) -> LowRank:
    return stack(terms, [1.0] * len(terms))


@register(
    summary="mean of the updates, weighted entry by entry by their Fisher information",
    paper="Matena and Raffel 2022, arXiv 2111.09832",
    needs="fisher",
)
def fisher(tasks: TaskVectors, *, floor: float = 1e-6, normalize: bool = False) -> dict[str, Tiled]:
    """sum_t w_t F_t dW_t / sum_t w_t F_t, entry by entry (arXiv 2111.09832, section 3).

    F_t is the diagonal Fisher information of the weight that dW_t changes, as
    `osrm.collect_fisher` collects it: gradients per example, then squared. The paper's formula on
    full weights is the same, since the base model cancels.

    Args:
        floor: Least Fisher information of an entry, as a share of the mean over all entries of
            that adapter, in (0, 1]. It decides where no task has any. (The authors' code: 1e-6
            absolute, by default in the first model only.)
        normalize: Divide each F_t by its Frobenius norm over the whole adapter, so that no task
            dominates because its gradients are large (the authors' code).

    Returns:
        Updates that are evaluated on demand, tile by tile.

    Raises:
        UserError: `floor` out of range, a negative weight, or Fisher information
            that is negative, not finite, or zero everywhere.
    """
    if not 0 < floor <= 1:
        raise UserError(f"fisher: floor={floor} is outside (0, 1]: give a small share such as 1e-6")
    _check_weights(tasks, "fisher")
    means, norms = zip(*(_size(tasks, t) for t in range(len(tasks.names))), strict=True)
    sizes = norms if normalize else [1.0] * len(means)
    weights = [weight / max(tasks.weights) for weight in tasks.weights]
    # A unit that all share changes nothing but keeps squared gradients clear of underflow.
    unit = max(w * (mean / size) for w, mean, size in zip(weights, means, sizes, strict=True))
    units = [unit * size / w if w else 0.0 for w, size in zip(weights, sizes, strict=True)]
    least = [floor * mean for mean in means]
    # float32, three times as fast, where it holds all of these with room for the entries.
    smallest = [low / (u or 1.0) for low, u in zip(least, units, strict=True)]
    wide = not all(1e-28 < number < 1e28 for number in (*means, *least, *smallest))
    rows = partial(_weighted_rows, tasks, units, least, torch.float64 if wide else torch.float32)
    return {
        module: Tiled(updates[0].shape, partial(rows, module), copies=8 if wide else 4)
        for module, updates in tasks.modules.items()
    }


def _weighted_rows(
    tasks: TaskVectors,
    units: Sequence[float],
    least: Sequence[float],
    dtype: torch.dtype,
    module: str,
    start: int,
    stop: int,
) -> Tensor:
    """Rows of the mean of the updates, weighted by their information in these units.

    Summed up in `dtype` or the factors' own, if that is wider. A unit of 0 is that of an adapter
    of weight 0.
    """
    updates = tasks.modules[module]
    own = updates[0].a.dtype
    dtype = torch.promote_types(dtype, own)
    above = updates[0].a.new_zeros(stop - start, updates[0].shape[1], dtype=dtype)
    below = torch.zeros_like(above)
    for t, update in enumerate(updates):
        if units[t]:
            information = tasks.statistics[t][module][start:stop].to(above)
            information = information.clamp(min=least[t]).div_(units[t])
            above.addcmul_(information, update.rows(start, stop).to(dtype))
            below.add_(information)
    return above.div_(below).to(own)


def _size(tasks: TaskVectors, t: int) -> tuple[float, float]:
    """Mean and Frobenius norm of F_t over all modules; UserError if it cannot be one."""
    name, total, squares, entries = tasks.names[t], 0.0, 0.0, 0
    for module in tasks.modules:
        information = tasks.statistics[t][module]
        part = float(information.sum(dtype=torch.float64))
        if not (math.isfinite(part) and information.min() >= 0):
            raise UserError(
                f"the Fisher information of '{name}' has negative or non-finite values at"
                f" {module}: collect it again"
            )
        total += part
        squares += float(torch.linalg.vector_norm(information, dtype=torch.float64)) ** 2
        entries += information.numel()
    if total == 0:
        raise UserError(
            f"the Fisher information of '{name}' is zero everywhere: collect it on the trained"
            " adapter, with its head"
        )
    return total / entries, math.sqrt(squares)


def _check_weights(tasks: TaskVectors, method: str) -> None:
    for name, weight in zip(tasks.names, tasks.weights, strict=True):
        if weight < 0:
            raise UserError(
                f"{method} takes weights of at least 0 but adapter '{name}' has {weight:g}"
            )
