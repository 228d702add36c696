"""`osrm eval`: score adapters, a merged bundle, or a merge made on the fly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from benchmarks.commands.common import MODEL_HELP, add_suite_arguments, read_suite, resolve
from benchmarks.commands.merging import add_method_options, load_adapters, method_options
from benchmarks.progress import TerminalProgress
from benchmarks.results import RUNTIME_SUFFIX
from benchmarks.suites import load_suite
from merge_algorithms import Adapter, methods
from merge_algorithms.adapter import base_models
from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_file

if TYPE_CHECKING:
    from benchmarks.evaluate import Scores, Split
    from trainers.backbone import ModelRef
    from trainers.data import TaskData


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm eval`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        type=str,
        help="adapter directories (or Hub ids), or one merged bundle; NAME=PATH says which task"
        " of the suite an adapter without osrm.json is for",
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
        help="tasks to score (default: all that the adapters have heads for)",
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
    parser.add_argument("--coefficient", type=float, default=1.0, help="scale of the merged update")
    parser.add_argument(
        "--samples", type=int, default=1, help="draws that a run-time merge averages"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random masks")
    parser.add_argument(
        "-o", "--output", type=Path | None, default=None, help="JSON file for the scores"
    )
    add_method_options(parser, runtime=(False, True))


def run(config: Namespace, raw: Namespace) -> None:
    """Score and print a table."""
    from benchmarks.evaluate import (
        Fusion,
        evaluate_fusion,
        evaluate_individual,
        make_evaluator,
    )
    from trainers.backbone import load_tokenizer
    from trainers.data import TaskData

    if config.output is not None and config.output.exists():
        raise UserError(f"{config.output} already exists: choose another -o")
    adapters = load_adapters(config.adapters)
    runtime = config.merge in methods(runtime=True)
    if config.samples < 1 or (config.samples > 1 and not runtime):
        raise UserError(
            f"--samples {config.samples} with --merge {config.merge}: a run-time merge"
            f" ({', '.join(methods(runtime=True))}) averages 1 or more, any other takes none"
        )
    suite = read_suite(config, _tasks(config, adapters))
    model = _model(config, adapters, suite.model)
    tokenizer = load_tokenizer(model.path)
    data = {}
    for name, task in suite.tasks.items():
        info = next((a.head_info(name) for a in adapters if name in a.heads), None) or {}
        train = replace(suite.train, max_length=info.get("max_length", suite.train.max_length))
        data[name] = TaskData(task, tokenizer, train, suite.rows)
    evaluator = make_evaluator(model, data, adapters)
    with TerminalProgress(1) as progress:
        stage = f"scoring {', '.join(data)}"
        report = progress.started(stage)
        if config.merge is None:
            scores = evaluate_individual(evaluator, adapters, config.split, report)
        else:
            method = config.merge + (RUNTIME_SUFFIX if runtime else "")
            fusion = Fusion(adapters, method, config.seed, **method_options(config))
            scores = evaluate_fusion(
                evaluator, fusion, config.coefficient, config.split, config.samples, report
            )
        progress.finished(stage, reused=False)
    if config.output is not None:
        with atomic_file(config.output) as file:
            file.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    Console().print(_table(scores, data, config.split))


def _model(config: Namespace, adapters: Sequence[Adapter], default: str) -> ModelRef:
    """The base model that all adapters record, or the one given; UserError if they differ."""
    bases = base_models(adapter.config for adapter in adapters)
    if len(bases) > 1:
        raise UserError(
            f"the adapters were trained on different base models ({' and '.join(bases)}): evaluate"
            " those of one base at a time"
        )
    model = resolve(config.model or next(iter(bases), default))
    for adapter in adapters:
        recorded = adapter.info.get("model_fingerprint", model.fingerprint)
        if recorded != model.fingerprint:
            raise UserError(
                f"adapter '{adapter.name}' was trained on a model with fingerprint {recorded}, but"
                f" {model.path} has {model.fingerprint}: give the same base model with --model"
            )
    return model


def _tasks(config: Namespace, adapters: Sequence[Adapter]) -> list[str]:
    """The tasks asked for, or those that the adapters have heads for."""
    suite = load_suite(config.suite, preset=config.preset, data_dir=config.data_dir)
    if config.tasks:
        return list(config.tasks)
    heads = [task for adapter in adapters for task in adapter.heads]
    tasks = [task for task in heads if task in suite.tasks]
    if not tasks:
        raise UserError(
            f"the adapters' heads ({', '.join(heads) or 'none'}) are for no task of suite"
            f" '{suite.name}' ({', '.join(suite.tasks)}): choose another --suite, or say which"
            " task an adapter is for as TASK=PATH"
        )
    return tasks


def _table(scores: Scores, data: Mapping[str, TaskData], split: Split) -> Table:
    table = Table("task", "rows", "metric", f"{split} score")
    for task, metrics in scores.items():
        for metric, score in metrics.items():
            table.add_row(task, str(len(data[task].rows(split))), metric, f"{score:.3f}")
    return table
