"""`osrm experiment lora-summation`: its flags."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_run_arguments,
    add_suite_arguments,
    add_trainer_arguments,
    add_workers_argument,
    check_inits,
    count_workers,
    peek,
    read_suite,
    resolve,
    run_directory,
    trainer_options,
)
from benchmarks.experiments.lora_summation.settings import MERGES, StudySettings
from trainers.backbone import pick_precision
from trainers.settings import Init, SubspaceSettings

SUITE, FILES_SUITE = "qa", "qa-files"
PARTS = 8


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of the experiment."""
    # Files of one's own are the data sets that the suite for them describes.
    files = peek(arguments).get("data_dir") is not None
    suite = add_suite_arguments(
        parser,
        arguments,
        ["model", "adapter", "train", "rows"],
        default=FILES_SUITE if files else SUITE,
    )
    parser.add_argument(
        "--tasks", nargs="+", type=str, default=list(suite.tasks), help="tasks of the suite to use"
    )
    add_run_arguments(parser, "lora-summation, the suite's and the preset's")
    parser.add_argument(
        "--inits",
        nargs="+",
        type=Init,
        default=["lora", "osrm"],
        help="initialisations of A to compare; --subspace.* says the rest, for all but lora",
    )
    parser.add_class_arguments(SubspaceSettings, "subspace", skip={"init"})
    parser.add_argument(
        "--merges",
        nargs="+",
        type=str,
        default=list(MERGES),
        help="merging methods to set beside the sum; a name with _runtime is the run-time form",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=suite.seeds, help="training seeds")
    parser.add_argument(
        "--coefficients",
        nargs="+",
        type=float,
        default=suite.coefficients,
        help="what validation rows choose the coefficient of task_arithmetic from",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=suite.samples,
        help="Monte Carlo samples that a run-time merge averages",
    )
    parser.add_argument(
        "--parts",
        type=int,
        default=PARTS if suite.preset == "full" else 0,
        help="adapters of the higher-order study, on parts of the tasks; 0 leaves it out",
    )
    parser.add_argument(
        "--subsets",
        type=int,
        default=2,
        help="how many subsets of each size the higher-order study sums",
    )
    add_workers_argument(parser)
    add_trainer_arguments(parser)
    # The one job that takes an hour and more: as fast as the machine does it.
    parser.set_defaults({"trainer.precision": pick_precision()})


def run(config: Namespace, raw: Namespace) -> None:
    """Run the study and print where the results are."""
    check_inits(config.inits, config.subspace)
    from rich.console import Console

    from benchmarks.experiments.lora_summation.page import summary_table
    from benchmarks.experiments.lora_summation.plan import plan
    from benchmarks.experiments.lora_summation.study import Study
    from benchmarks.progress import TerminalProgress

    suite = read_suite(config, config.tasks)
    settings = StudySettings(
        inits=config.inits,
        subspace=config.subspace,
        merges=config.merges,
        parts=config.parts,
        subsets=config.subsets,
    )
    options = trainer_options(raw.trainer)
    run_dir = run_directory(config, "lora-summation", suite.name, suite.preset)
    model = resolve(suite.model)
    phases = plan(list(suite.tasks), suite.seeds, settings)
    stages = sum(piece.stages for phase in phases for piece in phase)
    with TerminalProgress(stages) as progress:
        workers = count_workers(config, model)
        study = Study(suite, model, settings, run_dir, progress, workers, options)
        results = study.run()
    console = Console()
    console.print(summary_table(results))
    print(f"results: {run_dir}/results.csv, results.json; report: {run_dir}/report.html")
