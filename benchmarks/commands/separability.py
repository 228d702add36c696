"""`osrm separability`: at which modules the tasks' inputs can be told apart."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.statistics import check_untuned, read_files
from merge_algorithms.errors import UserError

if TYPE_CHECKING:
    from osrm import Separation


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
        "--mu", type=float, default=0.05, help="strictness of the filter, as --subspace.mu"
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
    layers: dict[str, dict[str, list[Separation]]] = {}  # by kind of module and task
    for task, modules in found.items():
        for module, separation in modules.items():
            kind = module if config.all else re.sub(r"\.\d+\.", ".*.", module)
            layers.setdefault(kind, {}).setdefault(task, []).append(separation)
    rows = []
    for kind, of in layers.items():
        own = statistics.fmean(s.own for each in of.values() for s in each)
        leaked = [statistics.fmean(s.leaked for s in each) for each in of.values()]
        rows.append((kind, own, statistics.fmean(leaked), max(leaked)))
    table = Table(
        title=f"Behind each task's filter, {len(files)} tasks",
        caption="own: share of the task's own energy that passes it, the more the better. leaked:"
        " energy of the other tasks' inputs behind it over the own, the less the better. Adapters"
        " of the first modules can learn most and disturb least.",
    )
    for heading in ("module", "own", "leaked", "leaked, worst task"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for kind, *numbers in sorted(rows, key=lambda row: row[2]):
        table.add_row(kind, *(f"{number:.3f}" for number in numbers))
    Console().print(table)
