"""Methods that decide entry by entry: trim, rescale, elect a sign, combine what agrees.

They are dense by nature and all one procedure, `_merge`: a trim (see `trim`), which may rescale,
and a rule for what the trimmed updates make together. It is evaluated tile by tile, so that T
tiles of rows are the most that exists at any time.

Names of variants are those of codes that differ: 'authors' is the paper, with what it leaves open
settled as in its authors' code; 'mergekit' and 'peft' are what these tools compute, evaluated on
exact updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.precision import full_precision
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.tiles import Stack, Tiled, row_tiles
from merge_algorithms.trim import (
    Trim,
    drop_at_random,
    drop_small_at_random,
    keep_largest,
    keep_middle_of_rows,
    matched,
)

TIES = "Yadav et al. 2023, arXiv 2306.01708"
DARE = "Yu et al. 2024, arXiv 2311.03099"
DELLA = "Deep et al. 2024, arXiv 2406.11617"
BREADCRUMBS = "Davari and Belilovsky 2024, arXiv 2312.06795"
_ROUNDING = 1e-9  # 0.9 + 0.1, say, may exceed 1


@dataclass(frozen=True)
class Rule:
    """What the trimmed updates of all tasks make together.

    Attributes:
        combine: 'linear' adds up w_t trimmed_t. The others add up the entries of the elected sign
            only: 'sum' divides by nothing, 'mean' by the number of tasks that agree, 'weighted'
            by the sum of their |w_t|, 'net' by the sum of their w_t.
        weighted_votes: Elect the sign of sum_t w_t trimmed_t, else of sum_t trimmed_t.
        majority: Where that sum is exactly 0, take the sign of the majority of all elected signs
            over the whole model (-1 if even they cancel), else +1.
    """

    combine: Literal["linear", "sum", "mean", "weighted", "net"]
    weighted_votes: bool = True
    majority: bool = False


_LINEAR = Rule("linear")
_TIES = {
    "authors": Rule("mean", majority=True),
    "mergekit": Rule("net"),
    "peft": Rule("mean", weighted_votes=False),
}
_DARE_TIES = {**_TIES, "mergekit": Rule("sum")}


@register(summary="trim small entries, elect a sign, merge what agrees", paper=TIES)
def ties(
    tasks: TaskVectors,
    *,
    density: float = 0.2,
    variant: Literal["authors", "mergekit", "peft"] = "authors",
    scope: Literal["variant", "global", "tensor"] = "variant",
    combine: Literal["variant", "mean", "sum", "weighted"] = "variant",
) -> dict[str, Tiled]:
    """TIES-Merging (arXiv 2306.01708, algorithm 1).

    Trim: of the n entries of dW_t, the density * n largest by magnitude stay (rounded down, at
    least one), and all that equal the smallest of them; comparisons are made in float32. The
    authors' code keeps one entry more (it compares with the next smaller value). A module that an
    adapter lacks counts as zeros.
    Weights: the trimmed update of task t is multiplied by w_t, and everything after uses the
    product: a task of weight 0 neither votes nor counts, one of weight 2 votes twice.
    Elect: the sign of sum_t w_t trimmed_t; where that is exactly 0, the sign of the majority of
    all elected signs over the whole model (-1 if even they cancel, as in the authors' code).
    Combine: over the tasks whose entry has the elected sign.

    Args:
        density: Share of each adapter's entries that is kept, in (0, 1].
        variant: 'authors' as above, with scope 'global' and combine 'mean'. 'mergekit' trims by
            tensor, elects + for a sum of 0 and divides by the sum of the agreeing tasks' w_t.
            'peft' (ties_svd) trims by tensor, elects the sign of the unweighted sum, + for 0, and
            divides the agreeing tasks' sum of w_t dW_t by their number.
        scope: What the share refers to: 'global' is the whole adapter, 'tensor' each module;
            'variant' leaves it to the variant, also in the next option.
        combine: 'mean' divides the agreeing sum by the number of agreeing tasks, 'weighted' by
            the sum of their |w_t|, 'sum' by nothing.

    Returns:
        Updates that are evaluated on demand; the thresholds are found here.
    """
    _check_density(density)
    rule = _TIES[variant]
    if combine != "variant":
        rule = Rule(combine, rule.weighted_votes, rule.majority)
    if scope == "variant":
        scope = "global" if variant == "authors" else "tensor"
    return _merge(tasks, keep_largest(tasks, density, scope), rule)


@register(summary="trim small entries, add up the rest", paper=TIES)
def magnitude_prune(
    tasks: TaskVectors,
    *,
    density: float = 0.2,
    scope: Literal["global", "tensor"] = "global",
) -> dict[str, Tiled]:
    """sum_t w_t trimmed_t: TIES (arXiv 2306.01708, algorithm 1) without the election.

    Args:
        density: Share of each adapter's entries that is kept, in (0, 1].
        scope: What the share refers to: 'global' is the whole adapter, 'tensor' each module (as
            in PEFT's magnitude_prune_svd).
    """
    _check_density(density)
    return _merge(tasks, keep_largest(tasks, density, scope), _LINEAR)


@register(summary="drop entries at random and rescale, add up the rest", paper=DARE, seeded=True)
def dare_linear(
    tasks: TaskVectors,
    *,
    density: float = 0.1,
    variant: Literal["authors", "mergekit"] = "authors",
) -> dict[str, Tiled]:
    """sum_t w_t m_t dW_t / (1 - p) with m_t ~ Bern(1 - p) entry by entry (arXiv 2311.03099).

    That is DARE of section 3 of the paper; over seeds its mean is task arithmetic.

    Args:
        density: 1 - p, the share that is kept, in (0, 1]; a multiple of 2^-16.
        variant: 'authors' (and PEFT) divides by 1 - p; 'mergekit' scales each module of each
            update so that the sum of its |entries| is what it was, unless either sum is below
            1e-7.
    """
    return _merge(tasks, _dare(tasks, density, variant), _LINEAR)


@register(summary="drop entries at random and rescale, elect a sign", paper=DARE, seeded=True)
def dare_ties(
    tasks: TaskVectors,
    *,
    density: float = 0.1,
    variant: Literal["authors", "mergekit", "peft"] = "authors",
) -> dict[str, Tiled]:
    """DARE (arXiv 2311.03099, section 3), then election and mean of TIES, without its trim.

    Args:
        density: 1 - p, the share that is kept, in (0, 1]; a multiple of 2^-16.
        variant: 'authors' divides by 1 - p and goes on as `ties` does. 'mergekit' scales each
            module of each update so that the sum of its |entries| is what it was, unless either
            sum is below 1e-7, and adds up what agrees. 'peft' (dare_ties_svd) divides by 1 - p
            and goes on as its ties does.
    """
    return _merge(tasks, _dare(tasks, density, variant), _DARE_TIES[variant])


@register(summary="drop small entries more often, rescale, elect a sign", paper=DELLA, seeded=True)
def della(
    tasks: TaskVectors,
    *,
    density: float = 0.7,
    epsilon: float = 0.07,
    variant: Literal["authors", "mergekit"] = "authors",
) -> dict[str, Tiled]:
    """DELLA-Merging (arXiv 2406.11617, section 3): MagPrune, election, mean by weights.

    The entry of rank i of n by magnitude within its row (1 is the smallest) is kept with
    probability p = density - epsilon + 2 epsilon (i - 1) / (n - 1) and divided by p. The elected
    sign is that of sum_t w_t trimmed_t; the agreeing sum is divided by the sum of their w_t.

    Args:
        density: Mean share that is kept, in (0, 1]; default: 1 - 0.3, the authors' drop rate.
        epsilon: Half the range of the probabilities, which must stay in (0, 1]; default: half of
            the authors' window of 0.14. Probabilities are multiples of 2^-16.
        variant: 'authors' divides by p; 'mergekit' scales each module of each update so that the
            sum of its |entries| is what it was, unless either sum is below 1e-7.
    """
    return _merge(tasks, _della(tasks, density, epsilon, variant), Rule("net"))


@register(
    summary="drop small entries more often, rescale, add up the rest", paper=DELLA, seeded=True
)
def della_linear(
    tasks: TaskVectors,
    *,
    density: float = 0.7,
    epsilon: float = 0.07,
    variant: Literal["authors", "mergekit"] = "authors",
) -> dict[str, Tiled]:
    """sum_t w_t trimmed_t with DELLA's MagPrune (arXiv 2406.11617, section 3), see `della`.

    Over seeds its mean is task arithmetic.

    Args:
        density: Mean share that is kept, in (0, 1]; default: 1 - 0.3, the authors' drop rate.
        epsilon: Half the range of the probabilities, which must stay in (0, 1]; default: half of
            the authors' window of 0.14. Probabilities are multiples of 2^-16.
        variant: 'authors' divides by p; 'mergekit' scales each module of each update so that the
            sum of its |entries| is what it was, unless either sum is below 1e-7.
    """
    return _merge(tasks, _della(tasks, density, epsilon, variant), _LINEAR)


@register(summary="drop the largest and the small entries, add up the rest", paper=BREADCRUMBS)
def breadcrumbs(
    tasks: TaskVectors,
    *,
    density: float = 0.15,
    gamma: float = 0.006,
    variant: Literal["authors", "mergekit"] = "authors",
) -> dict[str, Tiled]:
    """Model Breadcrumbs (arXiv 2312.06795, section 3): sum_t w_t trimmed_t.

    Of every row of dW_t the share gamma that is largest by magnitude is dropped, of the rest the
    largest stay: a share `density` of the whole row, at least one entry. The paper then scales by
    alpha, for which `Merged.scaled` is there.

    Args:
        density: Share that is kept, in (0, 1 - gamma].
        gamma: Share of the largest entries that is dropped, in [0, 1).
        variant: 'authors' trims row by row, 'mergekit' each module as a whole.
    """
    return _merge(tasks, _breadcrumbs(tasks, density, gamma, variant), _LINEAR)


@register(summary="drop the largest and the small entries, elect a sign", paper=BREADCRUMBS)
def breadcrumbs_ties(
    tasks: TaskVectors,
    *,
    density: float = 0.15,
    gamma: float = 0.006,
    variant: Literal["authors", "mergekit"] = "authors",
) -> dict[str, Tiled]:
    """Breadcrumbs' trim (arXiv 2312.06795, section 3), then the sum of what agrees in sign.

    The elected sign is that of sum_t w_t trimmed_t, + where it is 0. The combination is mergekit's.

    Args:
        density: Share that is kept, in (0, 1 - gamma].
        gamma: Share of the largest entries that is dropped, in [0, 1).
        variant: 'authors' trims row by row, 'mergekit' each module as a whole.
    """
    return _merge(tasks, _breadcrumbs(tasks, density, gamma, variant), Rule("sum"))


def _dare(tasks: TaskVectors, density: float, variant: str) -> Trim:
    _check_density(density)
    if variant == "mergekit":
        return matched(tasks, drop_at_random(tasks, density, rescale=False))
    return drop_at_random(tasks, density, rescale=True)


def _della(tasks: TaskVectors, density: float, epsilon: float, variant: str) -> Trim:
    _check_density(density)
    if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon <= 1 + _ROUNDING):
        raise UserError(
            f"epsilon={epsilon} with density={density} makes probabilities outside (0, 1]: give"
            f" one from 0 to {min(density, 1 - density):.4g}"
        )
    if variant == "mergekit":
        return matched(tasks, drop_small_at_random(tasks, density, epsilon, rescale=False))
    return drop_small_at_random(tasks, density, epsilon, rescale=True)


def _breadcrumbs(tasks: TaskVectors, density: float, gamma: float, variant: str) -> Trim:
    _check_density(density)
    if not 0 <= gamma <= 1 - density + _ROUNDING:
        raise UserError(
            f"gamma={gamma} with density={density} is more than there is: give a gamma from 0 to"
            f" {1 - density:.4g}"
        )
    if variant == "mergekit":
        return keep_largest(tasks, density, "tensor", skip=gamma)
    return keep_middle_of_rows(density, gamma)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"density={density} is outside (0, 1]: give a share such as 0.2")


def _merge(tasks: TaskVectors, trim: Trim, rule: Rule) -> dict[str, Tiled]:
    """The lazily evaluated merge made of a trim and a rule."""
    stack = lru_cache(maxsize=1)(lambda module: Stack(tasks.modules[module]))
    weights = torch.tensor(tasks.weights, dtype=torch.float64)

    def trimmed(module: str, start: int, stop: int) -> Tensor:
        return trim(module, start, stack(module).rows(start, stop))

    @cache
    def majority() -> int:
        balance = 0
        for module, updates in tasks.modules.items():
            for start, stop in row_tiles(updates[0].shape, copies=len(updates)):
                votes = _over_tasks(weights, trimmed(module, start, stop))
                balance += int(votes.sign_().sum(dtype=torch.float64))
        return 1 if balance > 0 else -1

    def compute(module: str, start: int, stop: int) -> Tensor:
        rows = trimmed(module, start, stop)
        if rule.combine == "linear":
            return _over_tasks(weights, rows)
        merged, tied = _agreeing(rows, weights, rule, tie=1)
        if tied and rule.majority and majority() < 0:
            merged, _ = _agreeing(trimmed(module, start, stop), weights, rule, tie=-1)
        return merged

    return {
        module: Tiled(updates[0].shape, partial(compute, module), copies=len(updates))
        for module, updates in tasks.modules.items()
    }


def _agreeing(rows: Tensor, weights: Tensor, rule: Rule, tie: int) -> tuple[Tensor, bool]:
    """Rows (n, d_in) of the combination of trimmed rows (T, n, d_in), which are overwritten.

    Also whether the sign `tie`, given to entries whose votes cancel, has decided any of them.
    Comparisons are made in place, into floats: on a CPU several times as fast as booleans.
    """
    ones = torch.ones_like(weights)
    if rule.weighted_votes and bool((weights != 1).any()):
        rows.mul_(weights.to(rows)[:, None, None])
    votes = _over_tasks(ones, rows)
    signs = votes.clone()
    signs = (signs.ge_(0) if tie > 0 else signs.gt_(0)).mul_(2).sub_(1)
    rows.mul_(signs).clamp_(min=0)  # magnitudes of what agrees, 0 for the rest
    merged = _over_tasks(ones if rule.weighted_votes else weights, rows).mul_(signs)
    tied = rule.majority and bool(votes.eq_(0).mul_(merged).abs_().sum())
    if rule.combine != "sum":
        counts = {"mean": ones, "weighted": weights.abs(), "net": weights}[rule.combine]
        shares = _over_tasks(counts, rows.sign_())
        if rule.combine == "net" and bool((weights < 0).any()):
            # What is left of weights that cancel is rounding, and not to be divided by.
            residue = _over_tasks(weights.abs(), rows).mul_(1e-6)
            shares.masked_fill_(shares.abs().le(residue), 0)
        merged.div_(shares.add_(shares.clone().eq_(0)))
    return merged, tied


def _over_tasks(factors: Tensor, rows: Tensor) -> Tensor:
    """sum_t factors_t rows_t, (n, d_in), as one product with the matrix (T, n * d_in)."""
    with full_precision(rows.device):
        return (factors.to(rows)[None] @ rows.flatten(1)).view(rows.shape[1:])
