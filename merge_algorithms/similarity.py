"""How alike the updates of several adapters are, and how much rank they use, before any merge.

Inner products and spectra come from the factors: with dW_t = B_t A_t,
<dW_i, dW_j> = tr((B_j^T B_i)(A_i A_j^T)) and no (d_out, d_in) matrix is formed. Only signs are a
matter of single entries; they are counted by row tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.factors import cancels, numerical_rank
from merge_algorithms.task_vectors import TaskVectors, align
from merge_algorithms.tiles import row_tiles

# Entries of all adapters together that `sign_conflicts` looks at by default.
ENTRIES = 2**26


def inner_products(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """<dW_i, dW_j> of every pair of adapters in every module, in O(d r^2) a pair.

    Args:
        adapters: T adapters of one base model, of any ranks. A module that one of them lacks is
            a zero update there.

    Returns:
        {module: (T, T) float64}, symmetric; the diagonal holds squared Frobenius norms. An update
        whose norm is lost in the float32 rounding of its factors counts as zero.

    Raises:
        UserError: Adapters that do not belong together, see `merge`.
    """
    return {module: gram(updates) for module, updates in align(adapters).modules.items()}


def cosines(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """<dW_i, dW_j> / (||dW_i|| ||dW_j||), {module: (T, T) float64}; see `cosine`."""
    return {module: cosine(products) for module, products in inner_products(adapters).items()}


def cosine(products: Tensor) -> Tensor:
    """The cosines that belong to a module's inner products, (T, T) to (T, T).

    A zero update has no direction: its row and column are NaN, not 0, so that a mean over modules
    is one over those that both adapters change.
    """
    lengths = products.diagonal().sqrt()
    lengths = lengths.where(lengths > 0, math.nan)
    result = (products / lengths[:, None] / lengths).clamp(-1, 1)
    result.diagonal().copy_(lengths / lengths)
    return result


def rms_cosine(cosines: Mapping[str, Tensor]) -> Tensor:
    """The root of the mean over modules of the squared cosine (arXiv 2508.11985), (T, T) float64.

    The mean is over the modules where both updates are not zero; NaN where there is none.

    Args:
        cosines: What `cosines` returns.
    """
    return torch.stack(list(cosines.values())).square().nanmean(0).sqrt()


def chance_cosine(adapters: Sequence[Adapter]) -> float:
    """The RMS cosine to expect of unrelated updates: sqrt(mean over modules of 1/(d_out d_in)).

    Whatever their ranks and singular values, as long as one's singular vectors are turned at
    random against the other's.
    """
    shapes = [updates[0].shape for updates in align(adapters).modules.values()]
    return math.sqrt(sum(1 / (d_out * d_in) for d_out, d_in in shapes) / len(shapes))


@dataclass(frozen=True)
class SignConflicts:
    """How often an adapter's entries lose the election of their sign.

    Attributes:
        outvoted: Module -> (T,) int64, the entries whose sign is not that of sum_t dW_t.
        nonzero: Module -> (T,) int64, the entries that are not 0.
        share: Share of the rows that was looked at; 1 if the counts are exact.
    """

    outvoted: dict[str, Tensor]
    nonzero: dict[str, Tensor]
    share: float

    def by_module(self) -> dict[str, float]:
        """Share of the adapters' non-zero entries that are outvoted; NaN if there is none."""
        return {m: float(_ratio(n.sum(), self.nonzero[m].sum())) for m, n in self.outvoted.items()}

    def by_adapter(self) -> Tensor:
        """The same for every adapter over all modules, (T,) float64."""
        counts = (torch.stack(list(c.values())).sum(0) for c in (self.outvoted, self.nonzero))
        return _ratio(*counts)


