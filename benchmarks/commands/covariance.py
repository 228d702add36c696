"""`osrm covariance`: one task's input covariance, to keep or to publish without its data."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from benchmarks.commands.common import (
    add_suite_arguments,
    changed,
    check_file,
    read_suite,
    resolve,
)
from benchmarks.commands.merging import load_adapters
from benchmarks.commands.scoring import base_model, check_max_length, trained_length
from benchmarks.suites import load_suite
from merge_algorithms.errors import UserError

if TYPE_CHECKING:
    from osrm import Covariance

# What says how to collect, and the default: nothing to a pool of files.
COLLECTING: dict[str, Any] = {
    "padded": False,
    "tuned": None,
    "sketch": None,
    "dtype": "float32",
    "spill": "auto",
    "spill_directory": None,
}


def add_arguments(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Flags of `osrm covariance`."""
    add_suite_arguments(parser, arguments, ["model", "adapter", "train", "rows"])
    parser.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="task of the suite; with --pool the name of the result",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="file to write, such as stsb.safetensors"
    )
    parser.add_argument(
        "--pool",
        type=Path,
        nargs="+",
        default=[],
        help="collect nothing, but pool these files, weighted by tokens: the shards of one task,"
        " or the tasks that are trained already, for one that arrives later (name them with"
        " --task; in training the file weighs as many tasks as are in it)",
    )
    parser.add_argument(
        "--padded",
        action="store_true",
        help="pad rows to max_length, as the means of `--subspace.init official` need",
    )
    parser.add_argument(
        "--tuned",
        type=str | None,
        default=COLLECTING["tuned"],
        help="collect from the model with this adapter in it (a PEFT LoRA directory or Hub id);"
        " model, target modules and the length of rows default to the adapter's. The task's own"
        " trained adapter gives what RegMean is defined on. Default: the base model alone, which is"
        " what a subspace to train in needs",
    )
    parser.add_argument(
        "--sketch",
        type=int | None,
        default=COLLECTING["sketch"],
        help="for modules that read more features than this, keep only so many of the strongest"
        " directions, and the mean energy of all others: small files and little memory for very"
        " wide models, at the price of larger leaks",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float64"],
        default=COLLECTING["dtype"],
        help="precision of the sums and of the file",
    )
    parser.add_argument(
        "--spill",
        type=Literal["auto"] | bool,
        default=COLLECTING["spill"],
        help="sum up in files on disk, mapped into memory: auto does if memory may not suffice",
    )
    parser.add_argument(
        "--spill-directory",
        type=Path | None,
        default=COLLECTING["spill_directory"],
        help="directory for these files (default: the system's for temporary files)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(config: Namespace, raw: Namespace) -> None:
    """Collect, or pool, and save."""
    check_file(config.output, config.overwrite)
    if config.pool and (flags := collecting(config)):
        raise UserError(f"--pool collects nothing, so --{flags[0]} has no effect: leave it out")
    covariance = pool(config.pool, config.task) if config.pool else collect(config)
    covariance.save(config.output)
    task = covariance.meta["task"]
    print(
        f"{config.output}: {len(covariance.matrices)} matrices for {len(covariance.modules)}"
        f" modules from {covariance.tokens} tokens of task '{task}'"
    )


def collecting(config: Namespace) -> list[str]:
    """The flags that say how to collect, where they differ from their defaults and the suite."""
    flags = [k.replace("_", "-") for k, default in COLLECTING.items() if config[k] != default]
    shipped = load_suite(config.suite, preset=config.preset, data_dir=config.data_dir)
    if config.model != shipped.model:
        flags.append("model")
    for group in ("adapter", "train", "rows"):
        flags += [f"{group}.{name}" for name in changed(config[group], getattr(shipped, group))]
    return flags


def collect(config: Namespace) -> Covariance:
    """The covariance of the task's training rows."""
    import torch

    from osrm import covariance_memory
    from trainers.backbone import auto_class, bare, load_skeleton, load_tokenizer
    from trainers.data import TaskData
    from trainers.jobs import task_covariance

    if config.task is None:
        raise UserError("which task? Give --task, or files to pool with --pool")
    suite = read_suite(config, [config.task])
    tuned = None if config.tuned is None else load_adapters([config.tuned])[0]
    targets, train = suite.adapter.targets, suite.train
    if tuned is None:
        model = resolve(suite.model)
    else:  # what the user leaves open is as the adapter has it
        shipped = load_suite(config.suite, preset=config.preset, data_dir=config.data_dir)
        check_max_length(train.max_length, shipped, [tuned])
        length = trained_length(config.task, [tuned], train.max_length)
        train = replace(train, max_length=length)
        given = suite.model if suite.model != shipped.model else None
        model = base_model(given, [tuned], suite.model)
        if targets == shipped.adapter.targets:
            kind = auto_class(suite.tasks[config.task].kind)
            targets = list(bare(tuned, load_skeleton(model.path, kind)).updates)
    sums = {"dtype": getattr(torch, config.dtype), "sketch": config.sketch}
    skeleton = load_skeleton(model.path, auto_class(suite.tasks[config.task].kind))
    bound = covariance_memory(skeleton, targets, **sums)
    print(f"the sums take at most {bound / 1e6:.1f} MB")
    data = TaskData(suite.tasks[config.task], load_tokenizer(model.path), train, suite.rows)
    where = {"spill": config.spill, "spill_directory": config.spill_directory}
    return task_covariance(
        model, data, targets, config.padded, progress=True, tuned=tuned, **sums, **where
    )


def pool(paths: Sequence[Path], task: str | None) -> Covariance:
    """The covariance of all files' data together.

    Raises:
        UserError: two files are of the same data, of different models or modules, or of different
            tasks without a name for the result.
    """
    from osrm import Covariance

    parts = [Covariance.load(path) for path in paths]
    if len({part.meta.get("tuned") for part in parts}) > 1:
        raise UserError(
            "the files to pool are of different models: some, or not all the same, were collected"
            " with --tuned"
        )
    seen: dict[tuple[str, str], Path] = {}
    for path, part in zip(paths, parts, strict=True):
        data = part.meta.get("data_fingerprint", part.fingerprint), part.meta.get("task", "")
        if data in seen:
            raise UserError(
                f"{seen[data]} and {path} are of the same data, which would count twice: pool each"
                " shard once"
            )
        seen[data] = path
    pooled = functools.reduce(operator.add, parts)
    name = task or pooled.meta.get("task")
    if name is None:
        raise UserError("the files to pool are of different tasks: name the result with --task")
    of = {
        part.meta.get("task", str(path)): part.pooled
        for path, part in zip(paths, parts, strict=True)
    }
    known = {"task": name} | ({"pooled": str(count)} if (count := sum(of.values())) > 1 else {})
    return replace(pooled, meta=pooled.meta | known)
