"""Spherical interpolation between two adapters, exact as a LoRA of rank r_1 + r_2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.factors import stack
from merge_algorithms.linear import check_unweighted
from merge_algorithms.registry import register
from merge_algorithms.similarity import gram
from merge_algorithms.task_vectors import TaskVectors

# Beyond this |cosine| mergekit interpolates linearly, and so does this.
COLLINEAR = 0.9995


@register(
    summary="spherical interpolation between two adapters",
    paper="Shoemake 1985, doi 10.1145/325165.325242; MergeKit, Goddard et al. 2024,"
    " arXiv 2403.13257",
    low_rank=True,
    adapters=2,
)
def slerp(
    tasks: TaskVectors,
    *,
    t: float = 0.5,
    scope: Literal["global", "tensor"] = "global",
) -> dict[str, LowRank]:
    """(sin((1-t) O) dW_1 + sin(t O) dW_2) / sin O, with O the angle between the two updates.

    Shoemake's formula (1985, section 3.3) with the coefficients applied to the updates as they
    are, not to unit vectors, as in mergekit. Where the updates are (anti-)parallel, |cos O| above
    0.9995, or one of them is zero, the formula has no direction to turn in and the interpolation
    is linear, (1-t) dW_1 + t dW_2.
    mergekit interpolates full weights, between which the angle is almost 0 because they share the
    base model: there it is close to linear interpolation. Here only what training has changed
    counts.

    Args:
        t: From 0, the first adapter, to 1, the second.
        scope: What is one vector: 'global' is the whole adapter, 'tensor' each module on its own
            (mergekit).

    Raises:
        UserError: t outside [0, 1], or weights other than 1.
    """
    if not 0 <= t <= 1:
        raise UserError(f"slerp: t={t} is outside [0, 1]: 0 is the first adapter, 1 the second")
    check_unweighted(tasks, "slerp", "say with t how far to go from the first to the second")
    merged: dict[str, LowRank] = {}
    for group in tasks.groups(scope):
        weights = _weights([tasks.modules[module] for module in group], t)
        merged |= {module: stack(tasks.modules[module], weights) for module in group}
    return merged


def _weights(pairs: Sequence[Sequence[LowRank]], t: float) -> tuple[float, float]:
    """What the two updates are multiplied by, one vector being all modules together."""
    (first, both), (_, second) = torch.stack([gram(pair) for pair in pairs]).sum(0).tolist()
    norms = math.sqrt(first) * math.sqrt(second)
    cosine = both / norms if norms else 1.0
    if abs(cosine) > COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
