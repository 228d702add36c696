"""A suite: tasks, model and settings from one YAML file, its presets and the suites it extends."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.schema import checked, read_yaml
from merge_algorithms.errors import UserError, suggest
from trainers.settings import AdapterSettings, HeadSettings, RowSettings, TrainSettings
from trainers.tasks import Task

CONFIGS = Path(__file__).parent / "configs"
ROOT = "_base"  # what a suite extends unless it says otherwise


@dataclass
class Suite:
    """Everything a benchmark needs to know before it starts.

    Attributes:
        name: Name of the suite, fit to be part of a path.
        model: Asset name, local path or Hub id of the backbone.
        tasks: The tasks by name.
        adapter: The LoRA adapter of every task.
        head: The head of every task.
        train: How every task is trained.
        rows: How many rows of every task are used at most.
        preset: Name of the preset that was applied.
        seeds: One run for each.
        coefficients: Scaling coefficients that validation chooses from.
        samples: Monte Carlo draws that a run-time merge averages.

    Raises:
        UserError: Values that cannot be, at construction.
    """

    name: str
    model: str
    tasks: dict[str, Task]
    adapter: AdapterSettings
    head: HeadSettings
    train: TrainSettings
    rows: RowSettings
    preset: str
    seeds: list[int]
    coefficients: list[float]
    samples: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise UserError(
                f"a suite cannot be called '{self.name}': use letters, digits, '.', '-' and '_'"
            )
        if not self.tasks:
            raise UserError(f"suite '{self.name}' has no tasks: name at least one")
        for key, values in (("seeds", self.seeds), ("coefficients", self.coefficients)):
            if not values or len(set(values)) != len(values) or not all(map(math.isfinite, values)):
                raise UserError(
                    f"suite '{self.name}' needs {key} that are finite and different, at least one,"
                    f" found: {values}"
                )
        if not 0 <= self.head.dropout < 1:
            raise UserError(f"head.dropout is {self.head.dropout}: use a probability below 1")
        if self.samples < 1:
            raise UserError(f"suite '{self.name}' has samples {self.samples}: at least 1 is needed")


@dataclass(frozen=True)
class EmbeddedFolder(os.PathLike[str]):
    """Folder of an asset's task, downloaded only when the path is used, not when it is named.

    Attributes:
        task: Name of the task.
        asset: Name of the asset.
    """

    task: str
    asset: str

    def __fspath__(self) -> str:
        from benchmarks.assets import pull

        return str(pull(self.asset) / self.task)


class _Settings(TypedDict, total=False):
    """What a suite and each of its presets may set."""

    adapter: AdapterSettings
    head: HeadSettings
    train: TrainSettings
    rows: RowSettings
    seeds: list[int]
    coefficients: list[float]
    samples: int


class _Location(TypedDict, total=False):
    """Where tasks without `data` of their own have it; exactly one of these."""

    asset: str
    hub: str
    dir: str


class _Tree(_Settings, total=False):
    """A suite's YAML file."""

    name: str
    description: str
    extends: str
    model: str
    data: _Location
    default_preset: str
    presets: dict[str, _Settings]
    tasks: dict[str, Task]


def load_suite(
    name_or_path: str,
    preset: str | None = None,
    data_dir: str | None = None,
    tasks: list[str] | None = None,
) -> Suite:
    """Read a suite.

    Args:
        name_or_path: Name of a suite that comes with the package, or the path of a YAML file.
        preset: Settings merged over the suite's; None takes the suite's default_preset.
        data_dir: Folder with <task>/<split>.jsonl (or csv, parquet) that replaces the source of
            every task.
        tasks: Names of the tasks wanted; None takes all.

    Raises:
        UserError: An unknown suite, preset, task or key, a value of the wrong type, or a task
            that cannot be; the message names the YAML file.
    """
    path = _find(name_or_path)
    chain = _chain(path)
    own = chain[-1]
    presets = {name for tree in chain for name in tree.get("presets", {})}
    if preset is None:
        preset = next(
            tree["default_preset"] for tree in reversed(chain) if "default_preset" in tree
        )
    if preset not in presets:
        raise UserError(f"{path} has no preset '{preset}': {suggest(preset, presets)}")
    tree: dict[str, Any] = {}
    for level in chain:  # what a file says itself beats the presets that it inherits
        tree = _merge(_merge(tree, level), level.get("presets", {}).get(preset, {}))
    try:
        return Suite(
            name=own.get("name", path.stem),
            model=tree["model"],
            tasks=_tasks(tree, data_dir, tasks),
            adapter=AdapterSettings(**tree["adapter"]),
            head=HeadSettings(**tree["head"]),
            train=TrainSettings(**tree["train"]),
            rows=RowSettings(**tree["rows"]),
            preset=preset,
            seeds=tree["seeds"],
            coefficients=tree["coefficients"],
            samples=tree["samples"],
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _tasks(
    tree: Mapping[str, Any], data_dir: str | None, wanted: list[str] | None
) -> dict[str, Task]:
    trees = tree.get("tasks", {})
    for name in wanted or ():
        if name not in trees:
            raise UserError(f"unknown task '{name}': {suggest(name, trees)}")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"data_dir {data_dir} is not a directory: it should hold <task>/<split>")
    return {
        name: _task(name, values, tree.get("data", {}), data_dir)
        for name, values in trees.items()
        if wanted is None or name in wanted
    }


