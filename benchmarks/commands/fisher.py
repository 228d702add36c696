"""`osrm fisher`: the Fisher information of one trained adapter's model on its own task."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.backward import add_backward_arguments, collect


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm fisher`."""
    read_by = "osrm merge --method fisher reads one for each adapter"
    add_backward_arguments(parser, arguments, None, read_by)


def run(config: Namespace, raw: Namespace) -> None:
    """Collect, save and say so."""
    from osrm import collect_fisher

    found = collect(config, collect_fisher, "fisher")
    print(
        f"{config.output}: Fisher information of {len(found.diagonals)} modules from"
        f" {found.examples} rows of task '{found.meta['task']}'"
    )
