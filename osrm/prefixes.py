"""Module names inside a bare backbone, and inside a model with a task's head around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import TypeVar

from osrm.covariance import Covariance
from osrm.gradients import Gradients

File = TypeVar("File", Covariance, Gradients)
Value = TypeVar("Value")


def with_prefix_of(files: Mapping[str, File], modules: Iterable[str]) -> dict[str, File]:
    """Covariances or gradients under the names that a model or its adapters have for the modules.

    `osrm covariance` collects on the bare backbone, "encoder.layer.0..", where a classifier says
    "bert.encoder.layer.0..". Either gets the other's names; what fits by no such prefix is left as
    it is.

    Args:
        files: By task.
        modules: The model's or the adapters' module names.
    """
    names = set(modules)
    return {task: _renamed(file, names) for task, file in files.items()}


def _renamed(file: File, names: Set[str]) -> File:
    if isinstance(file, Covariance):
        return replace(file, modules=_under(file.modules, names))
    return replace(file, moments=_under(file.moments, names))


def _under(by_module: dict[str, Value], names: Set[str]) -> dict[str, Value]:
    known = by_module.keys()
    if names & known:
        return by_module
    longer, shorter = _prefixes(names, known), _prefixes(known, names)
    if len(longer) + len(shorter) != 1:
        return by_module
    (prefix,) = longer | shorter
    return {
        prefix + module if longer else module.removeprefix(prefix): value
        for module, value in by_module.items()
    }


def _prefixes(long: Set[str], short: Set[str]) -> set[str]:
    """What the long names have before short ones."""
    return {name.removesuffix(end) for name in long for end in short if name.endswith(f".{end}")}
