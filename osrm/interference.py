"""How much adapters disturb each other's tasks, in factors: no (d_out, d_in) update is formed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.errors import UserError, suggest
from osrm.covariance import Covariance, check_compatible
from osrm.others import leave_one_out


def output_shift(update: LowRank, cov: Tensor) -> float:
    """E ||dW h||^2 over inputs with second moment C: tr((B^T B)(A C A^T)).

    Args:
        update: dW = B A, the LoRA scale already in B.
        cov: C, (d_in, d_in). With the other tasks' S this is the leaked energy of the update.

    Raises:
        UserError: the widths differ.
    """
    _check_width(update, cov)
    a, ga = _output_energy(update)
    return float(((a @ cov.double().cpu()) * ga).sum())


def interference_matrix(
    adapters: Sequence[Adapter], covariances: Mapping[str, Covariance]
) -> Tensor:
    """What each adapter does to each task, relative to what it does to its own.

    Args:
        adapters: One per task, named as the task.
        covariances: Task name -> its covariance, for every adapter's name.

    Returns:
        (T, T) float64. Entry [i, j] = sum over modules of E_j ||dW_i h||^2 divided by the same on
        i's own data, so the diagonal is 1. Row i is NaN if adapter i does nothing on its own data
        (B is still zero).

    Raises:
        UserError: a task has no covariance, or the covariances do not fit the adapters.
    """
    shifts = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    own = [_covariance_of(covariances, adapter.name) for adapter in adapters]
    check_compatible(own)
    readers: dict[str, list[tuple[int, LowRank]]] = defaultdict(list)
    for i, adapter in enumerate(adapters):
        for module, update in adapter.updates.items():
            _check_width(update, own[0].matrix(module))
            readers[own[0].modules[module]].append((i, update))
    for key, updates in readers.items():
        factors = [_output_energy(update) for _, update in updates]
        a, ga = (torch.cat(parts) for parts in zip(*factors, strict=True))
        rows = torch.tensor([i for i, update in updates for _ in range(update.rank)])
        for j, covariance in enumerate(own):
            energies = ((a @ covariance.matrices[key].double()) * ga).sum(1)
            shifts[:, j].index_add_(0, rows, energies)
    return shifts / shifts.diagonal()[:, None]


class Energies(NamedTuple):
    """What one module of an adapter lets through of the other tasks' inputs and of its own.

    Attributes:
        leaked: tr(A S A^T) / ||A||_F^2, S the mean of the others; NaN if A is zero.
        own: The same with C_t.
        leaked_shift: E ||dW h||^2 over the others' inputs.
        own_shift: The same over the task's own.
    """

    leaked: float
    own: float
    leaked_shift: float
    own_shift: float


def module_energies(
    adapter: Adapter, covariances: Mapping[str, Covariance], task: str
) -> dict[str, Energies]:
    """Leaked and own energy of A and of the update, for every module of the adapter.

    Raises:
        UserError: as `leaked_own_ratio`.
    """
    found = {}
    for module, others, own in _moments(covariances, task, adapter.updates):
        update = adapter.updates[module]
        shifts = output_shift(update, others), output_shift(update, own)
        through = [leaked_energy(update.a, c) if update.a.any() else nan for c in (others, own)]
        found[module] = Energies(through[0], through[1], *shifts)
    return found


def leaked_own_ratio(adapter: Adapter, covariances: Mapping[str, Covariance], task: str) -> float:
    """Mean output shift on the other tasks' data over the shift on the task's own data.

    sum_{u != t} E_u ||dW_t h||^2 / ((T - 1) E_t ||dW_t h||^2), both summed over modules: the mean
    of the off-diagonal entries of row t of `interference_matrix`. NaN if B is still zero.

    Raises:
        UserError: the task has no covariance, is the only one, or does not fit the adapter.
    """
    return leaked_over_own(module_energies(adapter, covariances, task).values())


def leaked_over_own(energies: Collection[Energies]) -> float:
    """`leaked_own_ratio` from what `module_energies` found."""
    own = sum(energy.own_shift for energy in energies)
    return sum(energy.leaked_shift for energy in energies) / own if own > 0 else nan


def leaked_energy(a: Tensor, cov: Tensor) -> float:
    """Energy that A lets through, tr(A S A^T) / ||A||_F^2, of inputs with second moment S.

    Args:
        a: (r, d) LoRA A. Its scale does not matter.
        cov: S, (d, d): of the other tasks for leaked energy, of the task itself for own energy.

    Raises:
        UserError: the widths differ, or A is zero.
    """
    if a.ndim != 2 or cov.shape != (a.shape[1], a.shape[1]):
        raise UserError(
            f"A has shape {tuple(a.shape)} and the covariance {tuple(cov.shape)}: expected (r, d)"
            " and (d, d), they are of different modules or models"
        )
    a, cov = a.detach().double().cpu(), cov.double().cpu()
    norm = a.square().sum()
    if norm == 0:
        raise UserError("A is zero: it has no leaked energy, start it with another initialisation")
    return float(((a @ cov) * a).sum() / norm)


def adapter_leaked_energy(
    adapter: Adapter | Mapping[str, Tensor], covariances: Mapping[str, Covariance], task: str
) -> float:
    """Leaked energy tr(A S A^T) / ||A||_F^2 of the other tasks' inputs, mean over modules.

    Args:
        adapter: An adapter, or its A factors alone: module name -> (r, d_in), as `lora_a` returns.
        covariances: Task name -> its covariance.
        task: The adapter's task; S is the mean of the others.

    Raises:
        UserError: the task has no covariance, is the only one, or does not fit the adapter.
    """
    if isinstance(adapter, Adapter):
        adapter = {module: update.a for module, update in adapter.updates.items()}
    energies = [
        leaked_energy(adapter[module], others)
        for module, others, _ in _moments(covariances, task, adapter)
    ]
    if not energies:
        raise UserError(f"the adapter of task '{task}' has no module: load it again")
    return sum(energies) / len(energies)


def _output_energy(update: LowRank) -> tuple[Tensor, Tensor]:
    """A and B^T B A, both (r, d_in) float64: E ||dW h||^2 is the sum of (A C) * (B^T B A)."""
    a, b = update.a.detach().double().cpu(), update.b.detach().double().cpu()
    return a, b.T @ b @ a


def _check_width(update: LowRank, cov: Tensor) -> None:
    width = update.shape[1]
    if cov.shape != (width, width):
        raise UserError(
            f"an update that reads {width} features and a covariance of shape {tuple(cov.shape)}:"
            " they are of different modules or models"
        )


def _covariance_of(covariances: Mapping[str, Covariance], task: str) -> Covariance:
    if task not in covariances:
        raise UserError(f"there is no covariance of task '{task}'; {suggest(task, covariances)}")
    return covariances[task]


def _moments(
    covariances: Mapping[str, Covariance], task: str, modules: Collection[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, S, C_t), holding the moments of one key at a time."""
    own_covariance = _covariance_of(covariances, task)
    for module in modules:
        own_covariance.matrix(module)  # raises, with the nearest name, if there is none
    for key, others, own in leave_one_out(covariances, task):
        for module, its_key in own_covariance.modules.items():
            if its_key == key and module in modules:
                yield module, others, own
