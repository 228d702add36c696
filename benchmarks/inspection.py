"""What can be said of several adapters before they are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import without_nan
from merge_algorithms import Adapter
from merge_algorithms.errors import UserError
from merge_algorithms.factors import stack
from merge_algorithms.similarity import (
    ENTRIES,
    RankUse,
    SignConflicts,
    chance_cosine,
    cosine,
    inner_products,
    rank_use,
    rms_cosine,
    sign_conflicts,
)
from merge_algorithms.task_vectors import align
from osrm import Covariance, interference_matrix, leaked_own_ratio


class Range(NamedTuple):
    """Of the values that are not NaN; NaN if there are none."""

    least: float
    mean: float
    most: float


class Pair(NamedTuple):
    """Two adapters: RMS cosine over the modules, and the range of the cosines."""

    first: str
    second: str
    rms: float
    cosine: Range


@dataclass(frozen=True)
class Inspection:
    """The diagnostics of T adapters of one base model.

    Attributes:
        names: T adapter names.
        norms: Module -> (T,) float64, ||dW_t||_F.
        cosines: Module -> (T, T) float64, NaN where an update is zero.
        chance: RMS cosine that unrelated updates of these shapes have.
        conflicts: Entries that lose the election of their sign.
        ranks: Module -> the rank use of each adapter's update.
        sums: Module -> that of the sum of all updates.
        keep: The rank that `RankUse.kept` refers to.
        interference: (T, T) float64, see `osrm.interference_matrix`; None without covariances.
        leaked_own: T ratios, see `osrm.leaked_own_ratio`; None without covariances.
    """

    names: tuple[str, ...]
    norms: dict[str, Tensor]
    cosines: dict[str, Tensor]
    chance: float
    conflicts: SignConflicts
    ranks: dict[str, tuple[RankUse, ...]]
    sums: dict[str, RankUse]
    keep: int
    interference: Tensor | None
    leaked_own: list[float] | None

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs, the most alike first; those without a common module last."""
        stacked, rms = torch.stack(list(self.cosines.values())), rms_cosine(self.cosines)
        i, j = torch.triu_indices(len(self.names), len(self.names), 1)
        ranges = torch.stack(_ranges(stacked[:, i, j]), 1).tolist()
        pairs = [
            Pair(self.names[first], self.names[second], value, Range(*cosine))
            for first, second, value, cosine in zip(
                i.tolist(), j.tolist(), rms[i, j].tolist(), ranges, strict=True
            )
        ]
        return sorted(pairs, key=lambda pair: math.inf if math.isnan(pair.rms) else -pair.rms)

    def module_cosines(self) -> dict[str, Range]:
        """Module -> the range of the cosines of all pairs."""
        i, j = torch.triu_indices(len(self.names), len(self.names), 1)
        return {module: value_range(values[i, j]) for module, values in self.cosines.items()}

    def adapter_norms(self) -> Tensor:
        """||dW_t||_F over all modules together, (T,) float64."""
        return torch.stack(list(self.norms.values())).square().sum(0).sqrt()

    def adapter_ranks(self, index: int) -> list[RankUse]:
        """The rank use of one adapter in the modules that it has."""
        return [ranks[index] for ranks in self.ranks.values() if ranks[index].available]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON holds it, NaN as null."""
        outvoted, norms = self.conflicts.by_adapter(), self.adapter_norms()
        signs, cosines = self.conflicts.by_module(), self.module_cosines()
        content = {
            "adapters": {
                name: {
                    "norm": float(norms[t]),
                    "outvoted": float(outvoted[t]),
                    "leaked_own_ratio": self.leaked_own[t] if self.leaked_own else None,
                }
                for t, name in enumerate(self.names)
            },
            "rms_cosine": rms_cosine(self.cosines).tolist(),
            "rms_cosine_by_chance": self.chance,
            "interference": None if self.interference is None else self.interference.tolist(),
            "rank_kept": self.keep,
            "rows_share_of_sign_counts": self.conflicts.share,
            "pairs": [pair._asdict() | {"cosine": pair.cosine._asdict()} for pair in self.pairs],
            "modules": {
                module: {
                    "cosine": cosines[module]._asdict(),
                    "cosines": values.tolist(),
                    "norms": self.norms[module].tolist(),
                    "outvoted": signs[module],
                    "ranks": [asdict(use) for use in self.ranks[module]],
                    "sum": asdict(self.sums[module]),
                }
                for module, values in self.cosines.items()
            },
        }
        cleaned = without_nan(content)
        assert isinstance(cleaned, dict)
        return cleaned


def inspect_adapters(
    adapters: Sequence[Adapter],
    covariances: Mapping[str, Covariance] | None = None,
    keep: int | None = None,
    entries: int | None = ENTRIES,
) -> Inspection:
    """All diagnostics of METHODS section 2 that the adapters, and the covariances, allow.

    Args:
        adapters: At least one, all of one base model.
        covariances: Adapter name -> the covariance of its task; more tasks may be there.
        keep: The rank of a truncation whose kept energy is computed; default: the adapters'
            largest.
        entries: See `sign_conflicts`.

    Raises:
        UserError: Adapters that do not belong together, `keep` below 1, or covariances that are
            missing, of one task only, or do not fit the adapters.
    """
    modules = align(adapters).modules
    if keep is None:
        keep = max(update.rank for updates in modules.values() for update in updates)
    if keep < 1:
        raise UserError(f"rank {keep} is not possible: give a rank of at least 1")
    interference, leaked_own = None, None
    if covariances is not None:
        interference = interference_matrix(adapters, covariances)
        leaked_own = [leaked_own_ratio(a, covariances, a.name) for a in adapters]
    products = inner_products(adapters)
    weights = [1.0] * len(adapters)
    return Inspection(
        names=tuple(adapter.name for adapter in adapters),
        norms={module: x.diagonal().sqrt() for module, x in products.items()},
        cosines={module: cosine(x) for module, x in products.items()},
        chance=chance_cosine(adapters),
        conflicts=sign_conflicts(adapters, entries),
        ranks={m: tuple(rank_use(u, keep) for u in updates) for m, updates in modules.items()},
        sums={m: rank_use(stack(updates, weights), keep) for m, updates in modules.items()},
        keep=keep,
        interference=interference,
        leaked_own=leaked_own,
    )


def value_range(values: Tensor) -> Range:
    """The least, the mean and the largest of a vector's values that are not NaN."""
    return Range(*(float(value) for value in _ranges(values)))


def _ranges(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same over the first dimension, NaN where there is no value."""
    if not len(values):
        values = values.new_full((1, *values.shape[1:]), math.nan)
    absent = values.isnan()
    none = absent.all(0)
    least = values.masked_fill(absent, math.inf).amin(0).masked_fill(none, math.nan)
    most = values.masked_fill(absent, -math.inf).amax(0).masked_fill(none, math.nan)
    return least, values.nanmean(0), most
