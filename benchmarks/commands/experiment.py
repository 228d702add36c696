"""`osrm experiment`: a published study from data to report, by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from merge_algorithms.errors import UserError, suggest


class Experiment(NamedTuple):
    """What the study asks, and the module with its `add_arguments` and `run`."""

    summary: str
    module: str


EXPERIMENTS = {
    "lora-summation": Experiment(
        "adapters of a language model added up, against training on the merged data"
        " (arXiv 2508.11985)",
        "benchmarks.experiments.lora_summation.command",
    ),
    "orthogonal-dropout": Experiment(
        "adapters under dropout masks, alone and merged, on texts and on pictures"
        " (arXiv 2510.03262)",
        "benchmarks.experiments.orthogonal_dropout.command",
    ),
}


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """The name, and the flags of the experiment that is named.

    Raises:
        UserError: The name is none that there is.
    """
    summaries = "; ".join(f"{name}: {about.summary}" for name, about in EXPERIMENTS.items())
    parser.add_argument("experiment", type=str, help=f"which one. {summaries}")
    chosen = _chosen(arguments)
    if chosen is not None:
        _module(chosen).add_arguments(parser, arguments)


def run(config: Namespace, raw: Namespace) -> None:
    """Hand over to the experiment."""
    _module(config.experiment).run(config, raw)


def _chosen(arguments: Sequence[str]) -> str | None:
    named = [argument for argument in arguments if not argument.startswith("-")]
    chosen = next((argument for argument in named if argument in EXPERIMENTS), None)
    if chosen is None and named:
        raise UserError(f"unknown experiment '{named[0]}': {suggest(named[0], EXPERIMENTS)}")
    return chosen


def _module(name: str) -> ModuleType:
    return importlib.import_module(EXPERIMENTS[name].module)
