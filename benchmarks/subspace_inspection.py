"""What an inspection says of the subspaces that adapters read, and of the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_algorithms import Adapter, LowRank
from merge_algorithms.errors import UserError, suggest
from osrm import (
    Covariance,
    InputSpectrum,
    adapter_leaked_energy,
    drift,
    input_spectra,
    overlap_matrix,
    subspace_state,
)


class Start(NamedTuple):
    """An adapter when its training began; NaN where nothing says it.

    Attributes:
        leaked: Leaked energy of A then, see `osrm.adapter_leaked_energy`.
        drift_mean: By how much the span of A has turned since, the mean over all principal angles
            of all modules, in radians.
        drift_max: The largest of these angles.
    """

    leaked: float
    drift_mean: float
    drift_max: float


class Inside(NamedTuple):
    """Share of A's span inside the bottom subspaces of the other tasks' inputs.

    Attributes:
        rank: Inside that of as many directions as A has rows: what OSRM starts A with.
        k: Inside that of `Decomposed.k` directions: where the constraint `project` keeps it.
    """

    rank: float
    k: float


@dataclass(frozen=True)
class Decomposed:
    """What it takes a decomposition of the covariances to know.

    Attributes:
        rank: The largest rank of the adapters.
        k: Dimension of the larger subspace.
        spectra: Task -> module -> its inputs' effective rank, and the energy in the bottom `rank`
            and the bottom `k` directions.
        inside: By adapter: module -> where its A is.
    """

    rank: int
    k: int
    spectra: dict[str, dict[str, InputSpectrum]]
    inside: list[dict[str, Inside]]

    def by_task(self) -> dict[str, tuple[float, ...]]:
        """Task -> effective rank, energy in the bottom `rank` and `k`: means over the modules."""
        return {
            task: column_means((s.effective_rank, *s.bottom) for s in modules.values())
            for task, modules in self.spectra.items()
        }

    def by_adapter(self) -> list[Inside]:
        """Means over the modules."""
        return [Inside(*column_means(found.values())) for found in self.inside]


def column_means(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """The mean of every column, over the rows that are not NaN there."""
    return tuple(torch.tensor([*rows], dtype=torch.float64).nanmean(0).tolist())


def decompose(
    adapters: Sequence[Adapter],
    covariances: Mapping[str, Covariance],
    k: int,
    progress: bool = False,
) -> Decomposed:
    """Spectra of all tasks' inputs, and the bottom subspaces of all adapters' other tasks.

    Args:
        adapters: Named as their tasks.
        covariances: Task name -> its covariance; at least one besides each adapter's.
        k: Dimension of the larger subspace, raised to the rank if it is below, and lowered to the
            width of the narrowest module.
        progress: Show progress bars.

    Raises:
        UserError: k is below 1.
    """
    if k < 1:
        raise UserError(f"k {k} is not possible: give a dimension of at least 1")
    widths = [len(mean) for cov in covariances.values() for mean in cov.means.values()]
    rank = max(update.rank for adapter in adapters for update in adapter.updates.values())
    k = min(max(k, rank), min(widths))
    inside = []
    for adapter in adapters:
        bottom = subspace_state(covariances, adapter.name, 1, k=k, progress=progress)
        inside.append(
            {m: _inside(update, bottom[m]) for m, update in sorted(adapter.updates.items())}
        )
    return Decomposed(rank, k, input_spectra(covariances, (rank, k), progress), inside)


def _inside(update: LowRank, bottom: Tensor) -> Inside:
    """Bottom: (k, d_in), of which the first r are the bottom r."""
    shares = overlap_matrix([update.a, bottom[: update.rank], bottom])[0, 1:]
    return Inside(*shares.tolist())


def starts(
    adapters: Sequence[Adapter],
    initial: Sequence[Adapter],
    covariances: Mapping[str, Covariance] | None,
) -> list[Start]:
    """Every adapter when its training began: from `initial`, or as its osrm.json records it.

    Args:
        adapters: As they are.
        initial: Some of them, under the same names, as they were before training.
        covariances: As for `decompose`.

    Raises:
        UserError: `initial` names no adapter or one twice, or does not fit it.
    """
    names = [adapter.name for adapter in adapters]
    before: dict[str, Adapter] = {}
    for adapter in initial:
        if adapter.name not in names:
            raise UserError(
                f"there is a start of '{adapter.name}', which is no adapter here:"
                f" {suggest(adapter.name, names)}"
            )
        if adapter.name in before:
            raise UserError(f"there are two starts of '{adapter.name}': give one")
        before[adapter.name] = adapter
    return [
        _compared(adapter, before[adapter.name], covariances)
        if adapter.name in before
        else _recorded(adapter.info)
        for adapter in adapters
    ]


def _compared(
    adapter: Adapter, initial: Adapter, covariances: Mapping[str, Covariance] | None
) -> Start:
    missing = sorted(set(adapter.updates) ^ set(initial.updates))
    if missing:
        raise UserError(
            f"only one of '{adapter.name}' and its start has the module {missing[0]}: give the"
            " same adapter as it was before training"
        )
    angles = torch.cat([drift(initial.updates[m].a, u.a) for m, u in adapter.updates.items()])
    leaked = adapter_leaked_energy(initial, covariances, adapter.name) if covariances else nan
    return Start(leaked, float(angles.mean()), float(angles.max()))


def _recorded(info: Mapping[str, Any]) -> Start:
    found = info.get("diagnostics")
    values = found if isinstance(found, dict) else {}
    keys = ("leaked_before", "drift_mean", "drift_max")
    given = (values.get(key) for key in keys)
    return Start(*(float(x) if isinstance(x, int | float) else nan for x in given))


def overlaps(modules: Mapping[str, Sequence[LowRank]]) -> dict[str, Tensor]:
    """Module -> (T, T) float64, the overlap of the spans of A of every pair; NaN without one."""
    return {
        module: overlap_matrix([update.a if update.rank else None for update in updates])
        for module, updates in modules.items()
    }


def chance_overlap(modules: Mapping[str, Sequence[LowRank]]) -> float:
    """What unrelated spans of these dimensions have: the mean over pairs of max(r, s) / d_in."""
    expected = [
        max(first.rank, second.rank) / first.shape[1]
        for updates in modules.values()
        for i, first in enumerate(updates)
        for second in updates[:i]
        if first.rank and second.rank
    ]
    return sum(expected) / len(expected) if expected else nan
