"""`osrm train`: one task's adapter, in the subspace that the other tasks' covariances leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_suite_arguments,
    add_trainer_arguments,
    read_suite,
    resolve,
    trainer_options,
)
from merge_algorithms.errors import UserError
from trainers.settings import SubspaceSettings

if TYPE_CHECKING:
    from osrm import Covariance
    from trainers.backbone import ModelRef


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm train`."""
    add_suite_arguments(parser, arguments, ["model", "adapter", "head", "train", "rows"])
    parser.add_argument("--task", type=str, required=True, help="task of the suite")
    parser.add_argument(
        "--covariances",
        nargs="+",
        type=Path,
        default=[],
        help="covariance files of the other tasks, from osrm covariance; the task's own may be"
        " among them and is collected if it is not. Needed unless --subspace.init is lora",
    )
    parser.add_argument("--subspace", type=SubspaceSettings, default=SubspaceSettings())
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="adapter directory to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    add_trainer_arguments(parser)


def run(config: Namespace, raw: Namespace) -> None:
    """Train, save, print the validation scores."""
    from benchmarks.progress import TerminalProgress
    from merge_algorithms.files import atomic_directory
    from osrm import Covariance, subspace_state
    from trainers.backbone import load_tokenizer
    from trainers.data import TaskData
    from trainers.jobs import task_covariance
    from trainers.training import train_task

    replaceable = not config.output.exists() or (config.output / "adapter_config.json").exists()
    if not replaceable or (config.output.exists() and not config.overwrite):
        raise UserError(
            f"{config.output} already exists: choose another -o, or add --overwrite if it is an"
            " adapter"
        )
    suite = read_suite(config, [config.task])
    model = resolve(suite.model)
    data = TaskData(suite.tasks[config.task], load_tokenizer(model.path), suite.train, suite.rows)
    subspace: SubspaceSettings = config.subspace
    padded = subspace.init == "official"
    covariances = _by_task([(path, Covariance.load(path)) for path in config.covariances])
    for covariance in covariances.values():
        _check(covariance, model, padded)
    if covariances and config.task not in covariances:
        covariances[config.task] = task_covariance(
            model, data, suite.adapter.targets, padded, progress=True
        )
    state = None
    if subspace.init != "lora":
        if not set(covariances) - {config.task}:
            raise UserError(
                f"--subspace.init {subspace.init} needs the covariances of other tasks than"
                f" '{config.task}': pass their files with --covariances, or use"
                " --subspace.init lora"
            )
        rows = subspace.k if subspace.constraint == "project" else suite.adapter.rank
        state = subspace_state(covariances, config.task, suite.adapter.rank, subspace.init, k=rows)
    options, _ = trainer_options(raw.trainer)
    with (
        atomic_directory(config.output, overwrite=config.overwrite) as directory,
        TerminalProgress(1) as progress,
    ):
        stage = f"training {config.task}"
        report = progress.started(stage)
        scores = train_task(
            model,
            data,
            directory,
            adapter=suite.adapter,
            head=suite.head,
            train=suite.train,
            subspace=subspace,
            state=state,
            covariances=covariances,
            seed=config.seed,
            trainer_options=options,
            report=report,
        )
        progress.finished(stage, reused=False)
    text = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    print(f"{config.output}: task '{config.task}', validation {text}")


def _check(covariance: Covariance, model: ModelRef, padded: bool) -> None:
    """UserError unless the covariance was collected on this model and, for 'official', padded."""
    task = covariance.meta.get("task", "?")
    found = covariance.meta.get("model_fingerprint", model.fingerprint)
    if found != model.fingerprint:
        raise UserError(
            f"the covariance of task '{task}' was collected on {covariance.meta.get('model')}"
            f" (fingerprint {found}), but the model to train is {model.name} ({model.fingerprint}):"
            " collect it on the same model"
        )
    if padded and covariance.meta.get("padded") != "True":
        raise UserError(
            f"the covariance of task '{task}' has means over real tokens only: --subspace.init"
            " official needs it collected with osrm covariance --padded"
        )


def _by_task(loaded: Sequence[tuple[Path, Covariance]]) -> dict[str, Covariance]:
    """Covariances by the task that they name; UserError if two name the same."""
    result: dict[str, Covariance] = {}
    for path, covariance in loaded:
        task = covariance.meta.get("task", path.stem)
        if task in result:
            raise UserError(
                f"{path} is a second covariance of task '{task}': pass each task's file once"
            )
        result[task] = covariance
    return result
