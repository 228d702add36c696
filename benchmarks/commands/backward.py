"""What one trained adapter's model says of its own task by its gradients: fisher, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import MODEL_HELP, add_suite_arguments, check_file, read_suite
from benchmarks.commands.merging import load_adapters
from benchmarks.commands.scoring import base_model, check_max_length, load_evaluator, scored_tasks
from benchmarks.suites import load_suite
from merge_algorithms.errors import UserError

if TYPE_CHECKING:
    from osrm import Fisher, Gradients

Found = TypeVar("Found", bound="Fisher | Gradients")

WITHOUT = {
    "fisher": "merge them by another method than fisher",
    "gradients": "train them without --gradients",
}
"""Command -> what those do who cannot have what it collects."""


def add_backward_arguments(
    parser: ArgumentParser, arguments: Sequence[str], draws: int | None, read_by: str
) -> None:
    """Flags of a command that collects something of an adapter's model on its task.

    Args:
        parser: Of the command.
        arguments: The command line, which says which suite it is about.
        draws: Default of --draws.
        read_by: What reads the files.
    """
    parser.add_argument(
        "adapter",
        type=str,
        help="directory (or Hub id) of an adapter with its head, as osrm train or a PEFT classifier"
        " leaves it (no language model's); TASK=PATH says which task of the suite it is for if it"
        " does not record that",
    )
    add_suite_arguments(parser, arguments, ["train"])
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help=f"{MODEL_HELP} (default: the one that the adapter records)",
    )
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="task of the suite (default: the one that the adapter has a head for)",
    )
    parser.add_argument(
        "--examples",
        type=int | None,
        default=100,
        help="training rows that it is the mean over (null: all)",
    )
    parser.add_argument(
        "--draws",
        type=int | None,
        default=draws,
        help="classes to draw per row from the prediction, a backward pass for each, in place of"
        " the exact sum over all (null), which takes one for every class but one",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn classes")
    parser.add_argument(
        "--targets",
        nargs="+",
        type=str,
        default=None,
        help="modules, named as in --adapter.targets of osrm train (default: the adapter's own);"
        " where adapters have different modules, name those of all of them in each run",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help=f"file to write; {read_by}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def collect(config: Namespace, collector: Callable[..., Found], command: str) -> Found:
    """What the collector finds of the adapter's model on its task's training rows; it is saved.

    Args:
        config: What `add_backward_arguments` asks for.
        collector: `osrm.collect_fisher`, or one with the same arguments.
        command: Name of the command.
    """
    from merge_algorithms import merge

    check_file(config.output, config.overwrite)
    if config.examples is not None and config.examples < 1:
        raise UserError(f"--examples {config.examples}: take at least 1 row, or null for all")
    adapters = load_adapters([config.adapter])
    suite = load_suite(config.suite, preset=config.preset, data_dir=config.data_dir)
    language = {name for name, task in suite.tasks.items() if task.kind == "causal_lm"}
    own = {config.task} if config.task else {adapters[0].name, *adapters[0].heads}
    if own & language or language == set(suite.tasks):
        raise UserError(
            f"task '{min(own & language or language)}' of suite '{suite.name}' is a causal_lm, and"
            f" osrm {command} supports no language models: {WITHOUT[command]}"
        )
    tasks = scored_tasks(suite, [config.task] if config.task else None, adapters)
    if len(tasks) > 1:
        raise UserError(
            f"{config.adapter} has heads for several tasks ({', '.join(tasks)}): name one with"
            " --task"
        )
    (task,) = tasks
    check_max_length(config.train.max_length, suite, adapters)
    suite = read_suite(config, tasks)
    # --examples alone says how many, not the preset.
    suite = replace(suite, rows=replace(suite.rows, train=None, covariance=config.examples))
    model = base_model(config.model, adapters, suite.model)
    evaluator = load_evaluator(suite, model, adapters)
    data = evaluator.data[task]
    with merge(adapters).apply_to(evaluator.backbone):
        found = collector(
            evaluator.backbone,
            data.covariance_dataloader(),
            config.targets or list(adapters[0].updates),
            predict=lambda batch: evaluator.logits(task, batch),
            draws=config.draws,
            seed=config.seed,
            meta={
                "task": task,
                "model": model.name,
                "model_fingerprint": model.fingerprint,
                "data_fingerprint": data.fingerprint("covariance"),
                "tuned_fingerprint": adapters[0].fingerprint,
            },
            progress=True,
        )
    found.save(config.output)
    return found
