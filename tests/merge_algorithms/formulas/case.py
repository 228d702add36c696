"""What the contract knows of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from merge_algorithms import Adapter, LowRank

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
    entrywise: candidates hold for every entry by itself instead of every row.
    statistics: what the method reads of each adapter's data; the oracle gets it as the keyword
        `statistics`, {module: (T, ...) float64}.
    weighted: whether adapters have weights; a method without refuses any but 1.
    reverse: for methods between a first and a second adapter: options to the options that mean
        the same with the two in the other order.
    prepare: what one adapter's updates have to be made into for the method to reproduce them, if
        not any adapter is (a method that flattens spectra reproduces flat ones).
    coordinates: (dense updates, merge) -> the merge in the coordinates that `possible` speaks of,
        if these are not the merge's own.
    """

    method: str
    oracle: Oracle | None
    possible: Oracle | None = None
    options: Sequence[dict[str, Any]] = ({},)
    neutral: dict[str, Any] = field(default_factory=dict)
    bad: Sequence[dict[str, Any]] = ()
    entrywise: bool = False
    statistics: Statistics | None = None
    weighted: bool = True
    reverse: Callable[[dict[str, Any]], dict[str, Any]] = dict
    prepare: Callable[[LowRank], LowRank] | None = None
    coordinates: Callable[[Dense, Dense], Dense] | None = None


@dataclass(frozen=True)
class RuntimeCase:
    """A run-time method under contract.

    possible: (w_t o_t (T, ...), 1 - p_t (T,)) -> what an element of its output can be (K, ...);
        None where the whole output is known, which `oracle` covers.
    options: as in Case, for four adapters.
    oracle: the paper's formula for the update that a module's input is multiplied by.
    required: adapters -> the options that every run must have, the same in any order of them.
    """

    method: str
    possible: Callable[[Tensor, Tensor], Tensor] | None
    options: Sequence[dict[str, Any]] = ({},)
    bad: Sequence[dict[str, Any]] = ()
    oracle: Oracle | None = None
    required: Callable[[Sequence[Adapter]], dict[str, Any]] = lambda adapters: {}


def arranged(options: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Options of a case for the adapters with these numbers, in this order."""
    return {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in options.items()}