def _task(
    name: str, values: Mapping[str, Any], location: Mapping[str, str], data_dir: str | None
) -> Task:
    if "text" not in values:
        raise UserError(f"task '{name}' has no text: name its text column, or the two of a pair")
    if data_dir is not None:
        data = {"dir": str(Path(data_dir) / name)}
    else:
        own = values.get("data") or {}
        data = _locate(name, own or location) if "asset" in own or not own else own
    return Task(**{**values, "name": name, "data": data})


def _locate(task: str, location: Mapping[str, str]) -> dict[str, Any]:
    if len(location) != 1:
        raise UserError(
            f"task '{task}' has no single source of data: give it data, give the suite one of"
            " asset, hub or dir, or name a folder with --data-dir"
        )
    if "hub" in location:
        return {"hub": {"path": location["hub"], "name": task}}
    if "dir" in location:
        return {"dir": str(Path(location["dir"]) / task)}
    from benchmarks.assets import task_assets

    if location["asset"] not in task_assets():
        raise UserError(
            f"unknown data asset '{location['asset']}': {suggest(location['asset'], task_assets())}"
        )
    return {"dir": EmbeddedFolder(task, location["asset"])}


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError(f"suite file {path} does not exist: give a YAML file or a suite's name")
        return path
    path = CONFIGS / f"{name_or_path}.yaml"
    if not path.is_file():
        names = [path.stem for path in CONFIGS.glob("[!_]*.yaml")]
        raise UserError(
            f"unknown suite '{name_or_path}': {suggest(name_or_path, names)}; a suite of your own"
            " is a path that ends in .yaml"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    """One YAML file, every key and type checked, its relative paths made absolute."""
    raw = read_yaml(path)
    tree: dict[str, Any] = checked(raw if raw is not None else {}, _Tree, str(path), "")
    here = path.parent.resolve()
    model = tree.get("model", "")
    is_path = re.match(r"\.{1,2}/|~/", model) or model.endswith(".gguf")
    if is_path or ("/" in model and (here / model).is_dir()):
        tree["model"] = _beside(here, model)
    tasks = tree.get("tasks", {})
    for name, values in tasks.items():
        if "name" in values:
            raise UserError(
                f"{path} has key 'tasks.{name}.name', but a task is called by its key: rename"
                f" '{name}' itself"
            )
    for values in (tree, *tasks.values()):
        data = values.get("data", {})
        if "dir" in data:
            data["dir"] = _beside(here, str(data["dir"]))
        if isinstance(data.get("files"), dict):
            data["files"] = {k: _beside(here, str(file)) for k, file in data["files"].items()}
    return tree


def _beside(folder: Path, path: str) -> str:
    return str(folder / Path(path).expanduser())


def _chain(path: Path, below: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The trees of the file and of all that it extends, the farthest first."""
    tree = _read(path)
    if path == CONFIGS / f"{ROOT}.yaml":
        return [tree]
    parent = tree.get("extends", ROOT)
    if parent.endswith((".yaml", ".yml")):
        parent = _beside(path.parent.resolve(), parent)
    try:
        parent_path = _find(parent)
    except UserError as error:
        raise UserError(f"{path} extends what cannot be found: {error}") from error
    below = (*below, path.resolve())
    if parent_path.resolve() in below:
        raise UserError(f"{path} extends {parent_path}, which extends it in turn: break the circle")
    return [*_chain(parent_path, below), tree]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; a source of data replaces the other whole."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested and key != "data" else value
    return merged
