"""Seconds and peak memory of a piece of work, each measured in a process of its own.

Memory is the highest resident set while the work runs less the resident set before it, when its
inputs exist already. Both come from the kernel, whose high-water mark is reset in between
(/proc/self/clear_refs), so Linux is needed.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.performance.problems import Problem

Job = Callable[[], object]
# Short work is repeated until this many seconds are spent, so that one hiccup does not decide.
ENOUGH = 0.5
MOST_REPEATS = 20


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes.

    Attributes:
        seconds: Median of the repetitions.
        extra: Peak memory beyond the inputs in MB (10^6 bytes), the result included.
    """

    seconds: float
    extra: float

    def times(self, count: float) -> Cost:
        """The same work done `count` times over, one after the other."""
        return Cost(self.seconds * count, self.extra)


def measure(
    prepare: Callable[..., Job], problem: Problem, *arguments: Any, repeats: int = 1, threads: int
) -> Cost:
    """The cost of `prepare(problem, *arguments)()`, preparation excluded.

    A tiny problem goes first, so that libraries are loaded and their threads started.

    Args:
        prepare: A module-level function that makes the inputs and returns the work.
        problem: What to merge.
        *arguments: Further arguments of `prepare`.
        repeats: How often the work is done at least.
        threads: Number of threads of torch.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, prepare, problem, arguments, repeats, threads).result()


def _measure(
    prepare: Callable[..., Job],
    problem: Problem,
    arguments: Sequence[Any],
    repeats: int,
    threads: int,
) -> Cost:
    torch.set_num_threads(threads)
    prepare(problem.tiny(), *arguments)()
    work = prepare(problem, *arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    times: list[float] = []
    while len(times) < repeats or (sum(times) < ENOUGH and len(times) < MOST_REPEATS):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
        del result
    return Cost(statistics.median(times), max(0.0, _memory("VmHWM") - before))


def _memory(field: str) -> float:
    """A field of /proc/self/status in MB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: Linux is needed")
    return int(found[1]) * 1024 / 1e6


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, each as soon as its row is there; numbers are right-aligned."""
    yield _line(headers)
    yield _line(["---"] + ["---:"] * (len(headers) - 1))
    for row in rows:
        yield _line(row)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def in_seconds(seconds: float) -> str:
    """Three digits at least, no false precision."""
    return (
        f"{seconds:.3f}" if seconds < 1 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"
    )
