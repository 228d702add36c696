"""Eigenvectors from one end of a spectrum without the rest of it, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from merge_algorithms.errors import UserError, suggest

Solver = Literal["auto", "eigh", "cholesky"]

# What counts as zero energy, as a share of the Frobenius norm that `null_level` takes. Covariances
# are float32 (unit roundoff 6e-8), whose rounding moves no eigenvalue by more than that share.
NULL_TOLERANCE = 1e-6
# What rounding takes from a feature's energy at least and at most: a float32 sum of thousands of
# equal terms, such as those of a decoder's first token, errs always to the same side.
_ROUNDING, _MOST_ROUNDING = 10 * NULL_TOLERANCE, 1e-2
# Below this width LAPACK's full decomposition takes about a second at most, and is exact.
CHOLESKY_FROM = 2048
# Estimated relative error of the Ritz values at which the iteration stops, their mean.
TOLERANCE = 5e-3
_BLOCK = 24
_FEWEST_STEPS = 4
_TILE = 128


def choose_solver(solver: Solver, d: int, rank: int) -> Literal["eigh", "cholesky"]:
    """The solver for `rank` of d eigenvectors; "auto" iterates where it pays.

    Raises:
        UserError: no such solver.
    """
    if solver not in get_args(Solver):
        raise UserError(f"unknown solver '{solver}'; {suggest(solver, get_args(Solver))}")
    if solver == "auto":
        return "cholesky" if d >= CHOLESKY_FROM and rank <= d // 32 else "eigh"
    return solver


@contextmanager
def single_thread() -> Iterator[None]:
    """Run LAPACK on one thread: several spin-wait on a busy machine, up to 40 times slower.

    It also makes results the same bits whatever number of threads the program runs with.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def times(matrix: Tensor, block: Tensor) -> Tensor:
    """`matrix` @ `block` in float64, (d, b), without a float64 copy of a narrower matrix."""
    if matrix.dtype == torch.float64:
        return matrix @ block
    # One tile, filled again and again, stays in the cache.
    wide = matrix.new_empty(min(_TILE, len(matrix)), matrix.shape[1], dtype=torch.float64)
    return torch.cat([wide[: len(tile)].copy_(tile) @ block for tile in matrix.split(_TILE)])


