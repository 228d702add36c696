"""From covariances to the subspace of one task, for all modules at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from merge_algorithms.errors import UserError, suggest
from osrm.covariance import Covariance
from osrm.others import mean_moment, shares
from osrm.side_by_side import side_by_side
from osrm.solvers import Solver, null_level, times
from osrm.subspace import bottom_subspace, contrastive_rows, official_subspace

Mode = Literal["osrm", "official", "contrastive"]
Scale = Literal["unit", "matched"]


def subspace_state(
    covariances: Mapping[str, Covariance],
    task: str,
    rank: int,
    mode: Mode = "osrm",
    k: int | None = None,
    *,
    energy: float | None = None,
    scale: Scale = "unit",
    weights: Mapping[str, float] | None = None,
    rho: float = 0.05,
    solver: Solver = "auto",
    progress: bool = False,
) -> dict[str, Tensor]:
    """The subspace of every module in which `task` disturbs the other tasks least.

    Solves once for all modules that read the same input; the solves run side by side, as many as
    torch has threads, each on one.

    A task that arrives when others are trained already needs their sum only: `+` pools stored
    covariances by their tokens, and {"new": own, "earlier": a + b + c} is all there is to give; it
    weighs three times as much as a task that is not in the pool.

    Args:
        covariances: Task name -> its covariance; `task` among them (it settles ties, and decides
            in mode 'contrastive' and scale 'matched') and at least one other.
        task: The task that is going to be trained.
        rank: LoRA rank r.
        mode: 'osrm' is the paper (arXiv 2505.22934, section 3.2), see `bottom_subspace`;
            'official' the released code, see `official_subspace`; 'contrastive' takes the own
            task's energy into account, see `contrastive_subspace`.
        k: Rows to return, at least r: the first r initialise A, all k span the subspace of the
            constraint 'project'. Default r.
        energy: Instead of k, a budget: each module gets the largest k, at least r, whose rows V
            let through at most this share of the others' energy, tr(V S V^T) <= energy tr(S).
        scale: 'unit' rows have length 1 (the paper). 'matched' rows all have the length at which
            the first r let through as much own-task energy as PEFT's default initialisation does
            in expectation, tr(A C_t A^T) = r tr(C_t) / (3 d_in): gradients of B, and so the speed
            of learning, are then those of plain LoRA.
        weights: Other task -> its weight c_u in S, normalised to sum 1; those not named weigh 1,
            a pool as many as the tasks in it.
        rho: Damping of mode 'contrastive'.
        solver: See `bottom_subspace`.
        progress: Show a progress bar.

    Returns:
        Module name -> (k, d_in) float32, orthogonal rows of equal length.

    Raises:
        UserError: unknown task, mode, scale or solver, no other task, covariances of different
            models or of fewer tokens than the rank, k < rank, k above the width of a module, own
            energy in fewer directions than mode 'contrastive' has to fill or none to match.
    """
    choices = (("mode", mode, Mode), ("scale", scale, Scale), ("solver", solver, Solver))
    for what, value, known in choices:
        if value not in get_args(known):
            raise UserError(f"unknown subspace {what} '{value}'; {suggest(value, get_args(known))}")
    if mode == "official" and weights:
        raise UserError("mode 'official' stacks the other tasks' means: leave the weights out")
    of = shares(covariances, task, weights)
    own = covariances[task]
    if k is not None and energy is not None:
        raise UserError("both k and an energy budget are given: leave one of them out")
    if energy is not None and not 0 < energy < 1:
        raise UserError(f"the energy budget is {energy}: give a share between 0 and 1")
    rows = rank if k is None else k
    if rows < rank:
        raise UserError(f"k is {rows}, below the rank {rank}: the subspace must hold all rows of A")
    _check_sizes(covariances, task, of, rank, rows, mode)

    def solve(key: str) -> Tensor:
        mine = own.matrices[key]
        leaked = mean_moment(covariances, of, key)
        means = torch.stack([covariances[name].means[key] for name in of])
        # Outside of what sketches hold, S is level but for rounding, which must not choose there:
        # without that level it is a null space, with the same eigenvectors.
        level = sum(share * covariances[name].remainder(key) for name, share in of.items())

        def subspace(count: int) -> Tensor:
            if mode == "osrm":
                eye = torch.eye(len(leaked), dtype=leaked.dtype, device=leaked.device)
                return bottom_subspace(
                    leaked - level * eye if level else leaked, count, mine, solver
                )
            if mode == "official":
                return official_subspace(means, count)
            return contrastive_rows(mine, leaked, count, rho, solver)

        try:
            found = subspace(rows) if energy is None else _within(subspace, leaked, rank, energy)
            if len(found) < rows:
                raise UserError(
                    f"the own task has energy in {len(found)} directions, fewer than the {rows}"
                    f" rows asked for: collect its covariance from more data or choose a smaller"
                    f" {'rank' if rows == rank else 'k'}"
                )
            return found if scale == "unit" else found * _matched(found[:rank], mine)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error

    widths = {key: len(mean) for key, mean in own.means.items()}
    solved = side_by_side(solve, widths, "Subspaces" if progress else None)
    # A tensor each, although some are equal: safetensors does not save shared memory.
    return {module: solved[key].clone() for module, key in own.modules.items()}


def _check_sizes(
    covariances: Mapping[str, Covariance],
    task: str,
    others: Mapping[str, float],
    rank: int,
    k: int,
    mode: Mode,
) -> None:
    own = covariances[task]
    for module, key in own.modules.items():
        if k > len(own.means[key]):
            raise UserError(
                f"{module} reads {len(own.means[key])} features, fewer than the"
                f" {k} rows asked for: choose a smaller {'rank' if k == rank else 'k'}"
            )
        for name in [task, *others]:
            tokens = covariances[name].counts[key]
            if mode != "official" and tokens < rank:
                raise UserError(
                    f"the covariance of task '{name}' is over {tokens} tokens at {module}, fewer"
                    f" than the rank {rank}: collect it from more rows"
                )


def _within(subspace: Callable[[int], Tensor], leaked: Tensor, rank: int, energy: float) -> Tensor:
    """The first rows that stay within the budget, at least `rank`; asks for few rows first."""
    count = 4 * rank
    while True:
        count = min(count, len(leaked))
        rows = subspace(count)
        wide = rows.double()
        through = (times(leaked, wide.T) * wide.T).sum(0).cumsum(0)
        fits = int((through <= energy * leaked.trace()).sum())
        if fits < count or count == len(leaked):
            return rows[: max(rank, fits)]
        count *= 4


def _matched(rows: Tensor, own: Tensor) -> float:
    """The length of A's rows at which own energy is that of PEFT's uniform initialisation.

    Its entries have variance 1 / (3 d_in), so E tr(A C A^T) = r tr(C) / (3 d_in).
    """
    rank, d = rows.shape
    wide = rows.double()
    found = float((times(own, wide.T) * wide.T).sum())
    if found <= rank * null_level(own):
        raise UserError(
            f"the {rank} rows let nothing of the own task's inputs through, so no length of theirs"
            " matches plain LoRA: use scale 'unit' or mode 'contrastive'"
        )
    return (rank * float(own.trace()) / (3 * d) / found) ** 0.5
