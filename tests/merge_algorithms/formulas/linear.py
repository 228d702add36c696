"""Sums of the updates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulas.case import Case, Dense


def task_arithmetic(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) for m, x in dense.items()}


def average(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) / w.sum() for m, x in dense.items()}


def linear(dense: Dense, w: Tensor, normalize: bool = True) -> Dense:
    return average(dense, w) if normalize else task_arithmetic(dense, w)


def lora_sum(dense: Dense, w: Tensor) -> Dense:
    return {m: x.sum(0) for m, x in dense.items()}


def slerp(dense: Dense, w: Tensor, t: float = 0.5, scope: str = "global") -> Dense:
    """Shoemake 1985 on the flattened updates; linear where they are collinear or zero."""
    if scope == "tensor" and len(dense) > 1:
        merged: Dense = {}
        for module, x in dense.items():
            merged |= slerp({module: x}, w, t)
        return merged
    p, q = torch.cat([x.flatten(1) for x in dense.values()], 1)
    lengths = float(p.norm() * q.norm())
    cosine = float(p @ q) / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        first, second = 1 - t, t
    else:
        angle = math.acos(cosine)
        first = math.sin((1 - t) * angle) / math.sin(angle)
        second = math.sin(t * angle) / math.sin(angle)
    return {m: first * x[0] + second * x[1] for m, x in dense.items()}


_NO_SUM = ({"weights": [1.0, -1.0]}, {"weights": [0.0, 0.0]})
CASES = [
    Case("task_arithmetic", task_arithmetic),
    Case("average", average, bad=_NO_SUM),
    Case("linear", linear, options=({}, {"normalize": False}), bad=(*_NO_SUM, {"normalize": 1})),
    Case("lora_sum", lora_sum, weighted=False),
    Case(
        "slerp",
        slerp,
        options=({}, {"t": 0.25}, {"t": 0.8, "scope": "tensor"}, {"t": 1.0}),
        neutral={"t": 0.0},
        bad=({"t": -0.1}, {"t": 1.5}, {"t": float("nan")}, {"scope": "layer"}),
        weighted=False,
        reverse=lambda options: options | {"t": 1 - options.get("t", 0.5)},
    ),
]
