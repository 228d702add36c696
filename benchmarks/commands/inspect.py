"""`osrm inspect`: how adapters get along, before any merge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from benchmarks.commands.common import check_file
from benchmarks.commands.merging import load_adapters
from benchmarks.commands.statistics import check_tuned, models_of, read_files
from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_file


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm inspect`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        type=str,
        help="PEFT LoRA directories (or Hub ids) of one base model; NAME=PATH names one other than"
        " its task or directory. One alone shows its norms and its use of rank; several, also"
        " their cosines and sign conflicts",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_argument(
        "--base",
        type=str | None,
        default=None,
        help="name of the base model, where the adapters record it under several (a Hub id and a"
        " local copy)",
    )
    parser.add_argument(
        "--covariances",
        nargs="+",
        type=str,
        default=[],
        help="covariance files from osrm covariance, one for each adapter and of any further tasks:"
        " they show what each adapter does to the other tasks' inputs (interference matrix,"
        " leaked energy of A, leaked/own ratio). The task that a file records is the adapter's"
        " name, NAME=PATH says another",
    )
    parser.add_argument(
        "--k",
        type=int | None,
        default=48,
        help="decompose the covariances as well: effective rank of every task's inputs, their"
        " energy in the bottom r and the bottom K directions, and how much of each A lies in those"
        " of the other tasks (seconds for MiniLM, minutes for a large model; null leaves it out)",
    )
    parser.add_argument(
        "--initial",
        nargs="+",
        type=str,
        default=[],
        help="the adapters as they were before training, under the same names: how far the span of"
        " A has turned since (osrm train records that itself, so its adapters need none)",
    )
    parser.add_argument(
        "--relation",
        type=Path | None,
        default=None,
        help="relation.json of osrm experiment lora-summation: forecast, from the line fitted there"
        " to other adapters, by how much the perplexity of the adapters' sum differs from joint"
        " training. An extrapolation, printed with its margin",
    )
    parser.add_argument(
        "--rank",
        type=int | None,
        default=None,
        help="show the energy that a truncation of the merged adapter to this rank would keep"
        " (default: the largest rank of the adapters)",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="count sign conflicts in every row of a large model too, instead of in a share of its"
        " rows that is drawn at random (seconds instead of minutes, right to about 0.01)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path | None,
        default=None,
        help="HTML page to write, with plots: RMS cosines, overlap of the subspaces, interference,"
        " everything by layer",
    )
    parser.add_argument(
        "--json", type=Path | None, default=None, help="JSON file to write, with every number"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(config: Namespace, raw: Namespace) -> None:
    """Inspect, print, write."""
    from benchmarks.inspection import Forecast, inspect_adapters
    from benchmarks.report.inspection import inspection_table, write_page
    from benchmarks.subspace_inspection import decompose
    from merge_algorithms.similarity import ENTRIES
    from osrm import Covariance, with_prefix_of

    if config.relation is not None:
        from benchmarks.experiments.lora_summation.relation import Relation, expected_changes

        relation = Relation.load(config.relation)
    files = [path for path in (config.output, config.json) if path is not None]
    for path in files:
        check_file(path, config.overwrite)
    if len(files) == 2 and files[0].resolve() == files[1].resolve():
        raise UserError(f"-o and --json are both {files[0]}: give two files")
    with Console(stderr=True).status("comparing the adapters"):
        adapters = load_adapters(config.adapters, config.base)
        read = read_files(Covariance, config.covariances, models_of(adapters))
        check_tuned(read, adapters)
        modules = [module for adapter in adapters for module in adapter.updates]
        covariances = with_prefix_of(read, modules)
        inspection = inspect_adapters(
            adapters,
            covariances or None,
            config.rank,
            None if config.exact else ENTRIES,
            initial=load_adapters(config.initial),
        )
        if config.relation is not None:
            predictions = expected_changes(adapters, relation, covariances or None)
            if not predictions:
                missing = "" if covariances else ": pass --covariances, for the interference"
                raise UserError(
                    f"--relation {config.relation} has no line for what is known of these"
                    f" adapters{missing or ': the study that wrote it could fit none'}"
                )
            inspection = replace(inspection, forecast=Forecast(relation, predictions))
    if covariances and config.k is not None:
        decomposed = decompose(adapters, covariances, config.k, progress=True)
        inspection = replace(inspection, decomposed=decomposed)
    if config.output is not None:
        write_page(inspection, config.output)
    if config.json is not None:
        with atomic_file(config.json) as path:
            path.write_text(json.dumps(inspection.as_json()) + "\n", encoding="utf-8")
    console = Console()
    console.print(inspection_table(inspection))
    for path in files:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
