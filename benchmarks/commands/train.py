"""`osrm train`: one task's adapter, in the subspace that the other tasks' covariances leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_suite_arguments,
    add_trainer_arguments,
    check_adapter_directory,
    check_apart,
    read_suite,
    resolve,
    trainer_options,
)
from benchmarks.commands.statistics import check_padded, check_untuned, named, read_files
from merge_algorithms.errors import UserError
from trainers.settings import SubspaceSettings, idle


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm train`."""
    add_suite_arguments(parser, arguments, ["model", "adapter", "head", "train", "rows"])
    parser.add_argument("--task", type=str, required=True, help="task of the suite")
    parser.add_argument(
        "--covariances",
        nargs="+",
        type=str,
        default=[],
        help="covariance files of the other tasks, from osrm covariance; the task's own may be"
        " among them and is collected if it is not; TASK=PATH names the task of a file that does"
        " not record it. Needed unless --subspace.init is lora without a leak penalty",
    )
    parser.add_argument(
        "--gradients",
        nargs="+",
        type=str,
        default=[],
        help="gradients files of the other tasks, from osrm gradients: B is kept apart from what"
        " they read, as strictly as --subspace.output_mu says; TASK=PATH as above",
    )
    parser.add_argument("--subspace", type=SubspaceSettings, default=SubspaceSettings())
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the start, the order of the rows and dropout; not of which rows are used",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="adapter directory to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    add_trainer_arguments(parser)


def run(config: Namespace, raw: Namespace) -> None:
    """Train, save, print the validation scores."""
    from benchmarks.progress import TerminalProgress
    from merge_algorithms.files import atomic_directory
    from osrm import Covariance, Gradients, resolve_targets, with_prefix_of
    from trainers.backbone import auto_class, load_skeleton, load_tokenizer
    from trainers.data import TaskData
    from trainers.jobs import task_covariance
    from trainers.subspace import check_constraint, check_kind, task_subspace
    from trainers.training import train_task

    check_adapter_directory(config.output, config.overwrite)
    files = [*config.covariances, *config.gradients]
    check_apart([config.output], [path for _, path in map(named, files)])
    suite = read_suite(config, [config.task])
    model = resolve(suite.model)
    data = TaskData(suite.tasks[config.task], load_tokenizer(model.path), suite.train, suite.rows)
    subspace: SubspaceSettings = config.subspace
    if config.gradients:
        subspace = subspace.with_gradients()
    check_constraint(subspace)
    check_kind(subspace, data.task)
    if useless := idle(subspace):
        raise UserError(
            f"--subspace.{useless[0]} has no effect with init '{subspace.init}' and constraint"
            f" '{subspace.kept}': leave it out, or choose others"
        )
    padded = subspace.init == "official"
    covariances = read_files(Covariance, config.covariances, lambda task: model.fingerprint)
    gradients = read_files(Gradients, config.gradients, lambda task: model.fingerprint)
    if covariances or gradients:  # of classifiers, perhaps, which call the same modules otherwise
        skeleton = load_skeleton(model.path, auto_class(data.task.kind))
        modules = resolve_targets(skeleton, suite.adapter.targets)
        covariances = with_prefix_of(covariances, modules)
        gradients = with_prefix_of(gradients, modules)
    if subspace.needs_gradients and not set(gradients) - {config.task}:
        raise UserError(
            f"--subspace.output_mu {subspace.nu:g} needs the gradients of other tasks than"
            f" '{config.task}': pass the files that osrm gradients made of their adapters with"
            " --gradients"
        )
    if gradients and not subspace.needs_gradients:
        raise UserError(
            f"--gradients has no effect with --subspace.init {subspace.init} unless"
            " --subspace.output_mu is above 0: say how strictly B is to be kept apart, such as"
            " 0.15, or leave the files out"
        )
    check_untuned(covariances.values())
    if padded:
        check_padded(covariances.values())
    if covariances and config.task not in covariances:
        covariances[config.task] = task_covariance(
            model, data, suite.adapter.targets, padded, progress=True
        )
    alone = not set(covariances) - {config.task}
    if alone and subspace.needs_others:
        raise UserError(
            f"--subspace.init {subspace.init} with --subspace.leak_penalty"
            f" {subspace.gamma:g} needs the covariances of other tasks than"
            f" '{config.task}': pass their files with --covariances, or use --subspace.init lora"
            " without a penalty"
        )
    state = task_subspace(covariances, config.task, suite.adapter.rank, subspace, progress=True)
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
            gradients=gradients,
            seed=config.seed,
            trainer_options=trainer_options(raw.trainer),
            report=report,
        )
        progress.finished(stage, reused=False)
    text = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    print(f"{config.output}: task '{config.task}', validation {text}")
