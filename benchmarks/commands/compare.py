"""`osrm compare`: whether one arm's merge is better than another's, beyond the luck of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm compare`."""
    parser.add_argument(
        "run", type=Path, help="directory of a finished run of osrm bench, or its results.json"
    )
    parser.add_argument(
        "sides",
        nargs="*",
        type=str,
        help="what to compare with the baseline, as ARM/MERGE, ARM/individual, or ARM/MERGE@1 for"
        " coefficient 1 (default: every other arm by its best merge on validation)",
    )
    parser.add_argument(
        "--baseline",
        type=str | None,
        default=None,
        help="ARM/MERGE (default: the first arm by its best merge on validation)",
    )
    parser.add_argument("--resamples", type=int, default=2000, help="how often rows are resampled")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")


def run(config: Namespace, raw: Namespace) -> None:
    """Print the differences."""
    from rich.console import Console

    from benchmarks.report.significance import comparison_table
    from benchmarks.results import Results
    from benchmarks.significance import Bootstrap, Side, best_side, paired
    from merge_algorithms.errors import UserError

    if config.resamples < 100:
        raise UserError(f"--resamples {config.resamples}: fewer than 100 give no interval")
    if config.seed < 0:
        raise UserError(f"--seed is {config.seed}: give at least 0")
    results = Results.load(config.run)
    folder = config.run.parent if config.run.is_file() else config.run
    first, *others = dict.fromkeys(arm.name for arm in results.arms)
    baseline = Side.parse(config.baseline) if config.baseline else best_side(results, first)
    sides = [Side.parse(side) for side in config.sides]
    if not sides:
        found = (best_side(results, arm) for arm in (first, *others) if arm != baseline.arm)
        sides = [side for side in found if paired(results, folder, baseline, side)]
    if not sides:
        raise UserError(
            f"{config.run} has no arm beside '{baseline.arm}' that was scored on the same rows:"
            " name the sides to compare"
        )
    bootstrap = Bootstrap(
        results, folder, [*dict.fromkeys([baseline, *sides])], config.resamples, config.seed
    )
    comparisons = [bootstrap.compare(side, baseline) for side in sides]
    Console().print(comparison_table(comparisons, len(results.seeds())))
