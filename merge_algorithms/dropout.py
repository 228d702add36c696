"""Monte Carlo dropout merging (arXiv 2510.03262): masks that keep adapters out of each other's way.

Adapter j is kept with probability 1 - p_j. Orthogonal masks are disjoint: element by element at
most one adapter speaks, so the masked outputs of two adapters have inner product 0 exactly. They
come from one uniform u per element, m_j = [c_{j-1} <= u < c_j] with c_j = sum_{i<=j} (1 - p_i),
which has the law of the paper's sequential Bernoulli draws: m_j ~ Bern(1 - p_j) (theorem 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.factors import stack
from merge_algorithms.mixture import Group, Mixture, Owners, word_limits
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors, one_per_adapter

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
def direct(tasks: TaskVectors) -> dict[str, Mixture]:
    """y = W0 x + sum_t w_t o_t with o_t = s_t B_t A_t x: task arithmetic at run time."""
    everybody = ((0, tuple(range(len(tasks.names)))),)
    return {
        module: Mixture(updates, tasks.weights, (everybody,))
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
) -> dict[str, Mixture]:
    """y = W0 x + sum_t w_t / (1 - p_t) m_t o_t, m_t ~ Bern(1 - p_t) per element and call.

    Args:
        drop_rates: p_t in [0, 1) for each adapter; default 1 - 1/T each.

    Raises:
        UserError: Drop rates outside [0, 1) or of the wrong number.
    """
    rates = _rates(tasks, drop_rates)
    order = _by_name(tasks)
    bits = max(word_limits([0.0, 1 - rate])[0] for rate in rates)
    passes = tuple(_owners([t], [0, round((1 - rates[t]) * 2**bits)], bits) for t in order)
    return _mixtures(tasks, rates, passes, bits)


@register(
    name="orthogonal_mc_dropout",
    summary="disjoint dropout masks on the adapters' outputs",
    paper=PAPER,
    runtime=True,
    seeded=True,
)
def orthogonal_mc_dropout_at_run_time(
    tasks: TaskVectors, *, drop_rates: Sequence[float] | None = None
) -> dict[str, Mixture]:
    """y = W0 x + sum_t w_t / (1 - p_t) m_t o_t with disjoint m_t, fresh per element and call.

    Needs one random word per element of the output, whatever the number of adapters.

    Args:
        drop_rates: p_t in [0, 1) for each adapter with sum (1 - p_t) <= 1; default 1 - 1/T each.

    Raises:
        UserError: Drop rates outside [0, 1), of the wrong number, or that keep too much.
    """
    rates = _rates(tasks, drop_rates)
    bits, limits = word_limits(_edges(tasks, rates))
    return _mixtures(tasks, rates, (_owners(_by_name(tasks), limits, bits),), bits)


def _owners(order: Sequence[int], limits: Sequence[int], bits: int) -> Owners:
    """Adapter after adapter owns the words from limit to limit, nobody those above the last."""
    owners: list[tuple[int, Group]] = [
        (start, (t,)) for start, t in zip(limits[:-1], order, strict=True)
    ]
    return (*owners, (limits[-1], ())) if limits[-1] < 2**bits else tuple(owners)


def _mixtures(
    tasks: TaskVectors, rates: Sequence[float], passes: tuple[Owners, ...], bits: int
) -> dict[str, Mixture]:
    factors = tuple(_rescaled(tasks, rates))
    return {
        module: Mixture(updates, factors, passes, bits) for module, updates in tasks.modules.items()
    }


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
            f"disjoint masks can keep at most 1 in all, but sum (1 - drop rate) = {edges[-1]:.8g}:"
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
