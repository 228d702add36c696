"""Methods that decide entry by entry."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from formulas.case import Case, Dense

# (entries of T tasks at one place, their weights, sign where votes cancel) -> the merged entry
Entry = Callable[[list[float], list[float], int], float]


def count(share: float, total: int) -> int:
    return int(Fraction(str(share)) * total)


def keep_band(x: Tensor, skip: int, keep: int) -> Tensor:
    """The `keep` entries of largest magnitude after the `skip` largest, zeros elsewhere."""
    magnitudes = x.abs().flatten().sort(descending=True).values
    kept = x.abs() >= magnitudes[skip + keep - 1]
    if skip:
        kept &= x.abs() < magnitudes[skip - 1]
    return x.where(kept, 0)


def trimmed(dense: Dense, density: float, scope: str, gamma: float = 0.0) -> Dense:
    """Each task's entries of largest magnitude, of the whole model, a tensor or a row of it."""

    def cut(x: Tensor) -> Tensor:
        return keep_band(x, count(gamma, x.numel()), max(1, count(density, x.numel())))

    if scope == "row":
        return {
            m: torch.stack([torch.stack([cut(row) for row in task]) for task in x])
            for m, x in dense.items()
        }
    if scope == "tensor":
        return {m: torch.stack([cut(task) for task in x]) for m, x in dense.items()}
    sizes = [x[0].numel() for x in dense.values()]
    flat = torch.cat([x.flatten(1) for x in dense.values()], 1)
    parts = torch.stack([cut(task) for task in flat]).split(sizes, 1)
    return {m: part.view_as(x) for (m, x), part in zip(dense.items(), parts, strict=True)}


def by_entry(dense: Dense, w: Tensor, entry: Entry, majority: bool) -> Dense:
    """`entry` at every place of the model; the majority is that of the signs of sum_t w_t x_t."""
    votes = sum(float((w[:, None, None] * x).sum(0).sign().sum()) for x in dense.values())
    tie = -1 if majority and votes <= 0 else 1
    return {
        m: torch.tensor(
            [entry(column, w.tolist(), tie) for column in x.flatten(1).T.tolist()],
            dtype=torch.float64,
        ).view_as(x[0])
        for m, x in dense.items()
    }


def agreeing(x: list[float], w: list[float], tie: int, combine: str = "mean") -> float:
    """What the weighted entries that have the sign of their sum make together."""
    products = [a * b for a, b in zip(x, w, strict=True)]
    total = sum(products)
    sign = tie if total == 0 else (1 if total > 0 else -1)
    chosen = [t for t, product in enumerate(products) if product * sign > 0]
    divisor = {
        "mean": len(chosen),
        "sum": 1,
        "weighted": sum(abs(w[t]) for t in chosen),
        "net": sum(w[t] for t in chosen),
    }[combine]
    return sum(products[t] for t in chosen) / (divisor or 1)


def agreeing_sum(x: list[float], w: list[float], tie: int) -> float:
    return agreeing(x, w, tie, "sum")


def agreeing_net(x: list[float], w: list[float], tie: int) -> float:
    return agreeing(x, w, tie, "net")


def agreeing_peft(x: list[float], w: list[float], tie: int) -> float:
    """PEFT: the sign of the unweighted sum, and the weighted sum over the number that agree."""
    sign = 1 if sum(x) >= 0 else -1
    chosen = [t for t, value in enumerate(x) if value * sign > 0]
    return sum(w[t] * x[t] for t in chosen) / max(1, len(chosen))


def linear(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) for m, x in dense.items()}


def ties(
    dense: Dense,
    w: Tensor,
    density: float = 0.2,
    variant: str = "authors",
    scope: str = "variant",
    combine: str = "variant",
) -> Dense:
    """Algorithm 1 of arXiv 2306.01708 entry by entry, and what other tools make of it."""
    tool = {"authors": "mean", "mergekit": "net", "peft": "mean"}[variant]
    entry: Entry = agreeing_peft
    if variant != "peft":
        rule = tool if combine == "variant" else combine

        def entry(x: list[float], w: list[float], tie: int) -> float:
            return agreeing(x, w, tie, rule)

    if scope == "variant":
        scope = "global" if variant == "authors" else "tensor"
    return by_entry(trimmed(dense, density, scope), w, entry, variant == "authors")


def magnitude_prune(dense: Dense, w: Tensor, density: float = 0.2, scope: str = "global") -> Dense:
    return linear(trimmed(dense, density, scope), w)


def breadcrumbs(
    dense: Dense, w: Tensor, density: float = 0.15, gamma: float = 0.006, variant: str = "authors"
) -> Dense:
    """Section 3 of arXiv 2312.06795: per row (mergekit: per tensor) the middle is kept."""
    scope = "row" if variant == "authors" else "tensor"
    return linear(trimmed(dense, density, scope, gamma), w)


