"""`osrm bench`: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_suite_arguments,
    add_trainer_arguments,
    read_suite,
    resolve,
    trainer_options,
)
from trainers.settings import Init, SubspaceSettings


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm bench`."""
    suite = add_suite_arguments(parser, arguments, ["model", "adapter", "head", "train", "rows"])
    parser.add_argument(
        "--tasks", nargs="+", type=str, default=list(suite.tasks), help="tasks of the suite to use"
    )
    parser.add_argument(
        "--name",
        type=str | None,
        default=None,
        help="name of the run; by default the suite's and the preset's",
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument(
        "--inits",
        nargs="+",
        type=Init,
        default=["lora", "osrm"],
        help="initialisations of A to compare: PEFT's default, the paper's subspace (osrm), the"
        " released code's variant of it (official), and ours (contrastive); --subspace.* says the"
        " rest, for all but lora",
    )
    parser.add_class_arguments(SubspaceSettings, "subspace", skip={"init"})
    parser.add_argument(
        "--merges",
        nargs="+",
        type=str,
        default=None,
        help="merging methods; a name with _runtime is the method's run-time form (default:"
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
    add_trainer_arguments(parser)


def run(config: Namespace, raw: Namespace) -> None:
    """Run the suite and print where the results are."""
    from rich.console import Console

    from benchmarks.bench import DEFAULT_MERGES, Bench, BenchSettings
    from benchmarks.progress import TerminalProgress
    from benchmarks.report.table import results_table

    suite = read_suite(config, config.tasks)
    options, key = trainer_options(raw.trainer)
    settings = BenchSettings(
        inits=config.inits,
        subspace=config.subspace,
        merges=config.merges or DEFAULT_MERGES,
    )
    run_dir = config.runs_dir / (config.name or f"{suite.name}-{suite.preset}")
    with TerminalProgress(Bench.count_stages(suite, settings)) as progress:
        bench = Bench(
            suite=suite,
            model=resolve(suite.model),
            settings=settings,
            run_dir=run_dir,
            progress=progress,
            trainer_options=options,
            trainer_key=key,
        )
        results = bench.run()
    console = Console()
    console.print(results_table(results))
    console.print(f"results: {run_dir}/results.csv, results.json; report: {run_dir}/report.html")
