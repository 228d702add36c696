"""EMR-Merging (arXiv 2405.17461)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formulas.case import Case, Dense, RuntimeCase
from merge_algorithms import Adapter


def emr(dense: Dense, w: Tensor, index: int, rescale: str = "sums") -> Dense:
    """Section 3, entry by entry, for the task of this index."""
    masked, own, shared = {}, 0.0, 0.0
    for module, x in dense.items():
        updates = w[:, None, None] * x
        sign = torch.where(updates.sum(0) > 0, 1.0, -1.0).double()
        unified = sign * torch.where(updates * sign > 0, updates.abs(), 0).max(0).values
        masked[module] = torch.where(updates[index] * unified > 0, unified, 0)
        size = x[0].numel() if rescale == "means" else 1
        own += float(updates[index].abs().sum()) / size
        shared += float(masked[module].abs().sum()) / size
    return {m: x * (own / shared if shared else 0.0) for m, x in masked.items()}


def for_first(dense: Dense, w: Tensor, task: str, rescale: str = "sums") -> Dense:
    """For the task that `first` names: the contract's adapters are in the order of their names."""
    return emr(dense, w, 0, rescale)


def first(adapters: Sequence[Adapter]) -> dict[str, Any]:
    return {"task": min(adapter.name for adapter in adapters)}


CASES: list[Case] = []
RUNTIME_CASES = [
    RuntimeCase(
        "emr",
        None,
        options=({"rescale": "means"}, {}),
        bad=[{"task": "nobody"}, {"task": 1}, {"rescale": "median"}],
        oracle=for_first,
        required=first,
    )
]
