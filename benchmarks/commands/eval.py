"""`osrm eval`: score adapters, a merged bundle, or a merge made on the fly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from benchmarks.commands.common import MODEL_HELP, add_suite_arguments, check_file, read_suite
from benchmarks.commands.merging import (
    add_merge_arguments,
    coefficient,
    load_adapters,
    method_options,
)
from benchmarks.commands.scoring import (
    base_model,
    check_max_length,
    load_evaluator,
    scored_tasks,
    truncations,
    with_heads,
)
from benchmarks.commands.statistics import STATISTICS, load_statistics, named
from benchmarks.results import RUNTIME_SUFFIX, Split, without_nan
from benchmarks.suites import load_suite
from merge_algorithms import EmrBundle, methods
from merge_algorithms.emr_bundle import is_bundle
from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_file
from merge_algorithms.registry import get_method

if TYPE_CHECKING:
    from benchmarks.evaluate import Evaluator, Scores
    from trainers.data import TaskData
    from trainers.store import Report


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm eval`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        type=str,
        help="adapter directories (or Hub ids), or one merge or EMR bundle; NAME=PATH says which"
        " task of the suite an adapter without osrm.json is for",
    )
    add_suite_arguments(parser, arguments, ["train", "rows"])
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help=f"{MODEL_HELP} (default: the one that the adapters record)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=str,
        default=None,
        help="tasks to score (default: all that the adapters have heads for, or, of plain PEFT"
        " language models, are named after; the suite has to have one for each adapter then)",
    )
    parser.add_argument(
        "--split", type=Literal["validation", "test"], default="test", help="which rows"
    )
    parser.add_argument(
        "--merge",
        type=str | None,
        default=None,
        help="merge the adapters by this method first: at run time if it has such a form"
        f" ({', '.join(methods(runtime=True))}), else in the weights"
        f" ({', '.join(methods())}); without it every adapter is scored on its own task alone",
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="draws that a run-time merge averages"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random masks")
    parser.add_argument(
        "-o", "--output", type=Path | None, default=None, help="JSON file for the scores"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_merge_arguments(parser, "--coefficient")


def run(config: Namespace, raw: Namespace) -> None:
    """Score and print a table."""
    from benchmarks.evaluate import evaluate_fusion, evaluate_individual
    from benchmarks.fusion import Fusion

    if config.output is not None:
        check_file(config.output, config.overwrite)
    scale = coefficient(config.coefficient)
    bundle = _bundle(config)
    adapters = [bundle.heads()] if bundle else load_adapters(config.adapters, config.model)
    runtime = config.merge in methods(runtime=True)
    if config.samples < 1 or (config.samples > 1 and not runtime):
        raise UserError(
            f"--samples {config.samples} with --merge {config.merge}: a run-time merge"
            f" ({', '.join(methods(runtime=True))}) averages 1 or more, any other takes none"
        )
    suite = load_suite(config.suite, preset=config.preset, data_dir=config.data_dir)
    check_max_length(config.train.max_length, suite, adapters)
    adapters = with_heads(suite, config.tasks, adapters)
    suite = read_suite(config, scored_tasks(suite, config.tasks, adapters, "--tasks"))
    method = get_method(config.merge, runtime) if config.merge is not None else None
    options = method_options(config)
    files = any(config[flag] for flag in STATISTICS)
    if method is None and (options or config.weights or scale != 1 or files):
        raise UserError(
            "without --merge every adapter is scored alone, as it is: name the method that the"
            " weights, the coefficient, the statistics files or the options are for"
        )
    statistics = load_statistics(config, adapters, method) if method else None
    model = base_model(config.model, adapters, suite.model)
    evaluator = load_evaluator(suite, model, adapters)
    from benchmarks.progress import TerminalProgress

    with TerminalProgress(1) as progress:
        stage = f"scoring {', '.join(evaluator.data)}"
        report = progress.started(stage)
        if bundle is not None:
            scores = _score_bundle(evaluator, bundle, config.split, report)
        elif method is None:
            scores = evaluate_individual(evaluator, adapters, config.split, report)
        else:
            fusion = Fusion(
                adapters,
                method.name + (RUNTIME_SUFFIX if runtime else ""),
                config.seed,
                config.weights,
                statistics,
                **options,
            )
            scores = evaluate_fusion(evaluator, fusion, scale, config.split, config.samples, report)
        progress.finished(stage, reused=False)
    if config.output is not None:
        with atomic_file(config.output) as file:
            file.write_text(json.dumps(without_nan(scores), indent=1) + "\n", encoding="utf-8")
    Console().print(_table(scores, evaluator.data, config.split))
    for line in truncations(evaluator.data, adapters, config.split, "--train.max_length"):
        print(line)


def _bundle(config: Namespace) -> EmrBundle | None:
    """The bundle that is to be scored, if one is; UserError for what does not go with one."""
    source = next((path for _, path in map(named, config.adapters) if is_bundle(path)), None)
    if source is None:
        return None
    if len(config.adapters) > 1 or config.merge is not None:
        raise UserError(
            f"{source} is an EMR bundle, in which every task has its own model: score it alone,"
            " without --merge"
        )
    return EmrBundle.load(source)


def _score_bundle(evaluator: Evaluator, bundle: EmrBundle, split: Split, report: Report) -> Scores:
    """Scores of every task under its own model."""
    scores: Scores = {}
    for done, task in enumerate(evaluator.data, 1):
        with bundle.merged(bundle.owners.get(task, task)).apply_to(evaluator.backbone):
            scores |= evaluator.scores(split, [task])
        report(done, len(evaluator.data))
    return scores


def _table(scores: Scores, data: Mapping[str, TaskData], split: Split) -> Table:
    table = Table("task", "rows", "metric", f"{split} score")
    for task, metrics in scores.items():
        for metric, score in metrics.items():
            table.add_row(task, str(len(data[task].rows(split))), metric, f"{score:.3f}")
    return table