def sign_conflicts(
    adapters: Sequence[Adapter], entries: int | None = ENTRIES, seed: int = 0
) -> SignConflicts:
    """Count the entries that the sign election of TIES (arXiv 2306.01708, section 3) outvotes.

    Nothing is trimmed: every non-zero entry of dW_t votes for sgn(sum_t dW_t), where a sum of
    exactly 0 elects +. Two unrelated adapters of equal norm conflict in 1/4 of their entries,
    many of them in up to 1/2.

    Args:
        adapters: T adapters of one base model.
        entries: Look at no more than about so many entries of all adapters together: the same
            share of rows of every module, drawn by the seed. None looks at all of them.
        seed: Decides which rows.

    Raises:
        UserError: Adapters that do not belong together, or `entries` below 1.
    """
    if entries is not None and entries < 1:
        raise UserError(f"entries={entries} leaves nothing to look at: give at least 1, or None")
    tasks = align(adapters, seed=seed)
    every = sum(len(updates) * math.prod(updates[0].shape) for updates in tasks.modules.values())
    share = 1.0 if entries is None else min(1.0, entries / every)
    outvoted, nonzero = {}, {}
    for module in tasks.modules:
        outvoted[module], nonzero[module] = _count_signs(_sampled(tasks, module, share))
    return SignConflicts(outvoted, nonzero, share)


@dataclass(frozen=True)
class RankUse:
    """How much of the rank it has an update uses.

    Attributes:
        available: The most that its shape and its factors allow, min(r, d_out, d_in).
        numerical: Singular values that are not lost in float32, see `factors.numerical_rank`.
        effective: exp of the entropy of the singular values as shares of their sum (Roy and
            Vetterli, The effective rank, EUSIPCO 2007): r if all are equal, 1 if one is left.
            0 for a zero update.
        kept: Share of ||dW||_F^2 in the `keep` largest: what a truncation to that rank keeps.
            NaN for a zero update.
    """

    available: int
    numerical: int
    effective: float
    kept: float


def rank_use(update: LowRank, keep: int) -> RankUse:
    """The use of rank of one update, from its singular values.

    Args:
        update: dW. Of several adapters, `factors.stack` forms the sum.
        keep: The rank that `RankUse.kept` refers to.
    """
    available = min(update.rank, *update.shape)
    if cancels(update):
        return RankUse(available, 0, 0.0, math.nan)
    values = singular_values(update)
    effective = float(torch.special.entr(values / values.sum()).sum().exp())
    energies = values.square()
    kept = float(energies[:keep].sum() / energies.sum())
    return RankUse(available, numerical_rank(values), effective, kept)


def singular_values(update: LowRank) -> Tensor:
    """Singular values of dW, descending, at most r of them, float64.

    Thin QR of both factors, then the values of the r x r core.
    """
    r_b = torch.linalg.qr(update.b.double(), mode="r").R
    r_a = torch.linalg.qr(update.a.double().T, mode="r").R
    return torch.linalg.svdvals(r_b @ r_a.T)


def gram(updates: Sequence[LowRank]) -> Tensor:
    """<dW_i, dW_j> of the T updates of one module, (T, T) float64 on the CPU."""
    b = torch.cat([update.b.double() for update in updates], dim=1)
    a = torch.cat([update.a.double() for update in updates])
    ranks = torch.tensor([update.rank for update in updates], device=b.device)
    owner = torch.arange(len(updates), device=b.device).repeat_interleave(ranks)
    terms = (b.T @ b) * (a @ a.T)

    def per_pair(x: Tensor) -> Tensor:
        by_row = x.new_zeros(len(updates), len(x)).index_add_(0, owner, x)
        return x.new_zeros(len(updates), len(updates)).index_add_(1, owner, by_row)

    products = per_pair(terms)
    return ((products + products.T) / 2).cpu()


def _sampled(tasks: TaskVectors, module: str, share: float) -> list[LowRank]:
    """The updates of a module, or as many of their rows as the share allows."""
    updates = tasks.modules[module]
    d_out = updates[0].shape[0]
    if share == 1:
        return list(updates)
    drawn = torch.randperm(d_out, generator=tasks.generator(module))[: math.ceil(share * d_out)]
    return [LowRank(update.b[drawn.to(update.b.device)], update.a) for update in updates]


def _count_signs(updates: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Outvoted and non-zero entries of every update, both (T,) int64."""
    outvoted = torch.zeros(len(updates), dtype=torch.int64)
    nonzero = torch.zeros(len(updates), dtype=torch.int64)
    for start, stop in row_tiles(updates[0].shape, copies=len(updates)):
        rows = torch.stack([update.rows(start, stop) for update in updates])
        nonzero += rows.count_nonzero((1, 2)).cpu()
        elected = torch.where(rows.sum(0) < 0, -1.0, 1.0).to(rows.dtype)
        outvoted += (rows.mul_(elected) < 0).count_nonzero((1, 2)).cpu()
    return outvoted, nonzero


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.double()