def breadcrumbs_ties(
    dense: Dense, w: Tensor, density: float = 0.15, gamma: float = 0.006, variant: str = "authors"
) -> Dense:
    scope = "row" if variant == "authors" else "tensor"
    return by_entry(trimmed(dense, density, scope, gamma), w, agreeing_sum, majority=False)


def resolved(probability: Tensor) -> Tensor:
    """Masks resolve probabilities to multiples of 2^-16, and rescale by what they resolved to."""
    return (probability * 2**16).round().clamp(min=1) / 2**16


def keep_probabilities(x: Tensor, density: float, epsilon: float) -> Tensor:
    """MagPrune (arXiv 2406.11617): linear in the rank by magnitude within the row."""
    ranks = x.abs().argsort(-1).argsort(-1).double()
    n = x.shape[-1]
    return resolved((density - epsilon) + 2 * epsilon * ranks / (n - 1))


def any_masks(scaled: Dense, w: Tensor, entry: Entry | None) -> Dense:
    """The merges, at every place, of every subset of the tasks' rescaled entries."""
    masks = [torch.tensor(m, dtype=torch.float64) for m in itertools.product([0, 1], repeat=len(w))]
    merges = []
    for mask in masks:
        kept = {m: mask[:, None, None] * x for m, x in scaled.items()}
        merges.append(linear(kept, w) if entry is None else by_entry(kept, w, entry, False))
    return {m: torch.stack([merged[m] for merged in merges]) for m in scaled}


def dare(entries: dict[str, Entry | None]) -> Callable[..., Dense]:
    def possible(dense: Dense, w: Tensor, density: float = 0.1, variant: str = "authors") -> Dense:
        p = resolved(torch.tensor(density, dtype=torch.float64))
        return any_masks({m: x / p for m, x in dense.items()}, w, entries[variant])

    return possible


def della(entry: Entry | None) -> Callable[..., Dense]:
    def possible(dense: Dense, w: Tensor, density: float = 0.7, epsilon: float = 0.07) -> Dense:
        scaled = {m: x / keep_probabilities(x, density, epsilon) for m, x in dense.items()}
        return any_masks(scaled, w, entry)

    return possible


_BAD_DENSITY: list[dict[str, Any]] = [
    {"density": 0.0},
    {"density": -0.1},
    {"density": 1.5},
    {"density": float("nan")},
    {"density": "half"},
]
_BAD_DARE = [*_BAD_DENSITY, {"variant": "mergkit"}]
_BAD_DELLA = [
    *_BAD_DARE,
    {"epsilon": -0.1},
    {"epsilon": 0.4},
    {"density": 0.1, "epsilon": 0.1},
    {"epsilon": float("nan")},
]
_BAD_BREADCRUMBS = [*_BAD_DARE, {"gamma": -0.1}, {"gamma": 0.9}, {"gamma": float("nan")}]
_BREADCRUMBS = (
    {},
    {"density": 0.5, "gamma": 0.2},
    {"density": 0.29, "gamma": 0.01, "variant": "mergekit"},
)
_DELLA = ({}, {"density": 0.4, "epsilon": 0.3})

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
            {"density": 0.6, "variant": "mergekit"},
            {"density": 0.6, "variant": "peft"},
            {"density": 0.6, "variant": "mergekit", "combine": "mean", "scope": "global"},
        ),
        neutral={"density": 1.0},
        bad=(*_BAD_DARE, {"scope": "layer"}, {"combine": "median"}),
    ),
    Case(
        "magnitude_prune",
        magnitude_prune,
        options=({}, {"density": 0.5, "scope": "tensor"}),
        neutral={"density": 1.0},
        bad=(*_BAD_DENSITY, {"scope": "row"}),
    ),
    Case(
        "dare_linear",
        None,
        possible=dare({"authors": None}),
        options=({}, {"density": 0.6}),
        neutral={"density": 1.0},
        bad=_BAD_DARE,
        entrywise=True,
    ),
    Case(
        "dare_ties",
        None,
        possible=dare({"authors": agreeing, "peft": agreeing_peft}),
        options=({"density": 0.3}, {"density": 0.6, "variant": "peft"}),
        neutral={"density": 1.0},
        bad=_BAD_DARE,
        entrywise=True,
    ),
    Case(
        "della",
        None,
        possible=della(agreeing_net),
        options=_DELLA,
        neutral={"density": 1.0, "epsilon": 0.0},
        bad=_BAD_DELLA,
        entrywise=True,
    ),
    Case(
        "della_linear",
        None,
        possible=della(None),
        options=_DELLA,
        neutral={"density": 1.0, "epsilon": 0.0},
        bad=_BAD_DELLA,
        entrywise=True,
    ),
    Case(
        "breadcrumbs",
        breadcrumbs,
        options=_BREADCRUMBS,
        neutral={"density": 1.0, "gamma": 0.0},
        bad=_BAD_BREADCRUMBS,
    ),
    Case(
        "breadcrumbs_ties",
        breadcrumbs_ties,
        options=_BREADCRUMBS,
        neutral={"density": 1.0, "gamma": 0.0},
        bad=_BAD_BREADCRUMBS,
    ),
]
