"""`osrm covariance`: one task's input covariance, to keep or to publish without its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import add_suite_arguments, read_suite, resolve
from merge_algorithms.errors import UserError


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm covariance`."""
    add_suite_arguments(parser, arguments, ["model", "adapter", "train", "rows"])
    parser.add_argument("--task", type=str, required=True, help="task of the suite")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write, such as stsb.safetensors"
    )
    parser.add_argument(
        "--padded",
        action="store_true",
        help="pad rows to max_length, as the means of `--subspace.init official` need",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(config: Namespace, raw: Namespace) -> None:
    """Collect and save."""
    from trainers.backbone import load_tokenizer
    from trainers.data import TaskData
    from trainers.jobs import task_covariance

    if config.output.exists() and not config.overwrite:
        raise UserError(f"{config.output} already exists: choose another -o or add --overwrite")
    suite = read_suite(config, [config.task])
    model = resolve(suite.model)
    task = suite.tasks[config.task]
    data = TaskData(task, load_tokenizer(model.path), suite.train, suite.rows)
    covariance = task_covariance(model, data, suite.adapter.targets, config.padded, progress=True)
    covariance.save(config.output)
    print(
        f"{config.output}: {len(covariance.matrices)} matrices for {len(covariance.modules)}"
        f" modules from {covariance.tokens} tokens of task '{task.name}'"
    )
