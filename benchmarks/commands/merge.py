"""`osrm merge`: adapters on disk to one adapter on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.merging import (
    add_method_options,
    load_adapters,
    method_options,
    method_summaries,
)
from merge_algorithms import merge


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm merge`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        type=str,
        help="PEFT LoRA directories (or Hub ids); NAME=PATH names one other than its task or"
        " directory",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_argument("--method", type=str, default="task_arithmetic", help=method_summaries())
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        default=None,
        help="one weight per adapter, in their order (default: 1 for each)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="coefficient that the merged update is scaled by"
    )
    parser.add_argument(
        "--rank",
        type=int | None,
        default=None,
        help="rank of the merged adapter (default: the sum of the adapters' ranks, which is exact"
        " for low-rank methods); the share of energy that a truncation loses is printed",
    )
    parser.add_argument(
        "--head",
        type=str | None,
        default=None,
        help="name of the adapter whose classification head the merged adapter carries for stock"
        " PEFT (default: all heads are kept beside it, one file each)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of methods with random masks")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="directory of the merged adapter"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter")
    add_method_options(parser)


def run(config: Namespace, raw: Namespace) -> None:
    """Merge, save, and say what was lost."""
    adapters = load_adapters(config.adapters)
    merged = merge(
        adapters,
        config.method,
        weights=config.weights,
        seed=config.seed,
        **method_options(config),
    )
    lost = merged.scaled(config.scale).save_adapter(
        config.output, rank=config.rank, head=config.head, overwrite=config.overwrite
    )
    worst = max(lost, key=lambda module: lost[module])
    loss = (
        f"; truncation lost at most {lost[worst]:.1%} of a module's energy ({worst})"
        if lost[worst] > 1e-6
        else ""
    )
    names = ", ".join(adapter.name for adapter in adapters)
    print(f"{config.output}: {config.method} of {names}; {len(lost)} modules{loss}")
