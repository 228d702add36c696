"""Decompositions that do not depend on each other, side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from osrm.covariance import Covariance
from osrm.solvers import single_thread
from osrm.spill import free_memory

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def side_by_side(
    solve: Callable[[Key], Result], widths: Mapping[Key, int], title: str | None = None
) -> dict[Key, Result]:
    """Solve for every key, the widest first, in a pool of as many threads as torch has.

    LAPACK releases the interpreter's lock. One thread per solve: the solves are independent, and
    several threads inside one would wait for each other (see `single_thread`). What runs at once
    takes at most half of the memory that is free; one always runs.

    Args:
        solve: Decomposes one symmetric matrix.
        widths: What to call it with, and the d of its matrix, which decides how many fit into
            memory.
        title: Of a progress bar on a terminal; None for no bar.
    """
    console = Console(stderr=True)
    groups: dict[int, list[Key]] = {}
    for key, width in widths.items():
        groups.setdefault(width, []).append(key)

    def solved() -> Iterator[tuple[Key, Result]]:
        for width, keys in sorted(groups.items(), reverse=True):
            # A matrix, its vectors and LAPACK's workspace.
            fit = free_memory(torch.device("cpu")) // 2 // (4 * 8 * width**2)
            workers = max(1, min(torch.get_num_threads(), len(keys), fit))
            with (
                single_thread(),
                ThreadPoolExecutor(
                    workers, initializer=torch.set_num_threads, initargs=(1,)
                ) as pool,
            ):
                yield from zip(keys, pool.map(solve, keys), strict=True)

    results = track(
        solved(),
        title or "",
        total=len(widths),
        console=console,
        transient=True,
        disable=title is None or not console.is_terminal,
    )
    found = dict(results)
    return {key: found[key] for key in widths}


def of_every_task(
    solve: Callable[[str, str], Result],
    covariances: Mapping[str, Covariance],
    title: str | None = None,
) -> dict[str, dict[str, Result]]:
    """Solve for every input of every task, as `side_by_side` does; each distinct input once.

    Args:
        solve: Takes a task and the key of one of its covariance's matrices.
        covariances: Task name -> its covariance.
        title: As in `side_by_side`.

    Returns:
        Task name -> module name -> the result for what the module reads.
    """
    widths = {
        (task, key): len(mean)
        for task, cov in covariances.items()
        for key, mean in cov.means.items()
    }
    found = side_by_side(lambda which: solve(*which), widths, title)
    return {
        task: {module: found[task, key] for module, key in cov.modules.items()}
        for task, cov in covariances.items()
    }
