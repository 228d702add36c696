"""Module names inside a bare backbone, and inside a model with a task's head around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from osrm import Covariance


def with_prefix_of(
    covariances: Mapping[str, Covariance], modules: Iterable[str]
) -> dict[str, Covariance]:
    """The covariances under the names that adapters have for the same modules.

    `osrm covariance` collects on the bare backbone, "encoder.layer.0..", where an adapter of a
    classifier says "bert.encoder.layer.0..". What fits no such prefix is left as it is.

    Args:
        covariances: By task, all of the same modules.
        modules: The adapters' module names.
    """
    known = {module for covariance in covariances.values() for module in covariance.modules}
    names = set(modules)
    if names & known:
        return dict(covariances)
    prefixes = {
        name.removesuffix(module)
        for name in names
        for module in known
        if name.endswith(f".{module}")
    }
    if len(prefixes) != 1:
        return dict(covariances)
    (prefix,) = prefixes
    return {
        task: replace(cov, modules={f"{prefix}{m}": key for m, key in cov.modules.items()})
        for task, cov in covariances.items()
    }