def null_level(moment: Tensor) -> float:
    """Eigenvalues of a second moment up to this count as zero: a share of its Frobenius norm.

    The norm is at most ten times what it is without the hundredth of the features with the most
    energy, as in `osrm.others.damping_level`: a decoder's few enormous activations can raise it to
    thousands of times that, and a share of it would call everything else zero. Rounding allows the
    lower level, because it moves entry (i, j) by a share of sqrt(C_ii C_jj), of the two features'
    energy and not of the largest feature's: a direction v with C v = 0 reads enormous features only
    as far as they cancel what it reads of the others, so its rounding is a share of the latter.
    Directions among enormous features alone are the exception, see `with_rounding`. In MiniLM the
    norm is below five times the one without those features, and so the level is a share of the
    whole. It never falls below what a float64 eigensolver resolves.

    Args:
        moment: (d, d), or (d,) for the diagonal of a diagonal one.
    """
    energies = moment if moment.ndim == 1 else moment.diagonal()
    few = -(-len(energies) // 100)
    rest = energies.argsort()[: len(energies) - few].sort().values
    others = _norm(moment[rest] if moment.ndim == 1 else moment[rest[:, None], rest])
    norm = _norm(moment)
    return NULL_TOLERANCE * min(norm, max(10 * others, 1e-8 * norm))


def with_rounding(moment: Tensor) -> Tensor:
    """A second moment in which enormous features have what rounding may have taken from them.

    Among features with NULL_TOLERANCE of their energy above the `null_level`, directions of little
    energy are accidents: activations that are the same in every text have one direction with
    energy, and float32 sums give the others any, of either sign, up to their rounding. So each of
    these features gets a hundred-thousandth of its energy on top, or twice the share that a
    negative eigenvalue among them proves. All other directions gain at most that share of what
    they read of the other features: a null space stays below the level. Where no feature is
    enormous, the moment itself returns.

    Args:
        moment: (d, d) symmetric.
    """
    energies = moment.diagonal().double()
    few = (energies > null_level(moment) / NULL_TOLERANCE).nonzero()[:, 0]
    if not len(few):
        return moment
    scale = energies[few].rsqrt()
    correlations = scale[:, None] * moment[few[:, None], few].double() * scale
    proven = -2 * float(torch.linalg.eigvalsh(correlations)[0])
    share = min(max(_ROUNDING, proven), _MOST_ROUNDING)
    moment = moment.clone()
    moment.diagonal()[few] *= 1 + share
    return moment


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def cholesky(matrix: Tensor, shift: float) -> Tensor | None:
    """Lower L with L L^T = matrix + shift I, (d, d) float64; None if that is not positive definite.

    Takes the memory of L and no more.
    """
    copy = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    copy.diagonal().add_(shift)
    # Read by columns, as LAPACK does, a symmetric matrix is itself: it is factored in place.
    info = torch.empty((), dtype=torch.int32, device=copy.device)
    lower, info = torch.linalg.cholesky_ex(copy.mT, out=(copy.mT, info))
    return None if info else lower


def solve_lower(lower: Tensor, block: Tensor) -> Tensor:
    """L^-1 `block`."""
    return torch.linalg.solve_triangular(lower, block, upper=False)


def solve_upper(lower: Tensor, block: Tensor) -> Tensor:
    """L^-T `block`."""
    return torch.linalg.solve_triangular(lower.mT, block, upper=True)


def smallest_of(matrix: Tensor, count: int, null: float) -> tuple[Tensor, Tensor] | None:
    """Ritz pairs at the lower end of a second moment, by blocked inverse iteration.

    One Cholesky factorisation of the matrix plus `null` times the identity; then a block
    Krylov space of the inverse grows until the `count` smallest Ritz values have settled. Their
    sum is at most about 1 % above that of the eigenvalues; vectors of eigenvalues that lie closer
    than that are mixed. A null space smaller than the block is found whole.

    Args:
        matrix: (d, d) symmetric, float32 or float64.
        count: How many pairs.
        null: The matrix's `null_level`.

    Returns:
        Ascending values, (m,), and vectors, (d, m), m >= count, float64; None where this does not
        work and a full decomposition is called for: not positive semi-definite, a null space that
        fills a block of up to d / 8 columns, or values that half of the space does not settle.
    """
    d = len(matrix)
    if null == 0:
        return None
    lower = cholesky(matrix, null)
    if lower is None:
        return None

    def invert(block: Tensor) -> Tensor:
        return solve_upper(lower, solve_lower(lower, block))

    size = block_size(count)
    while size <= d // 8:
        pairs = minimise_trace(
            lambda block: times(matrix, block),
            lambda block, image: invert(block),
            invert(start_block(d, size, matrix.device)),
            count,
            floor=null,
        )
        if pairs is None or int((pairs[0] <= null).sum()) < size:
            return pairs
        size *= 4  # the null space may be larger than the block
    return None


def block_size(count: int) -> int:
    """Columns per step: enough to keep a processor busy, more where many vectors are wanted."""
    return max(_BLOCK, count // 4)


def start_block(d: int, size: int, device: torch.device) -> Tensor:
    """The (d, size) float64 block that iterations start from, always the same one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(d, size, generator=generator, dtype=torch.float64).to(device)


def minimise_trace(
    measure: Callable[[Tensor], Tensor],
    expand: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    count: int,
    floor: float = 0.0,
) -> tuple[Tensor, Tensor] | None:
    """Smallest Ritz pairs of a symmetric operator on a growing space (Rayleigh-Ritz).

    Every step appends one block, orthogonalised against all before. In a dense spectrum the error
    of a block Krylov space falls as the square of the number of steps (gap-independent bound of
    arXiv 1504.05477), so after step s the last improvement times s / 2 estimates what is left; the
    iteration stops when that is TOLERANCE of the values, on average.

    Args:
        measure: The operator, (d, b) -> (d, b), whose trace is minimised.
        expand: The next block from the last one and its `measure`.
        start: The first block, (d, b).
        count: How many values must settle.
        floor: Added to the values that improvements are compared with: below it precision is idle.

    Returns:
        Ascending values and vectors, max(b, count) of them; None if the space would have to grow
        beyond d / 2.
    """
    d, size = start.shape
    basis = torch.linalg.qr(start).Q
    image = measure(basis)
    gram = basis.T @ image
    before: Tensor | None = None
    for step in range(1, d):
        values, turn = torch.linalg.eigh(gram)
        wanted = values[:count]
        if before is not None and len(before) == count and step >= _FEWEST_STEPS:
            gain = ((before - wanted) / (wanted.abs() + floor)).mean()
            if step / 2 * gain <= TOLERANCE:
                keep = max(size, count)
                return values[:keep], basis @ turn[:, :keep]
        before = wanted
        if basis.shape[1] + size > d // 2:
            break
        block = expand(basis[:, -size:], image[:, -size:])
        for _ in range(2):  # normalised in between: what is left may be rounding
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        seen = measure(block)
        side = basis.T @ seen
        gram = torch.cat([torch.cat([gram, side.T]), torch.cat([side, block.T @ seen])], dim=1)
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, seen], dim=1)
    return None
