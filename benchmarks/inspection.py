"""What can be said of several adapters before they are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import without_nan
from benchmarks.subspace_inspection import (
    Decomposed,
    Inside,
    Start,
    chance_overlap,
    column_means,
    overlaps,
    starts,
)
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
from osrm import Covariance, Energies, interference_matrix, leaked_over_own, module_energies

if TYPE_CHECKING:
    from benchmarks.experiments.lora_summation.relation import Prediction, Relation


class Range(NamedTuple):
    """Of the values that are not NaN; NaN if there are none."""

    least: float
    mean: float
    most: float


class Pair(NamedTuple):
    """Two adapters: RMS cosine and range of the cosines over the modules, overlap of the A."""

    first: str
    second: str
    rms: float
    cosine: Range
    overlap: float


class Forecast(NamedTuple):
    """What a relation that was fitted elsewhere expects of summing the adapters."""

    relation: Relation
    predictions: list[Prediction]


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
        overlaps: Module -> (T, T) float64, how much of the smaller span of A is in the larger.
        overlap_chance: What unrelated spans of these dimensions have.
        starts: What is known of each adapter before its training.
        interference: (T, T) float64, see `osrm.interference_matrix`; None without covariances.
        energies: By adapter, see `osrm.module_energies`; None without covariances.
        decomposed: What the covariances' spectra say; None if that was not asked for.
        forecast: None without a fitted relation.
    """

    names: tuple[str, ...]
    norms: dict[str, Tensor]
    cosines: dict[str, Tensor]
    chance: float
    conflicts: SignConflicts
    ranks: dict[str, tuple[RankUse, ...]]
    sums: dict[str, RankUse]
    keep: int
    overlaps: dict[str, Tensor]
    overlap_chance: float
    starts: list[Start]
    interference: Tensor | None
    energies: list[dict[str, Energies]] | None
    decomposed: Decomposed | None
    forecast: Forecast | None = None

    @cached_property
    def leaked_own(self) -> list[float] | None:
        """T ratios, see `osrm.leaked_own_ratio`; None without covariances."""
        if self.energies is None:
            return None
        return [leaked_over_own(found.values()) for found in self.energies]

    @cached_property
    def overlap(self) -> Tensor:
        """Mean over the modules that both have, (T, T) float64."""
        return torch.stack(list(self.overlaps.values())).nanmean(0)

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs, the most alike first; those without a common module last."""
        stacked, rms = torch.stack(list(self.cosines.values())), rms_cosine(self.cosines)
        i, j = torch.triu_indices(len(self.names), len(self.names), 1)
        ranges = torch.stack(_ranges(stacked[:, i, j]), 1).tolist()
        pairs = [
            Pair(self.names[first], self.names[second], value, Range(*cosine), overlap)
            for first, second, value, cosine, overlap in zip(
                *(x.tolist() for x in (i, j, rms[i, j])),
                ranges,
                self.overlap[i, j].tolist(),
                strict=True,
            )
        ]
        return sorted(pairs, key=lambda pair: math.inf if math.isnan(pair.rms) else -pair.rms)

    def module_cosines(self) -> dict[str, Range]:
        """Module -> the range of the cosines of all pairs."""
        return self._over_pairs(self.cosines)

    def module_overlaps(self) -> dict[str, Range]:
        """Module -> the range of the overlaps of all pairs."""
        return self._over_pairs(self.overlaps)

    def _over_pairs(self, matrices: Mapping[str, Tensor]) -> dict[str, Range]:
        i, j = torch.triu_indices(len(self.names), len(self.names), 1)
        return {module: value_range(values[i, j]) for module, values in matrices.items()}

    def adapter_norms(self) -> Tensor:
        """||dW_t||_F over all modules together, (T,) float64."""
        return torch.stack(list(self.norms.values())).square().sum(0).sqrt()

    def adapter_ranks(self, index: int) -> list[RankUse]:
        """The rank use of one adapter in the modules that it has."""
        return [ranks[index] for ranks in self.ranks.values() if ranks[index].available]

    def adapter_energies(self) -> list[Energies] | None:
        """By adapter, means over its modules; None without covariances."""
        if self.energies is None:
            return None
        return [Energies(*column_means(found.values())) for found in self.energies]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON holds it, NaN as null."""
        outvoted, norms = self.conflicts.by_adapter(), self.adapter_norms()
        signs, cosines = self.conflicts.by_module(), self.module_cosines()
        energies, overlap_ranges = self.adapter_energies(), self.module_overlaps()
        inside = self.decomposed and self.decomposed.by_adapter()
        content = {
            "adapters": {
                name: {
                    "norm": float(norms[t]),
                    "outvoted": float(outvoted[t]),
                    "leaked_own_ratio": self.leaked_own[t] if self.leaked_own else None,
                    "leaked_energy": energies[t].leaked if energies else None,
                    "own_energy": energies[t].own if energies else None,
                    "start": self.starts[t]._asdict(),
                    "inside_bottom": inside[t]._asdict() if inside else None,
                }
                for t, name in enumerate(self.names)
            },
            "rms_cosine": rms_cosine(self.cosines).tolist(),
            "rms_cosine_by_chance": self.chance,
            "overlap": self.overlap.tolist(),
            "overlap_by_chance": self.overlap_chance,
            "interference": None if self.interference is None else self.interference.tolist(),
            "inputs": self.decomposed and _inputs(self.decomposed),
            "rank_kept": self.keep,
            "rows_share_of_sign_counts": self.conflicts.share,
            "forecast": self.forecast and _forecast(self.forecast),
            "pairs": [pair._asdict() | {"cosine": pair.cosine._asdict()} for pair in self.pairs],
            "modules": {
                module: {
                    "cosine": cosines[module]._asdict(),
                    "cosines": values.tolist(),
                    "overlap": overlap_ranges[module]._asdict(),
                    "overlaps": self.overlaps[module].tolist(),
                    "energies": self.energies and [_dict(f.get(module)) for f in self.energies],
                    "inside_bottom": self.decomposed
                    and [_dict(f.get(module)) for f in self.decomposed.inside],
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


def _dict(row: Energies | Inside | None) -> dict[str, float] | None:
    return row._asdict() if row is not None else None


def _forecast(forecast: Forecast) -> dict[str, Any]:
    relation, predictions = forecast
    return {
        "measured_on": {"model": relation.model, "tasks": relation.tasks},
        "predictions": [prediction._asdict() for prediction in predictions],
    }


def _inputs(decomposed: Decomposed) -> dict[str, Any]:
    keys = ("effective_rank", "bottom_rank", "bottom_k")
    return {
        "rank": decomposed.rank,
        "k": decomposed.k,
        "tasks": {
            task: dict(zip(keys, means, strict=True))
            for task, means in decomposed.by_task().items()
        },
        "modules": {
            task: {
                module: dict(zip(keys, (found.effective_rank, *found.bottom), strict=True))
                for module, found in modules.items()
            }
            for task, modules in decomposed.spectra.items()
        },
    }


def inspect_adapters(
    adapters: Sequence[Adapter],
    covariances: Mapping[str, Covariance] | None = None,
    keep: int | None = None,
    entries: int | None = ENTRIES,
    *,
    initial: Sequence[Adapter] = (),
) -> Inspection:
    """All diagnostics that the adapters, and the covariances, allow at once.

    `Inspection.decomposed` takes longer: `replace(inspection, decomposed=decompose(...))`.

    Args:
        adapters: At least one, all of one base model.
        covariances: Adapter name -> the covariance of its task; more tasks may be there.
        keep: The rank of a truncation whose kept energy is computed; default: the adapters'
            largest.
        entries: See `sign_conflicts`.
        initial: Adapters of the same names as they were before training, as far as they are there;
            of the others osrm.json may record how they started.

    Raises:
        UserError: Adapters that do not belong together, `keep` below 1, covariances that are
            missing, of one task only, or do not fit the adapters, or a start that fits none.
    """
    modules = align(adapters).modules
    if keep is None:
        keep = max(update.rank for updates in modules.values() for update in updates)
    if keep < 1:
        raise UserError(f"rank {keep} is not possible: give a rank of at least 1")
    interference, energies = None, None
    known = starts(adapters, initial, covariances)
    if covariances is not None:
        interference = interference_matrix(adapters, covariances)
        energies = [module_energies(a, covariances, a.name) for a in adapters]
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
        overlaps=overlaps(modules),
        overlap_chance=chance_overlap(modules),
        starts=known,
        interference=interference,
        energies=energies,
        decomposed=None,
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
