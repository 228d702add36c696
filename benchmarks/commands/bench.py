"""`osrm bench`: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_run_arguments,
    add_suite_arguments,
    add_trainer_arguments,
    add_workers_argument,
    check_inits,
    count_workers,
    read_suite,
    resolve,
    run_directory,
    trainer_options,
)
from benchmarks.suites import Suite
from merge_algorithms.errors import UserError
from trainers.settings import Init, SubspaceSettings

if TYPE_CHECKING:
    from benchmarks.arms import ArmSettings

DEFAULT_INITS: list[Init] = ["lora", "osrm", "wiener"]


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm bench`."""
    suite = add_suite_arguments(parser, arguments, ["model", "adapter", "head", "train", "rows"])
    parser.add_argument(
        "--tasks", nargs="+", type=str, default=list(suite.tasks), help="tasks of the suite to use"
    )
    add_run_arguments(parser, "the suite's and the preset's")
    parser.add_argument(
        "--inits",
        nargs="+",
        type=Init,
        default=DEFAULT_INITS,
        help="initialisations of A to compare: PEFT's default, the paper's subspace (osrm), the"
        " released code's variant of it (official), and ours (contrastive, and wiener, which trains"
        " all tasks twice unless --subspace.output_mu is 0); --subspace.* says the rest, for all"
        " but lora",
    )
    parser.add_argument(
        "--arms",
        type=Path | None,
        default=None,
        help="YAML file of what to compare instead: 'arms: {NAME: {subspace: {..}, adapter: {..},"
        " train: {..}}}', each plain LoRA with the suite's settings but for what it says; with"
        " 'joint: true' one adapter is trained on all tasks, as the upper reference",
    )
    parser.add_class_arguments(SubspaceSettings, "subspace", skip={"init"})
    parser.add_argument(
        "--merges",
        nargs="+",
        type=str,
        default=None,
        help="merging methods; a name with _runtime is the method's run-time form, one with"
        " _aligned aligns each head with the merged features at every coefficient (default:"
        " task_arithmetic, ties and both forms of orthogonal_mc_dropout)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=suite.seeds, help="training seeds")
    parser.add_argument(
        "--coefficients",
        nargs="+",
        type=float,
        default=suite.coefficients,
        help="grid of the scaling coefficient, chosen on validation",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=suite.samples,
        help="Monte Carlo samples that a run-time merge averages",
    )
    parser.add_argument(
        "--study",
        type=Literal["modes"] | None,
        default=None,
        help="modes: in place of a comparison, search how A is confined, at which modules (the"
        " suite's, or those that PEFT adapts by default), at which rank and learning rate, for high"
        " individual and merged validation scores; writes study.csv, study.html and, ready"
        " for --arms, arms.yaml: the best, and plain LoRA of their rank and rate; merges by"
        " task_arithmetic and regmean unless --merges says otherwise",
    )
    parser.add_argument(
        "--study-minutes",
        type=float | None,
        default=None,
        help="end the study after so many minutes (default: 90, without limit if --study-trials is"
        " given); the same command goes on with it",
    )
    parser.add_argument(
        "--study-trials",
        type=int | None,
        default=None,
        help="end the study after so many trials, those of earlier runs included",
    )
    add_workers_argument(parser)
    add_trainer_arguments(parser)


def run(config: Namespace, raw: Namespace) -> None:
    """Run the suite, or the study, and print where the results are."""
    if config.study is not None:
        _study(config, raw)
        return
    for flag in ("minutes", "trials"):
        if config[f"study_{flag}"] is not None:
            raise UserError(f"--study-{flag} is given without a study: add --study modes")
    from rich.console import Console

    from benchmarks.bench import DEFAULT_MERGES, Bench, BenchSettings
    from benchmarks.progress import TerminalProgress
    from benchmarks.report.table import results_table

    suite = read_suite(config, config.tasks)
    settings = BenchSettings(_arms(config, suite), config.merges or DEFAULT_MERGES)
    run_dir = run_directory(config, suite.name, suite.preset)
    model = resolve(suite.model)
    with TerminalProgress(Bench.count_stages(suite, settings)) as progress:
        bench = Bench(
            suite=suite,
            model=model,
            settings=settings,
            run_dir=run_dir,
            progress=progress,
            workers=count_workers(config, model),
            trainer_options=trainer_options(raw.trainer),
        )
        results = bench.run()
    console = Console()
    console.print(results_table(results))
    print(f"results: {run_dir}/results.csv, results.json; report: {run_dir}/report.html")


def _arms(config: Namespace, suite: Suite) -> list[ArmSettings]:
    """What is compared: the arms of a file, or one for every initialisation."""
    from benchmarks.arms import arms_of_inits, load_arms

    if config.arms is None:
        check_inits(config.inits, config.subspace)
        return arms_of_inits(config.inits, config.subspace, suite)
    if config.inits != DEFAULT_INITS or config.subspace != SubspaceSettings():
        raise UserError(
            f"--arms {config.arms} says what is compared: leave out --inits and --subspace.*, or"
            " the file"
        )
    return load_arms(config.arms, suite)


def _study(config: Namespace, raw: Namespace) -> None:
    """Search, and print the Pareto front."""
    from rich.console import Console

    from benchmarks.bench import Bench, BenchSettings
    from benchmarks.report.study import front_table
    from benchmarks.study import DEFAULT_MERGES, DEFAULT_MINUTES, Study, StudySettings
    from benchmarks.study_progress import StudyProgress

    if config.arms or config.inits != DEFAULT_INITS or config.subspace != SubspaceSettings():
        raise UserError(
            f"--study {config.study} searches the arms itself: leave out --arms, --inits and"
            " --subspace.*"
        )
    suite = read_suite(config, config.tasks)
    where = run_directory(config, suite.name, suite.preset)
    model = resolve(suite.model)
    minutes, trials = config.study_minutes, config.study_trials
    settings = StudySettings(
        minutes=DEFAULT_MINUTES if minutes is None and trials is None else minutes,
        trials=trials,
        workers=count_workers(config, model),
    )
    bench = Bench(
        suite=suite,
        model=model,
        settings=BenchSettings(_arms(config, suite), config.merges or DEFAULT_MERGES),
        run_dir=where,
        trainer_options=trainer_options(raw.trainer),
    )
    with StudyProgress(settings) as progress:
        results = Study(bench, settings, progress).run()
    console = Console()
    console.print(front_table(results))
    print(f"trials: {where}/study.csv; plot: {where}/study.html")
    print(f"finalists: {where}/arms.yaml, for osrm bench --arms")
