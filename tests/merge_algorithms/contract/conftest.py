"""What the contract knows of each method: its formula, in dense float64, and neutral options.

A new method is registered and gets one entry in CASES; every test of the contract then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
            smallest = part.abs().sort(descending=True).values[max(1, int(density * len(part))) - 1]
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


@dataclass(frozen=True)
class Case:
    """A method under contract.

    oracle: the paper's formula; None where the masks are drawn (tested apart from the contract).
    options: settings to run it in, each compared with the oracle.
    neutral: options at which one adapter of weight 1 comes out as it went in.
    """

    method: str
    oracle: Oracle | None
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
        bad=({"drop_rates": [2.0]}, {"drop_rates": [float("nan")]}, {"drop_rates": []}),
    ),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda case: case.method)


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    return CASES


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
