"""Methods that decide entry by entry."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from formulas.case import Case, Dense


def ties(
    dense: Dense, w: Tensor, density: float = 0.2, scope: str = "global", combine: str = "mean"
) -> Dense:
    """Algorithm 1 of arXiv 2306.01708 on the flattened model, entry by entry."""
    flat = torch.cat([x.flatten(1) for x in dense.values()], 1)
    sizes = [x[0].numel() for x in dense.values()]
    trimmed = flat.clone()
    for t in range(len(w)):
        parts = [flat[t]] if scope == "global" else flat[t].split(sizes)
        kept = []
        for part in parts:
            keep = max(1, int(Fraction(str(density)) * len(part)))
            smallest = part.abs().sort(descending=True).values[keep - 1]
            kept.append(torch.where(part.abs() >= smallest, part, 0))
        trimmed[t] = torch.cat(kept)
    weighted = trimmed * w[:, None]
    signs = weighted.sum(0).sign()
    majority = 1 if signs.sum() > 0 else -1
    merged = []
    for column, sign in zip(weighted.T.tolist(), signs.tolist(), strict=True):
        agreeing = [t for t, x in enumerate(column) if x * (sign or majority) > 0]
        total = sum(column[t] for t in agreeing)
        divisor = {
            "mean": len(agreeing),
            "sum": 1,
            "weighted": sum(abs(float(w[t])) for t in agreeing),
        }[combine]
        merged.append(total / divisor if agreeing else 0.0)
    pieces = torch.tensor(merged, dtype=torch.float64).split(sizes)
    return {m: p.view_as(dense[m][0]) for m, p in zip(dense, pieces, strict=True)}


CASES = [
    Case(
        "ties",
        ties,
        options=(
            {},
            {"density": 0.5, "combine": "sum"},
            {"density": 0.29},
            {"density": 0.9, "scope": "tensor", "combine": "weighted"},
            {"density": 1.0},
        ),
        neutral={"density": 1.0},
        bad=(
            {"density": 0.0},
            {"density": 1.5},
            {"density": float("nan")},
            {"density": "half"},
            {"scope": "layer"},
            {"combine": "median"},
        ),
    ),
]
