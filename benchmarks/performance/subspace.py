"""Subspace solvers: the iteration on one Cholesky factor against LAPACK's full decomposition.

    python -m benchmarks.performance.subspace                                   # d = 4096, rank 16
    python -m benchmarks.performance.subspace --width 14336 --solvers '[cholesky]'
    python -m benchmarks.performance.subspace --width 1024 --keys 24            # the pool

Second moments of known spectrum stand in for collected ones, so that the smallest possible energy
is known without solving anything: a diagonal, turned by random reflections. Every solve runs in a
process of its own, on one thread; peak memory is that process's, its input (float32) included.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.performance.command import run_as_command
from osrm import Covariance, bottom_subspace, subspace_state
from osrm.solvers import times

Spectrum = Literal["power", "steep", "exponential"]
Method = Literal["torch.linalg.eigh", "eigh", "cholesky"]


@dataclass(frozen=True)
class Solve:
    """One solve: what it cost, and its leaked energy over the smallest possible.

    Peak memory is that of the process that made the problem and solved it.
    """

    spectrum: str
    method: str
    seconds: float
    energy: float
    peak_bytes: int


def eigenvalues(spectrum: Spectrum, width: int) -> Tensor:
    """A decaying spectrum, descending: 1 / i, i^-1.5, or four decades of an exponential."""
    index = torch.arange(1, width + 1, dtype=torch.float64)
    if spectrum == "exponential":
        return 10 ** (-4 * index / width)
    return index ** (-1.0 if spectrum == "power" else -1.5)


def second_moment(values: Tensor, seed: int) -> Tensor:
    """A dense (d, d) float32 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.diag(values)
    for _ in range(8):
        v = torch.randn(len(values), generator=generator, dtype=torch.float64)
        v /= v.norm()
        matrix.addr_(v, v @ matrix, alpha=-2)
        matrix.addr_(matrix @ v, v, alpha=-2)
    return matrix.float()


def solve(spectrum: Spectrum, method: Method, width: int, rank: int) -> Solve:
    """Run one solve in this process."""
    torch.set_num_threads(1)
    values = eigenvalues(spectrum, width)
    cov = second_moment(values, seed=0)
    clock = time.process_time()
    if method == "torch.linalg.eigh":
        rows = torch.linalg.eigh(cov.double())[1][:, :rank].T
    else:
        rows = bottom_subspace(cov, rank, solver=method)
    seconds = time.process_time() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = rows.double()
    energy = float((times(cov, rows.T) * rows.T).sum() / values.sort().values[:rank].sum())
    return Solve(spectrum, method, seconds, energy, peak)


def compare(
    width: PositiveInt = 4096,
    rank: PositiveInt = 16,
    rounds: PositiveInt = 1,
    solvers: list[Method] | None = None,
    spectra: list[Spectrum] | None = None,
    keys: int = 0,
) -> None:
    """Solve the same problems by every solver and print seconds, energies and memory.

    Args:
        width: d, the features that the module reads.
        rank: Rows wanted.
        rounds: How often each is measured; the fastest counts.
        solvers: torch.linalg.eigh alone, eigh (with the tie-breaks) or cholesky; all by default.
        spectra: Spectra of the second moments; all by default.
        keys: Instead, time subspace_state over this many inputs in a pool of 1 and of all threads.
    """
    console = Console(width=100)
    if keys:
        console.print(pool_table(width, rank, keys, rounds))
        return
    table = Table(title=f"Bottom subspace, d = {width}, rank {rank}, CPU seconds on one thread")
    for heading in ("spectrum", "solver", "s", "times as fast", "energy / optimum", "peak GB"):
        table.add_column(heading, justify="left" if heading in ("spectrum", "solver") else "right")
    for spectrum in spectra or ["power", "steep", "exponential"]:
        reference: float | None = None
        for method in solvers or ["torch.linalg.eigh", "eigh", "cholesky"]:
            runs = [_apart(spectrum, method, width, rank) for _ in range(rounds)]
            best = min(runs, key=lambda run: run.seconds)
            reference = reference or best.seconds
            table.add_row(
                spectrum,
                method,
                f"{best.seconds:.2f}",
                f"{reference / best.seconds:.1f}",
                f"{best.energy:.4f}",
                f"{max(run.peak_bytes for run in runs) / 1e9:.2f}",
            )
        table.add_section()
    console.print(table)


def _apart(spectrum: Spectrum, method: Method, width: int, rank: int) -> Solve:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(solve, spectrum, method, width, rank).result()


def pool_table(width: int, rank: int, keys: int, rounds: int) -> Table:
    """Wall-clock seconds of subspace_state over many keys, by the number of threads."""
    moments = [second_moment(eigenvalues("power", width), seed) for seed in range(2)]
    names = [f"layer.{i}" for i in range(keys)]
    tasks = {
        task: Covariance(
            dict.fromkeys(names, moment),
            dict.fromkeys(names, torch.zeros(width)),
            dict(zip(names, names, strict=True)),
            dict.fromkeys(names, 10 * width),
            dict.fromkeys(names, 10 * width),
            {"task": task},
        )
        for task, moment in zip("ab", moments, strict=True)
    }
    threads = torch.get_num_threads()
    table = Table("workers", "wall seconds", title=f"subspace_state, {keys} keys of width {width}")
    for workers in sorted({1, threads}):
        torch.set_num_threads(workers)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            subspace_state(tasks, "a", rank)
            seconds.append(time.perf_counter() - start)
        table.add_row(str(workers), f"{min(seconds):.2f}")
    torch.set_num_threads(threads)
    return table


if __name__ == "__main__":
    run_as_command(compare)
