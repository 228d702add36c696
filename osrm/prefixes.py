"""Module names inside a bare backbone, and inside a model with a task's head around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from osrm.covariance import Covariance


def with_prefix_of(
    covariances: Mapping[str, Covariance], modules: Iterable[str]
) -> dict[str, Covariance]:
    """The covariances under the names that a model or its adapters have for the same modules.

    `osrm covariance` collects on the bare backbone, "encoder.layer.0..", where a classifier says
    "bert.encoder.layer.0..". Either gets the other's names; what fits by no such prefix is left as
    it is.

    Args:
        covariances: By task.
        modules: The model's or the adapters' module names.
    """
    names = set(modules)
    return {task: _renamed(covariance, names) for task, covariance in covariances.items()}


def _renamed(covariance: Covariance, names: Set[str]) -> Covariance:
    known = covariance.modules.keys()
    if names & known:
        return covariance
    longer, shorter = _prefixes(names, known), _prefixes(known, names)
    if len(longer) + len(shorter) != 1:
        return covariance
    (prefix,) = longer | shorter
    return replace(
        covariance,
        modules={
            prefix + module if longer else module.removeprefix(prefix): key
            for module, key in covariance.modules.items()
        },
    )


def _prefixes(long: Set[str], short: Set[str]) -> set[str]:
    """What the long names have before short ones."""
    return {name.removesuffix(end) for name in long for end in short if name.endswith(f".{end}")}
