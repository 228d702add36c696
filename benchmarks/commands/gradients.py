"""`osrm gradients`: what one trained adapter's task reads of what its modules write."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.backward import add_backward_arguments, collect


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm gradients`."""
    read_by = "osrm train --gradients reads those of the other tasks"
    add_backward_arguments(parser, arguments, 1, read_by)


def run(config: Namespace, raw: Namespace) -> None:
    """Collect, save and say so."""
    from osrm import collect_gradients

    found = collect(config, collect_gradients, "gradients")
    print(
        f"{config.output}: gradients at {len(found.moments)} modules from {found.examples} rows of"
        f" task '{found.meta['task']}'"
    )
