"""What `--workers` gains: the same bench with one process and with several, in turns.

    python -m benchmarks.performance.workers                     # two tasks of the embedded suite
    python -m benchmarks.performance.workers --workers 4 --arguments '[--tasks, trec, bbc]'

Wall time of the whole command, from a fresh run directory each time; one process has all cores'
threads, several share them out. So other programs on the machine count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

import torch
from jsonargparse.typing import PositiveInt

from benchmarks.performance.command import run_as_command
from benchmarks.performance.measuring import markdown
from merge_algorithms.errors import UserError

TASKS = ["--tasks", "stsb", "trec", "--inits", "lora", "osrm", "--merges", "task_arithmetic"]


def compare(
    arguments: list[str] | None = None, workers: PositiveInt | None = None, rounds: PositiveInt = 2
) -> None:
    """Print the seconds of a bench with one process and with several, and their ratio.

    Args:
        arguments: Of `osrm bench`.
        workers: How many processes; one per core by default.
        rounds: How often both are timed.
    """
    count = workers or torch.get_num_threads()
    if count == 1:
        raise UserError("--workers is 1: compare with at least 2 processes")
    times: dict[int, list[float]] = {1: [], count: []}
    for _ in range(rounds):
        for number, found in times.items():
            found.append(seconds(TASKS if arguments is None else arguments, number))
    rows = [
        [str(number), f"{statistics.median(found):.1f}", " ".join(f"{x:.1f}" for x in found)]
        for number, found in times.items()
    ]
    print("\n".join(markdown(["workers", "seconds, median", "every round"], rows)))
    ratios = sorted(one / many for one, many in zip(times[1], times[count], strict=True))
    print(f"{ratios[0]:.2f} to {ratios[-1]:.2f} times as fast, by round")


def seconds(arguments: list[str], workers: int) -> float:
    """Wall time of `osrm bench` in a run directory of its own."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "benchmarks.cli", "bench", *arguments]
        command += ["--workers", str(workers), "--runs-dir", runs]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"osrm bench failed: {done.stderr[-2000:]}")
        return time.perf_counter() - start


if __name__ == "__main__":
    run_as_command(compare)
