"""Monte Carlo dropout (arXiv 2510.03262): what a merge with drawn masks can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formulas.case import Case, Dense, RuntimeCase


def disjoint_rows(dense: Dense, w: Tensor, drop_rates: Sequence[float] | None = None) -> Dense:
    """Rows of w_t / (1 - p_t) dW_t (arXiv 2510.03262), and the row that no adapter owns."""
    count = len(w)
    kept = 1 - torch.tensor(drop_rates or [1 - 1 / count] * count, dtype=torch.float64)
    scaled = {m: (w / kept)[:, None, None] * x for m, x in dense.items()}
    if drop_rates is None:
        return scaled
    return {m: torch.cat([x, torch.zeros_like(x[:1])]) for m, x in scaled.items()}


def any_rows(dense: Dense, w: Tensor, drop_rates: Sequence[float] | None = None) -> Dense:
    """Sums of the rows of w_t / (1 - p_t) dW_t over every subset of the adapters."""
    count = len(w)
    kept = 1 - torch.tensor(drop_rates or [1 - 1 / count] * count, dtype=torch.float64)
    return {m: any_subset(torch.einsum("t,t...->t...", w, x), kept) for m, x in dense.items()}


def summed(terms: Tensor, kept: Tensor) -> Tensor:
    return terms.sum(0, keepdim=True)


def any_subset(terms: Tensor, kept: Tensor) -> Tensor:
    """Sums of o_t / (1 - p_t) over every subset of the adapters."""
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(kept))
    return torch.einsum("st,t...->s...", subsets.view(-1, len(kept)) / kept, terms)


def at_most_one(terms: Tensor, kept: Tensor) -> Tensor:
    """o_t / (1 - p_t) of one adapter, or of none if the masks leave room for that."""
    alone = torch.einsum("t,t...->t...", 1 / kept, terms)
    return alone if kept.sum() > 1 - 1e-9 else torch.cat([alone, torch.zeros_like(alone[:1])])


_UNEQUAL: dict[str, Any] = {"drop_rates": [0.6, 0.9, 0.75, 0.8]}
_BAD_RATES: list[dict[str, Any]] = [
    {"drop_rates": [2.0, 0.5]},
    {"drop_rates": [float("nan"), 0.5]},
    {"drop_rates": []},
    {"drop_rates": 0.5},
    {"drop_rates": "ab"},
    {"drop_rates": [None, 0.5]},
]
RUNTIME_CASES = [
    RuntimeCase("direct", summed, bad=[{"drop_rates": [0.5, 0.5]}]),
    RuntimeCase("mc_dropout", any_subset, ({}, _UNEQUAL), _BAD_RATES),
    RuntimeCase(
        "orthogonal_mc_dropout",
        at_most_one,
        ({}, _UNEQUAL),
        [*_BAD_RATES, {"drop_rates": [0.1, 0.2]}],
    ),
]
CASES = [
    Case("mc_dropout", None, possible=any_rows, options=({}, _UNEQUAL), bad=_BAD_RATES),
    Case(
        "orthogonal_mc_dropout",
        None,
        possible=disjoint_rows,
        options=({}, _UNEQUAL),
        bad=[*_BAD_RATES, {"drop_rates": [0.1, 0.2]}],
    ),
]
