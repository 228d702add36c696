"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from benchmarks import assets
from benchmarks.schema import read_yaml
from benchmarks.suites import Suite, load_suite
from merge_algorithms.adapter import check_adapter_output
from merge_algorithms.errors import UserError
from trainers.settings import (
    AdapterSettings,
    HeadSettings,
    Init,
    RowSettings,
    SubspaceSettings,
    TrainerOptions,
    TrainSettings,
    idle,
)

if TYPE_CHECKING:
    from trainers.backbone import ModelRef

Settings = TypeVar("Settings", AdapterSettings, TrainSettings, RowSettings, SubspaceSettings)

SUITE_HELP = "a suite that ships with osrm (embedded, glue, glue-roberta-large, ..) or a YAML file"

PROCESS = 2**30  # bytes that a process takes without a model

MODEL_HELP = "base model: an asset (see osrm assets list), a directory, a .gguf file, or a Hub id"


def add_suite_arguments(
    parser: ArgumentParser,
    arguments: Sequence[str],
    groups: Sequence[str],
    default: str = "embedded",
) -> Suite:
    """Add --suite, --preset, --data-dir, --model and the settings groups, with the suite's values.

    The suite is read while the parser is built, so that --help and --print_config show the values
    that will be used.

    Args:
        parser: Where to add.
        arguments: What the user typed, to know the suite.
        groups: Which of 'model', 'adapter', 'head', 'train', 'rows' the command has.
        default: The suite if none is named.
    """
    chosen = peek(arguments)
    suite = load_suite(
        chosen.get("suite", default),
        preset=chosen.get("preset"),
        data_dir=chosen.get("data_dir"),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_argument("--suite", type=str, default=default, help=SUITE_HELP)
    parser.add_argument(
        "--preset",
        type=str,
        default=suite.preset,
        help="how much to run: smoke, quick, study or full, or another that the suite defines",
    )
    parser.add_argument(
        "--data-dir",
        type=str | None,
        default=None,
        help="read every task from DATA_DIR/<task>/<split>.jsonl (or .csv, .parquet)",
    )
    if "model" in groups:
        parser.add_argument("--model", type=str, default=suite.model, help=MODEL_HELP)
    defaults = {
        "adapter": (AdapterSettings, suite.adapter),
        "head": (HeadSettings, suite.head),
        "train": (TrainSettings, suite.train),
        "rows": (RowSettings, suite.rows),
    }
    for group in groups:
        if group in defaults:
            kind, value = defaults[group]
            parser.add_argument(f"--{group}", type=kind, default=value)
    return suite


class _ConfigFile(argparse.Action):
    """Sets every key at the top level of a YAML file."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *given: Any
    ) -> None:
        content = read_yaml(Path(given[0]))
        vars(namespace).update(content if isinstance(content, dict) else {})


def peek(arguments: Sequence[str], *switches: str) -> dict[str, Any]:
    """What is said of --suite, --preset, --data-dir and `switches`, and in files of all else.

    For what has to be known before the parser is there that reads them all. As there, flags and
    the files named by --config count in the order in which they are given: the later one wins.

    Args:
        arguments: What the user typed.
        switches: Further flags, without a value.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", action=_ConfigFile)
    for flag in ("--suite", "--preset", "--data-dir"):
        parser.add_argument(flag)
    for flag in switches:
        parser.add_argument(flag, action="store_true")
    return vars(parser.parse_known_args(arguments)[0])


def read_suite(config: Namespace, tasks: list[str] | None = None) -> Suite:
    """The suite with the values of the command line in place of its own."""
    suite = load_suite(config.suite, preset=config.preset, data_dir=config.data_dir, tasks=tasks)
    names = ("model", "adapter", "head", "train", "rows", "seeds", "coefficients", "samples")
    return replace(suite, **{name: config[name] for name in names if config.get(name) is not None})


def add_run_arguments(parser: ArgumentParser, default: str) -> None:
    """Add --name and --runs-dir; `default` tells what `run_directory` is given to name a run."""
    parser.add_argument(
        "--name",
        type=str | None,
        default=None,
        help=f"name of the run, a directory below --runs-dir; by default {default}",
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept")


def run_directory(config: Namespace, *default: str) -> Path:
    """The directory of the run that is called --name, else by the parts of `default`.

    Raises:
        UserError: A --name that is no name of a directory.
    """
    name = "-".join(default) if config.name is None else config.name
    if name in ("", "..") or Path(name).name != name:
        raise UserError(
            f"--name '{name}' is no name of a directory: give one without '/', or leave it out;"
            " --runs-dir says where it is"
        )
    return Path(config.runs_dir, name)


def add_trainer_arguments(parser: ArgumentParser) -> None:
    """Lightning's own Trainer options as --trainer.*"""
    import lightning as L

    parser.add_class_arguments(
        L.Trainer,
        "trainer",
        instantiate=False,
        skip={
            "callbacks",
            "max_epochs",
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "check_val_every_n_epoch",
            "val_check_interval",
            "default_root_dir",
            "enable_progress_bar",
        },
    )


def add_workers_argument(parser: ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers",
        type=int | None,
        default=None,
        help="processes that train and score side by side, sharing the threads (default: one per"
        " thread that torch may use, as far as the memory holds the model; one if there is a GPU)",
    )


def changed(settings: Settings, defaults: Settings) -> list[str]:
    """The names of the fields in which settings differ from others of their kind."""
    known = asdict(defaults)
    return [name for name, value in asdict(settings).items() if value != known[name]]


def check_inits(inits: Sequence[Init], subspace: SubspaceSettings) -> None:
    """UserError for a --subspace flag that none of the compared initialisations heeds."""
    idles = [idle(replace(subspace, init=init)) for init in inits if init != "lora"]
    different = changed(subspace, SubspaceSettings())
    if useless := [name for name in different if all(name in each for each in idles)]:
        raise UserError(
            f"--subspace.{useless[0]} has no effect with --inits {' '.join(inits)}: name one that"
            " it is for, choose another constraint, or leave it out"
        )


def count_workers(config: Namespace, model: ModelRef | None) -> int:
    """How many processes --workers means.

    Args:
        config: The command line.
        model: The base model, which every process loads, if there is one.
    """
    if config.workers is not None:
        if config.workers < 1:
            raise UserError(f"--workers is {config.workers}: give at least 1")
        return int(config.workers)
    import torch

    from osrm.spill import free_memory
    from trainers.backbone import load_skeleton

    if torch.cuda.is_available():
        return 1
    weights = 0
    if model is not None:
        weights = sum(4 * parameter.numel() for parameter in load_skeleton(model.path).parameters())
    # As much again for what is computed.
    fit = free_memory(torch.device("cpu")) // (2 * weights + PROCESS)
    return max(1, min(torch.get_num_threads(), fit))


class FlaggedTrainerOptions(TrainerOptions):
    """Those that --trainer.* has set: objects, such as loggers, are made of what was typed."""

    def make(self) -> dict[str, Any]:
        """Fresh arguments for one training, in any process."""
        parser = ArgumentParser()
        add_trainer_arguments(parser)
        made = parser.instantiate(parser.parse_object({"trainer": self.chosen})).trainer
        return {key: made[key] for key in self.chosen}


def trainer_options(raw: Namespace) -> FlaggedTrainerOptions:
    """What the user set of --trainer.*."""
    parser = ArgumentParser()
    add_trainer_arguments(parser)
    defaults = parser.get_defaults().trainer.as_dict()
    chosen = {k: value for k, value in raw.as_dict().items() if value != defaults[k]}
    return FlaggedTrainerOptions(chosen)


def check_file(path: Path, overwrite: bool) -> None:
    """UserError, before the work and not after it, unless a file can be written there."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: choose another file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists: choose another file or add --overwrite")
    check_parent(path)


def check_adapter_directory(path: Path, overwrite: bool) -> None:
    """UserError, before the work and not after it, unless an adapter can be written there."""
    check_adapter_output(path, overwrite)
    check_parent(path)


def check_apart(outputs: Sequence[Path], inputs: Sequence[str]) -> None:
    """UserError if an output's directory, which is replaced as a whole, holds another or an input.

    Args:
        outputs: Directories to write.
        inputs: What is read; what is no local path is a Hub id.
    """
    for output in outputs:
        for other in [*outputs, *filter(Path.exists, map(Path, inputs))]:
            if output.resolve() in other.resolve().parents:
                raise UserError(
                    f"{other} lies inside {output}, which would be replaced as a whole: choose an"
                    " output beside it"
                )


def check_parent(path: Path) -> None:
    """UserError unless the directory that is to hold `path` is there or can be made."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "is not writable" if folder.is_dir() else "is a file"
        raise UserError(f"{path} cannot be written, {folder} {what}: choose another output path")


def resolve(name: str) -> ModelRef:
    """A model as adapters record it and as it is loaded."""
    from trainers import backbone

    return backbone.ModelRef(name=assets.public_name(name), path=assets.resolve_model(name))
