"""What the contract knows of each method: its formula, in dense float64, and neutral options.

A new method is registered and gets one entry in CASES; every test of the contract then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from merge_algorithms import Adapter, LowRank

# {module: dense updates of T tasks (T, d_out, d_in)}, weights (T,), options -> merged updates
Dense = dict[str, Tensor]
Oracle = Callable[..., Dense]


def task_arithmetic(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) for m, x in dense.items()}


def average(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) / w.sum() for m, x in dense.items()}


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


def disjoint_rows(dense: Dense, w: Tensor, drop_rates: Sequence[float] | None = None) -> Dense:
    """Rows of w_t / (1 - p_t) dW_t (arXiv 2510.03262), and the row that no adapter owns."""
    count = len(w)
    kept = 1 - torch.tensor(drop_rates or [1 - 1 / count] * count, dtype=torch.float64)
    scaled = {m: (w / kept)[:, None, None] * x for m, x in dense.items()}
    if drop_rates is None:
        return scaled
    return {m: torch.cat([x, torch.zeros_like(x[:1])]) for m, x in scaled.items()}


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


@dataclass(frozen=True)
class RuntimeCase:
    """A run-time method under contract.

    possible: (w_t o_t (T, ...), 1 - p_t (T,)) -> what an element of its output can be (K, ...).
    options: as in Case, for four adapters.
    """

    method: str
    possible: Callable[[Tensor, Tensor], Tensor]
    options: Sequence[dict[str, Any]] = ({},)
    bad: Sequence[dict[str, Any]] = ()


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


@dataclass(frozen=True)
class Case:
    """A method under contract.

    oracle: the paper's formula; None where masks are drawn, which `possible` covers.
    possible: what a merge with drawn masks can be: {module: (candidates, d_out, d_in)}, every row
        of the merge being that row of one candidate.
    options: settings to run it in, each compared with the oracle. A list has one entry for each
        of four adapters; fewer adapters take its beginning.
    neutral: options at which one adapter of weight 1 comes out as it went in.
    """

    method: str
    oracle: Oracle | None
    possible: Oracle | None = None
    options: Sequence[dict[str, Any]] = ({},)
    neutral: dict[str, Any] = field(default_factory=dict)
    bad: Sequence[dict[str, Any]] = ()


CASES = [
    Case("task_arithmetic", task_arithmetic),
    Case("average", average),
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
    Case(
        "orthogonal_mc_dropout",
        None,
        possible=disjoint_rows,
        options=({}, _UNEQUAL),
        bad=[*_BAD_RATES, {"drop_rates": [0.1, 0.2]}],
    ),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda case: case.method)
    if "runtime_case" in metafunc.fixturenames:
        metafunc.parametrize("runtime_case", RUNTIME_CASES, ids=lambda case: case.method)


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    return CASES


@pytest.fixture(scope="session")
def runtime_cases() -> list[RuntimeCase]:
    return RUNTIME_CASES


@st.composite
def _adapters(draw: st.DrawFn, most: int = 4, dtype: torch.dtype = torch.float32) -> list[Adapter]:
    """Adapters of one model: own ranks, own target modules, own magnitudes."""
    size = st.integers(2, 9)
    shapes = draw(
        st.dictionaries(
            st.sampled_from(["h.0.q", "h.0.v", "h.1.q", "h.10.q"]),
            st.tuples(size, size),
            min_size=1,
            max_size=3,
        )
    )
    count = draw(st.integers(1, most))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    adapters = []
    for t in range(count):
        magnitude = 10.0 ** draw(st.integers(-3, 1))
        targets = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        updates = {}
        for module in sorted(targets):
            d_out, d_in = shapes[module]
            rank = draw(st.integers(1, 4))
            b = torch.randn(d_out, rank, generator=numbers, dtype=dtype)
            a = torch.randn(rank, d_in, generator=numbers, dtype=dtype)
            updates[module] = LowRank(b * magnitude, a)
        adapters.append(Adapter(f"task{t}", updates))
    return adapters


@pytest.fixture(scope="session")
def adapters_strategy() -> Callable[..., st.SearchStrategy[list[Adapter]]]:
    return _adapters


@pytest.fixture(scope="session")
def dense_updates() -> Callable[[Sequence[Adapter]], Dense]:
    """{module: (T, d_out, d_in) float64}, zeros where an adapter lacks the module."""

    def dense(adapters: Sequence[Adapter]) -> Dense:
        shapes = {m: u.shape for a in adapters for m, u in a.updates.items()}
        return {
            m: torch.stack(
                [
                    a.updates[m].b.double() @ a.updates[m].a.double()
                    if m in a.updates
                    else torch.zeros(shapes[m], dtype=torch.float64)
                    for a in adapters
                ]
            )
            for m in sorted(shapes)
        }

    return dense
