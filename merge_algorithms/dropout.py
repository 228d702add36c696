"""Monte Carlo dropout merging (arXiv 2510.03262): masks that keep adapters out of each other's way.

Adapter j is kept with probability 1 - p_j. Orthogonal masks are disjoint: element by element at
most one adapter speaks, so the masked outputs of two adapters have inner product 0 exactly. They
come from one uniform u per element, m_j = [c_{j-1} <= u < c_j] with c_j = sum_{i<=j} (1 - p_i),
which has the law of the paper's sequential Bernoulli draws: m_j ~ Bern(1 - p_j) (theorem 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.factors import stack
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors, one_per_adapter

Added = Callable[[Tensor], Tensor]
PAPER = "Orthogonal Monte Carlo Dropout 2025, arXiv 2510.03262"


@register(
    summary="every output row goes to one adapter, drawn by the seed",
    paper=PAPER,
    low_rank=True,
    seeded=True,
)
def orthogonal_mc_dropout(
    tasks: TaskVectors, *, drop_rates: Sequence[float] | None = None
) -> dict[str, LowRank]:
    """sum_t w_t / (1 - p_t) diag(m_t) dW_t with disjoint masks of output rows.

    The static form of arXiv 2510.03262: one draw of the masks, shared by all tokens, so that the
    result is a LoRA of rank at most sum r_t. Over seeds its mean is task arithmetic. The masks go
    to the adapters in the order of their names.

    Args:
        drop_rates: p_t in [0, 1) for each adapter with sum (1 - p_t) <= 1; default 1 - 1/T each.

    Raises:
        UserError: Drop rates outside [0, 1), of the wrong number, or that keep too much.
    """
    rates = _rates(tasks, drop_rates)
    order, factors = _by_name(tasks), _rescaled(tasks, rates)
    bands = list(pairwise(_edges(tasks, rates)))
    merged = {}
    for module, updates in tasks.modules.items():
        d_out, device = updates[0].shape[0], updates[0].b.device
        uniform = _uniform((d_out, 1), tasks.generator(module)).to(device)
        masked = [
            LowRank(updates[i].b.where((low <= uniform) & (uniform < high), 0.0), updates[i].a)
            for i, (low, high) in zip(order, bands, strict=True)
        ]
        merged[module] = stack(masked, [factors[i] for i in order])
    return merged


@register(
    summary="every adapter keeps random output rows, drawn by the seed",
    paper=PAPER,
    low_rank=True,
    seeded=True,
)
def mc_dropout(
    tasks: TaskVectors, *, drop_rates: Sequence[float] | None = None
) -> dict[str, LowRank]:
    """sum_t w_t / (1 - p_t) diag(m_t) dW_t with independent masks of output rows.

    The static form of Monte Carlo dropout, to compare `orthogonal_mc_dropout` with: several
    adapters, or none, may share a row. Over seeds its mean is task arithmetic.

    Args:
        drop_rates: p_t in [0, 1) for each adapter; default 1 - 1/T each.

    Raises:
        UserError: Drop rates outside [0, 1) or of the wrong number.
    """
    rates = _rates(tasks, drop_rates)
    order, factors = _by_name(tasks), _rescaled(tasks, rates)
    merged = {}
    for module, updates in tasks.modules.items():
        d_out, device = updates[0].shape[0], updates[0].b.device
        uniform = _uniform((d_out, len(order)), tasks.generator(module)).to(device)
        masked = [
            LowRank(updates[i].b.where(uniform[:, [place]] >= rates[i], 0.0), updates[i].a)
            for place, i in enumerate(order)
        ]
        merged[module] = stack(masked, [factors[i] for i in order])
    return merged


@register(summary="sum of the adapters' outputs", paper=PAPER, runtime=True)
def direct(tasks: TaskVectors) -> dict[str, Added]:
    """y = W0 x + sum_t w_t o_t with o_t = s_t B_t A_t x: task arithmetic at run time."""
    return {
        module: partial(_direct, stack(updates, tasks.weights))
        for module, updates in tasks.modules.items()
    }


@register(
    name="mc_dropout",
    summary="independent dropout masks on the adapters' outputs",
    paper=PAPER,
    runtime=True,
    seeded=True,
)
def mc_dropout_at_run_time(
    tasks: TaskVectors, *, drop_rates: Sequence[float] | None = None
) -> dict[str, Added]:
    """y = W0 x + sum_t w_t / (1 - p_t) m_t o_t, m_t ~ Bern(1 - p_t) per element and call.

    Args:
        drop_rates: p_t in [0, 1) for each adapter; default 1 - 1/T each.

    Raises:
        UserError: Drop rates outside [0, 1) or of the wrong number.
    """
    rates = _rates(tasks, drop_rates)
    order = _by_name(tasks)

    def combine(outputs: Iterator[Tensor], generator: torch.Generator) -> Tensor:
        total = torch.zeros((), device=generator.device)
        for output, index in zip(outputs, order, strict=True):
            total = total + output.where(_uniform(output.shape, generator) >= rates[index], 0.0)
        return total

    return _at_run_time(tasks, rates, combine)


@register(
    name="orthogonal_mc_dropout",
    summary="disjoint dropout masks on the adapters' outputs",
    paper=PAPER,
    runtime=True,
    seeded=True,
)
def orthogonal_mc_dropout_at_run_time(
    tasks: TaskVectors, *, drop_rates: Sequence[float] | None = None
) -> dict[str, Added]:
    """y = W0 x + sum_t w_t / (1 - p_t) m_t o_t with disjoint m_t, fresh per element and call.

    Needs one uniform tensor of the output's shape, whatever the number of adapters.

    Args:
        drop_rates: p_t in [0, 1) for each adapter with sum (1 - p_t) <= 1; default 1 - 1/T each.

    Raises:
        UserError: Drop rates outside [0, 1), of the wrong number, or that keep too much.
    """
    rates = _rates(tasks, drop_rates)
    _, *starts, end = _edges(tasks, rates)

    def combine(outputs: Iterator[Tensor], generator: torch.Generator) -> Tensor:
        total = next(outputs)
        uniform = _uniform(total.shape, generator)
        # Bands ascend, so the last adapter whose band has begun at u is the one that owns u. Masks
        # are floats, exactly 0 or 1: on a CPU arithmetic with them is far faster than with bools,
        # and exact as long as the outputs are finite (0 * inf would be NaN).
        for output, start in zip(outputs, starts, strict=True):
            begun = torch.ge(uniform, start, out=torch.empty_like(total))
            total = total.lerp_(output, begun)
        return total if end == 1 else total.where(uniform < end, 0.0)

    return _at_run_time(tasks, rates, combine)


def _direct(update: LowRank, x: Tensor) -> Tensor:
    return linear(linear(x.to(update.a.dtype), update.a), update.b)


def _at_run_time(
    tasks: TaskVectors,
    rates: Sequence[float],
    combine: Callable[[Iterator[Tensor], torch.Generator], Tensor],
) -> dict[str, Added]:
    """Run-time functions that combine the adapters' outputs w_t / (1 - p_t) o_t.

    `combine` gets them one at a time, in the order of the adapters' names.
    """

    def added(a: Tensor, bs: Sequence[Tensor], generator: torch.Generator, x: Tensor) -> Tensor:
        inner = linear(x.to(a.dtype), a).split([b.shape[1] for b in bs], dim=-1)
        return combine((linear(z, b) for z, b in zip(inner, bs, strict=True)), generator)

    factors = _rescaled(tasks, rates)
    order = _by_name(tasks)
    functions: dict[str, Added] = {}
    for module, updates in tasks.modules.items():
        a = torch.cat([updates[index].a for index in order])
        bs = [updates[index].b * factors[index] for index in order]
        functions[module] = partial(added, a, bs, tasks.generator(module, a.device))
    return functions


def _rates(tasks: TaskVectors, drop_rates: Sequence[float] | None) -> list[float]:
    count = len(tasks.names)
    if drop_rates is None:
        return [1 - 1 / count] * count
    rates = list(one_per_adapter(tasks.names, "drop rate", drop_rates))
    for name, rate in zip(tasks.names, rates, strict=True):
        if not 0 <= rate < 1:
            raise UserError(f"the drop rate of adapter '{name}' is {rate}: give one in [0, 1)")
    return rates


def _edges(tasks: TaskVectors, rates: Sequence[float]) -> list[float]:
    """c_0 = 0 .. c_T: the bands of the adapters, in the order of their names, between them."""
    edges = [0.0, *accumulate(1 - rates[index] for index in _by_name(tasks))]
    if edges[-1] > 1 + 1e-6:
        raise UserError(
            f"disjoint masks can keep at most 1 in all, but sum (1 - drop rate) = {edges[-1]:.4g}:"
            f" raise the drop rates (1 - 1/T = {1 - 1 / len(rates):.4g} each is the default)"
        )
    if edges[-1] > 1 - 1e-6:
        edges[-1] = 1.0  # rounding of the sum must not cost a pass over every output
    return edges


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """u in [0, 1), float32 whatever the default dtype is: the masks depend on the seed alone."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _by_name(tasks: TaskVectors) -> list[int]:
    """The adapters' indices in the order of their names, which no caller's order changes."""
    return sorted(range(len(tasks.names)), key=tasks.names.__getitem__)


def _rescaled(tasks: TaskVectors, rates: Sequence[float]) -> list[float]:
    return [w / (1 - rate) for w, rate in zip(tasks.weights, rates, strict=True)]
