"""Decompositions that do not depend on each other, side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from osrm.solvers import single_thread

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

# What runs at once may take this much together; one always runs.
_POOL_BYTES = 8e9


def side_by_side(
    solve: Callable[[Key], Result], keys: Sequence[Key], width: int, title: str | None = None
) -> dict[Key, Result]:
    """Solve for every key in a pool of as many threads as torch has.

    LAPACK releases the interpreter's lock. One thread per solve: the solves are independent, and
    several threads inside one would wait for each other (see `single_thread`).

    Args:
        solve: Decomposes one symmetric matrix.
        keys: What to call it with.
        width: d of the widest matrix, which decides how many fit into memory.
        title: Of a progress bar on a terminal; None for no bar.
    """
    console = Console(stderr=True)
    fit = int(_POOL_BYTES // (4 * 8 * width**2))  # a matrix, its vectors and LAPACK's workspace
    workers = max(1, min(torch.get_num_threads(), len(keys), fit))
    with (
        single_thread(),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        results = track(
            pool.map(solve, keys),
            title or "",
            total=len(keys),
            console=console,
            transient=True,
            disable=title is None or not console.is_terminal,
        )
        return dict(zip(keys, results, strict=True))
