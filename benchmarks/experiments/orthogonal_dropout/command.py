"""`osrm experiment orthogonal-dropout`: its flags."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_run_arguments,
    add_suite_arguments,
    add_trainer_arguments,
    add_workers_argument,
    count_workers,
    peek,
    read_suite,
    resolve,
    run_directory,
    trainer_options,
)
from benchmarks.experiments.orthogonal_dropout.settings import (
    QUICK,
    DiffusionSettings,
    Object,
    Part,
    StudySettings,
    Style,
)
from merge_algorithms.errors import UserError
from trainers.settings import Init

DEFAULTS = StudySettings()


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of the experiment."""
    # It decides the defaults of other flags.
    quick = peek(arguments, "--quick").get("quick") is True
    implied = ["--preset", "quick"] if quick else []
    suite = add_suite_arguments(
        parser, [*implied, *arguments], ["model", "adapter", "head", "train", "rows"]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the preset quick for texts, a smaller image model, one seed: minutes",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        type=Part,
        default=list(DEFAULTS.parts),
        help="redundancy: single adapters against their drop rate; images: object and style"
        " adapters of a diffusion model merged in pairs; text: run-time and static merges of the"
        " suite's adapters; sdxl: the paper's own pairs on SDXL, for a GPU",
    )
    parser.add_argument(
        "--tasks", nargs="+", type=str, default=list(suite.tasks), help="tasks of the suite to use"
    )
    add_run_arguments(
        parser,
        "orthogonal-dropout, the suite's, the preset's and, if other than the default, the parts';"
        " runs of one name share finished stages, and the last one writes the report",
    )
    parser.add_argument(
        "--inits",
        nargs="+",
        type=Init,
        default=list(DEFAULTS.inits),
        help="initialisations of the adapters of images and text",
    )
    parser.add_argument(
        "--objects",
        nargs="+",
        type=Object,
        default=list(DEFAULTS.objects),
        help="characters, unknown to the image model, that adapters are trained for",
    )
    parser.add_argument(
        "--styles",
        nargs="+",
        type=Style,
        default=list(DEFAULTS.styles),
        help="styles that adapters are trained for; every object is merged with every style",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0] if quick else list(DEFAULTS.seeds),
        help="seeds of training, of sampling and of the masks, of pictures and of texts (those of"
        " the suite and its preset are not used)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(DEFAULTS.rates),
        help="drop rates of the redundancy study; 0 is always among them",
    )
    parser.add_argument(
        "--dropouts",
        nargs="+",
        type=float,
        default=list(DEFAULTS.dropouts),
        help="LoRA dropout that the adapters of the redundancy study are trained with",
    )
    parser.add_argument(
        "--draws",
        nargs="+",
        type=int,
        default=list(DEFAULTS.draws),
        help="numbers of draws that run-time merges average; pictures take 1 and the largest of"
        " these, but at most 4",
    )
    parser.add_argument(
        "--coefficients",
        nargs="+",
        type=float,
        default=suite.coefficients,
        help="grid of the scaling coefficient of text merges, chosen on validation",
    )
    parser.add_argument(
        "--diffusion", type=DiffusionSettings, default=QUICK if quick else DEFAULTS.diffusion
    )
    parser.add_argument(
        "--sdxl",
        type=Path,
        default=DEFAULTS.sdxl,
        help="YAML file of the pairs, prompts and settings of the part sdxl; default: the paper's",
    )
    add_workers_argument(parser)
    add_trainer_arguments(parser)


def run(config: Namespace, raw: Namespace) -> None:
    """Run the study and print where the results are."""
    if config.quick and config.preset != "quick":
        raise UserError(f"--quick is the preset quick, but --preset is {config.preset}: give one")
    known = {f.name: config[f.name] for f in fields(StudySettings)}
    settings = StudySettings(**known)
    if settings.parts != ["text"] and importlib.util.find_spec("diffusers") is None:
        raise UserError(
            "the parts redundancy, images and sdxl need diffusers: install osrm-merge[diffusion],"
            " or run --parts text"
        )
    from rich.console import Console

    from benchmarks.experiments.orthogonal_dropout.page import summary_tables
    from benchmarks.experiments.orthogonal_dropout.study import Study
    from benchmarks.progress import TerminalProgress
    from trainers.store import Store

    suite = read_suite(config, config.tasks)
    texts = {"text", "redundancy"} & set(settings.parts)
    options = trainer_options(raw.trainer)
    # Each choice of parts has a report of its own.
    some = [] if set(settings.parts) == set(DEFAULTS.parts) else sorted(settings.parts)
    run_dir = run_directory(config, "orthogonal-dropout", suite.name, suite.preset, *some)
    model = resolve(suite.model) if texts else None
    workers = count_workers(config, model)
    study = Study(suite, model, settings, Store(run_dir), options, workers)
    with TerminalProgress(study.stages()) as progress:
        study.store.progress = progress
        measured = study.run()
    console = Console()
    for table in summary_tables(measured):
        console.print(table)
    print(f"results: {run_dir}/results.csv, results.json; report: {run_dir}/report.html")
