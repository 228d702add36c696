"""`osrm separability`: at which modules the tasks' inputs can be told apart."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.statistics import check_untuned, read_files
from merge_algorithms.errors import UserError


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm separability`."""
    parser.add_argument(
        "covariances",
        nargs="+",
        type=str,
        help="covariance files of at least two tasks from `osrm covariance --adapter.targets ...`,"
        " with all modules that could get an adapter; NAME=PATH names a task",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_argument(
        "--mu", type=float, default=0.15, help="strictness of the filter, as --subspace.mu"
    )
    parser.add_argument(
        "--all", action="store_true", help="a line for every module, in place of one for each kind"
    )


def run(config: Namespace, raw: Namespace) -> None:
    """Print a table, the modules to prefer first."""
    from rich.console import Console
    from rich.table import Table

    from osrm import Covariance, separations

    files = read_files(Covariance, config.covariances, lambda name: None)
    check_untuned(files.values())
    if len(files) < 2:
        raise UserError(
            f"there is one task, '{next(iter(files))}': give the covariance files of at least two"
        )
    found = separations(files, mu=config.mu, progress=True)
    rows: dict[str, list[tuple[float, float]]] = {}
    for modules in found.values():
        for module, separation in modules.items():
            kind = module if config.all else re.sub(r"\.\d+\.", ".*.", module)
            rows.setdefault(kind, []).append(separation)
    table = Table(
        title=f"Behind each task's filter, {len(files)} tasks",
        caption="own: share of the task's own energy that passes it, the more the better. leaked:"
        " energy of the other tasks' inputs behind it over the own, the less the better. Adapters"
        " of the first modules can learn most and disturb least.",
    )
    for heading in ("module", "own", "leaked", "leaked, worst task"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    means = {
        kind: tuple(map(statistics.fmean, zip(*values, strict=True)))
        for kind, values in rows.items()
    }
    for kind, (own, leaked) in sorted(means.items(), key=lambda item: item[1][1]):
        worst = max(value for _, value in rows[kind])
        table.add_row(kind, f"{own:.3f}", f"{leaked:.3f}", f"{worst:.3f}")
    Console().print(table)
