"""What the contract knows of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from merge_algorithms import Adapter

# {module: dense updates of T tasks (T, d_out, d_in)}, weights (T,), options -> merged updates
Dense = dict[str, Tensor]
Oracle = Callable[..., Dense]
# adapters -> {adapter name: {module: statistic}}, the same for the same names and shapes
Statistics = Callable[[Sequence[Adapter]], Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Case:
    """A method under contract.

    oracle: the paper's formula; None where masks are drawn, which `possible` covers.
    possible: what a merge with drawn masks can be: {module: (candidates, d_out, d_in)}, every row
        of the merge being that row of one candidate.
    options: settings to run it in, each compared with the oracle. A list has one entry for each
        of four adapters; fewer adapters take its beginning.
    neutral: options at which one adapter of weight 1 comes out as it went in.
    bad: options that are refused.
    count: how many adapters the method takes, if not any number.
    entrywise: candidates hold for every entry by itself instead of every row.
    statistics: what the method reads of each adapter's data; the oracle gets it as the keyword
        `statistics`, {module: (T, ...) float64}.
    """

    method: str
    oracle: Oracle | None
    possible: Oracle | None = None
    options: Sequence[dict[str, Any]] = ({},)
    neutral: dict[str, Any] = field(default_factory=dict)
    bad: Sequence[dict[str, Any]] = ()
    count: int | None = None
    entrywise: bool = False
    statistics: Statistics | None = None


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
