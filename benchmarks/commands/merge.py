"""`osrm merge`: adapters on disk to one adapter on disk, a checkpoint, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from benchmarks.commands.common import MODEL_HELP, SUITE_HELP, check_apart, check_parent
from benchmarks.commands.merging import (
    add_merge_arguments,
    coefficient,
    load_adapters,
    method_options,
)
from benchmarks.commands.scoring import base_model
from benchmarks.commands.statistics import load_statistics, named
from benchmarks.hub import check_repository, push
from merge_algorithms import Adapter, EmrBundle, Merged, UserError, diffusers_file, merge, methods
from merge_algorithms.adapter import Format, check_adapter_output
from merge_algorithms.card import VISIBLE
from merge_algorithms.checkpoint import Checkpoint
from merge_algorithms.emr_bundle import check_bundle_output
from merge_algorithms.errors import suggest
from merge_algorithms.files import check_vacant
from merge_algorithms.heads import check_head_names
from merge_algorithms.registry import Method, get_method
from merge_algorithms.task_vectors import align

if TYPE_CHECKING:
    from trainers.backbone import ModelRef

EMR = "emr"  # the one run-time method that can be written: a bundle, or one task's model
TRIALS = 30
SHOWN = 16  # adapters that the closing line names


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm merge`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        type=str,
        help="PEFT LoRA directories (or Hub ids); NAME=PATH names one other than its task or"
        " directory",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_argument(
        "--method",
        type=str,
        default="task_arithmetic",
        help=f"{', '.join(methods())}, or emr, which writes a bundle with a model for each adapter"
        " (one of them as an adapter with --task); `osrm methods` explains them",
    )
    parser.add_argument(
        "--rank",
        type=int | None,
        default=None,
        help="rank of the merged adapter (default: the sum of the adapters' ranks, which is exact"
        " for low-rank methods); the share of energy that a truncation loses is printed",
    )
    parser.add_argument(
        "--head",
        type=str | None,
        default=None,
        help="name of the adapter whose classification head the merged adapter carries for stock"
        " PEFT (default: all heads are kept beside it, one file each)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of random masks and of a search's proposals"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path | None,
        default=None,
        help="directory of the merged adapter; this or --checkpoint, or both",
    )
    parser.add_argument(
        "--format",
        type=Format,
        default="peft",
        help="format of the merged adapter: a PEFT directory, or what a diffusers pipeline loads",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path | None,
        default=None,
        help="directory of a copy of the base model with the merge in its weights",
    )
    parser.add_argument(
        "--base",
        type=str | None,
        default=None,
        help=f"{MODEL_HELP} (default: the one that the adapters record); --checkpoint and"
        " --tune.suite load it, and the merge records it or, of a directory, the Hub id that the"
        " adapters record",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--push-to-hub",
        type=str | None,
        default=None,
        help="upload what was written to this repository, ORGANISATION/NAME, of the Hugging Face"
        " Hub; it is made if it does not exist, and if it does, weights, adapters, heads,"
        " configurations and tokenizers there give way to the new ones",
    )
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    add_merge_arguments(parser, "--scale")
    _add_tune_arguments(parser)


def _add_tune_arguments(parser: ArgumentParser) -> None:
    """--tune.suite and how the search goes."""
    group = parser.add_argument_group(
        "choosing values on validation rows (--tune.suite turns it on)"
    )
    group.add_argument(
        "--tune.suite",
        type=str | None,
        default=None,
        help=f"score merges on the validation rows of this suite's tasks, each with its own head,"
        f" and keep the values with the best mean headline metric: {SUITE_HELP}; finished trials"
        " are kept beside the output (DIR.trials.json) until the merge is written, so that a"
        " search that was stopped goes on",
    )
    group.add_argument("--tune.preset", type=str | None, default=None, help="preset of the suite")
    group.add_argument(
        "--tune.data_dir",
        type=str | None,
        default=None,
        help="read every task from DATA_DIR/<task>/<split>.jsonl (or .csv, .parquet)",
    )
    group.add_argument(
        "--tune.tasks",
        nargs="+",
        type=str,
        default=None,
        help="tasks that decide (default: all that the adapters have heads for, or, of plain PEFT"
        " language models, are named after; the suite has to have one for each adapter then)",
    )
    group.add_argument(
        "--tune.coefficients",
        nargs="+",
        type=float,
        default=None,
        help="try each of these as --scale (default: the suite's grid)",
    )
    group.add_argument(
        "--tune.parameters",
        type=dict[str, list[Any]],
        default={},
        help="search several values at once with Optuna instead: ranges of scale, of weights (one"
        " is found for each adapter) and of the method's options, such as"
        " '{scale: [0.1, 2], density: [0.05, 0.9], combine: [mean, sum]}'",
    )
    group.add_argument(
        "--tune.trials",
        type=int | None,
        default=None,
        help=f"how many proposals of Optuna are scored (default: {TRIALS})",
    )
    group.add_argument(
        "--tune.test",
        action="store_true",
        help="score the test rows as well, once, with the values that were chosen",
    )
    group.add_argument(
        "--tune.heads",
        type=bool,
        default=False,
        help="once the values are chosen, align each task's head with the merged features of its"
        " training rows' texts (labels are not read; validation rows say how strongly), score"
        " again, and write these heads; the search itself takes the heads as they were trained",
    )


def run(config: Namespace, raw: Namespace) -> None:
    """Choose values if that is asked for, merge, save, say what was lost, upload."""
    _check(config)
    adapters = load_adapters(config.adapters, config.base)
    heads = [head for adapter in adapters for head in adapter.heads]
    if config.head is not None and config.head not in heads:
        raise UserError(f"no adapter has a head '{config.head}': {suggest(config.head, heads)}")
    method = _method(config.method)
    names = [adapter.name for adapter in adapters]
    if config.method == EMR and config.task not in (None, *names):
        raise UserError(f"no adapter is of task '{config.task}': {suggest(config.task, names)}")
    statistics = load_statistics(config, adapters, method)
    values: dict[str, Any] = method_options(config)
    if config.weights is not None:
        if len(config.weights) == 1 < len(adapters):
            raise UserError(
                f"--weights is {config.weights[0]:g} alone, for {len(adapters)} adapters: give one"
                f" for each, or multiply the whole merge by --scale {config.weights[0]:g}"
            )
        values["weights"] = config.weights
    if (scale := coefficient(config.scale)) != 1:
        values["scale"] = scale
    base = base_model(config.base, adapters) if config.checkpoint is not None else None
    if base is not None:
        Checkpoint.open(base.path).check_output(config.checkpoint, config.overwrite)
    _check_result(config, adapters, base)
    evaluation: dict[str, Any] = {}
    aligned: dict[str, dict[str, Tensor]] = {}
    if config.tune.suite is not None:
        from benchmarks.commands.tuning import trials_file, tune

        trials = TRIALS if config.tune.trials is None else config.tune.trials
        values, evaluation, aligned = tune(config, adapters, method, statistics, values, trials)
    merged = _merged(method, adapters, config.seed, statistics, values)
    listed = ", ".join(names) if len(names) <= SHOWN else f"{len(names)} adapters"
    said = f"{method.name} of {listed}"
    if isinstance(merged, EmrBundle):
        unified = replace(merged.unified, evaluation=evaluation)
        replace(merged, unified=unified).save(config.output, config.overwrite)
        print(f"{config.output}: {said}, a model for each; {_sizes(config.output, adapters)}")
    else:
        merged = replace(merged, evaluation=evaluation, heads=merged.heads | aligned)
        _save(config, merged, base, said)
    if config.tune.suite is not None:
        trials_file(config).unlink(missing_ok=True)  # osrm.json has what came of them
    if config.push_to_hub is not None:
        directory = config.output or config.checkpoint
        print(f"uploaded to {push(directory, config.push_to_hub, config.private)}")


def _merged(
    method: Method,
    adapters: Sequence[Adapter],
    seed: int,
    statistics: Mapping[str, Mapping[str, Tensor]] | None,
    values: Mapping[str, Any],
) -> Merged | EmrBundle:
    """The merge with these weights, options and scale; of emr for all tasks, or for --task."""
    options = {name: value for name, value in values.items() if name not in ("weights", "scale")}
    weights, scale = values.get("weights"), values.get("scale", 1.0)
    if not method.runtime:
        whole = merge(adapters, method.name, weights, seed, statistics, **options)
        return whole.scaled(scale)
    task = options.get("task")
    checked = method.check_options({"task": adapters[0].name, **options})
    bundle = EmrBundle.build(adapters, weights, checked["rescale"]).scaled(scale)
    return bundle if task is None else bundle.merged(task)


def _save(config: Namespace, merged: Merged, base: ModelRef | None, said: str) -> None:
    said = f"{said}; {len(merged.updates)} modules"
    if base is not None:
        merged.save_checkpoint(config.checkpoint, base.path, config.overwrite)
        print(f"{config.checkpoint}: {said}, in the weights of {base.name}")
    if config.output is not None:
        lost = merged.save_adapter(
            config.output, config.rank, config.head, config.overwrite, config.format
        )
        print(f"{config.output}: {said}{_loss(lost)}")


def _check(config: Namespace) -> None:
    """Refuse what would only fail after the work, and flags that would do nothing."""
    outputs = [path for path in (config.output, config.checkpoint) if path is not None]
    if not outputs:
        raise UserError("nothing would be written: give -o DIR, --checkpoint DIR, or both")
    if len(outputs) == 2 and config.output.resolve() == config.checkpoint.resolve():
        raise UserError(f"-o and --checkpoint are both {config.output}: give two directories")
    if config.output is not None:
        bundle = config.method == EMR and config.task is None
        check = check_bundle_output if bundle else check_adapter_output
        check(config.output, config.overwrite)
    if config.checkpoint is not None:  # what it may replace is known once its base is
        check_vacant(config.checkpoint, config.overwrite)
    for path in outputs:
        check_parent(path)
    files = [*config.adapters, *config.covariances, *config.fishers]
    check_apart(outputs, [*(path for _, path in map(named, files)), *filter(None, [config.base])])
    for name in ("rank", "head"):
        if config[name] is not None and config.output is None:
            raise UserError(f"--{name} is about the merged adapter: give -o DIR as well")
    if config.format != "peft" and config.output is None:
        raise UserError("--format is about the merged adapter: give -o DIR as well")
    if config.rank is not None and config.rank < 1:
        raise UserError(f"--rank {config.rank} is not possible: give a rank of at least 1")
    if config.push_to_hub is None and config.private:
        raise UserError("--private is about the upload: give --push-to-hub ORGANISATION/NAME too")
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub)
        if len(outputs) == 2:
            raise UserError(
                "--push-to-hub uploads one directory: give either -o or --checkpoint with it"
            )
    _check_tune(config)
    if config.method == EMR and config.task is None:
        one = {name: config[name] for name in ("checkpoint", "rank", "head")}
        one["format"] = None if config.format == "peft" else config.format
        if given := [name for name, value in one.items() if value is not None]:
            raise UserError(
                f"--{given[0]} is about one model, but {EMR} writes a bundle with a model for each"
                " adapter: choose one of them with --task NAME"
            )


def _check_result(config: Namespace, adapters: Sequence[Adapter], base: ModelRef | None) -> None:
    """Refuse, before a search or half of the output, what could not be written in any case."""
    tasks = align(adapters)
    owners = [a for a in adapters if config.method != EMR or config.task in (None, a.name)]
    heads = [head for adapter in owners for head in adapter.heads]
    kept = heads if config.head is None else [config.head]  # by the adapter; a checkpoint has all
    check_head_names(kept if base is None else heads)
    if base is not None:
        shapes = {module: updates[0] for module, updates in tasks.modules.items()}
        Checkpoint.open(base.path).plan(shapes, tasks.layouts)
    if config.format == "diffusers":
        diffusers_file.check(config.output.name, tasks.modules, tasks.layouts, kept)


def _check_tune(config: Namespace) -> None:
    """Refuse flags that contradict each other, or say how to search without saying on what."""
    settings = config.tune
    if settings.suite is None:
        given = [name for name, value in settings.items() if value not in (None, False, {})]
        if given:
            raise UserError(
                f"--tune.{given[0]} is about a search on validation rows: name their suite with"
                " --tune.suite"
            )
    if settings.heads and config.method == EMR:
        raise UserError(
            f"--tune.heads aligns heads with a merge that is in the weights, and {EMR} works at run"
            " time: leave it out, or choose another --method"
        )
    if settings.trials is not None and not settings.parameters:
        raise UserError(
            "--tune.trials is about a search by Optuna: say what to search with --tune.parameters"
        )
    if settings.parameters and settings.coefficients:
        raise UserError(
            "--tune.coefficients is a grid of the scale alone, --tune.parameters a search by"
            " Optuna: give one of them (the second takes scale: [lowest, highest])"
        )


def _method(name: str) -> Method:
    if name == EMR:
        return get_method(name, runtime=True)
    if name not in methods() and name in methods(runtime=True):
        raise UserError(
            f"method '{name}' has no merged weights to write, it works while the model runs:"
            f" score it with `osrm eval --merge {name}`, use it with merge_algorithms.attach()"
        )
    return get_method(name)


def _sizes(path: Path, adapters: Sequence[Adapter]) -> str:
    """What a bundle takes on disk, and what the adapters take that it was made from."""
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    updates = [update for adapter in adapters for update in adapter.updates.values()]
    factors = sum(4 * (update.b.numel() + update.a.numel()) for update in updates)
    return f"{held / 1e6:.1f} MB, the adapters' factors are {factors / 1e6:.1f} MB"


def _loss(lost: Mapping[str, float]) -> str:
    worst = max(lost, key=lambda module: lost[module])
    if lost[worst] < VISIBLE:
        return ""
    return f"; truncation lost at most {lost[worst]:.1%} of a module's energy ({worst})"
