"""Sums of the updates."""

from __future__ import annotations

import torch
from torch import Tensor

from formulas.case import Case, Dense


def task_arithmetic(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) for m, x in dense.items()}


def average(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) / w.sum() for m, x in dense.items()}


CASES = [
    Case("task_arithmetic", task_arithmetic),
    Case("average", average),
]
