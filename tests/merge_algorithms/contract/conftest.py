"""The methods under contract, and random adapters for them.

A new method gets one entry in CASES of its family in ../formulas; every test then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import pytest
import torch
from formulas import data_aware, dropout, elementwise, emr, linear, subspace
from formulas.case import Case, Dense, RuntimeCase

from merge_algorithms import Adapter, LowRank

# One module for each family; a new one is added here.
FAMILIES = (linear, elementwise, dropout, emr, data_aware, subspace)
CASES: list[Case] = [case for family in FAMILIES for case in family.CASES]
RUNTIME_CASES: list[RuntimeCase] = [
    case for family in FAMILIES for case in getattr(family, "RUNTIME_CASES", [])
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
def _adapters(
    draw: st.DrawFn, least: int = 1, most: int = 4, dtype: torch.dtype = torch.float32
) -> list[Adapter]:
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
    count = draw(st.integers(least, most))
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
