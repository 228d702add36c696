"""Files with statistics of the tasks' data, by the adapter or task that each is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jsonargparse import Namespace
from torch import Tensor

from merge_algorithms import Adapter, UserError, methods
from merge_algorithms.registry import Method

if TYPE_CHECKING:
    from osrm import Covariance, Fisher, Gradients

STATISTICS = {"covariances": "covariance", "fishers": "fisher"}
"""Flag -> the kind of statistics (`Method.needs`) in the files that it takes."""

File = TypeVar("File", "Covariance", "Fisher", "Gradients")


def read_files(
    kind: type[File], sources: Sequence[str], model_of: Callable[[str], str | None]
) -> dict[str, File]:
    """Statistics files by name: the task that a file records, or NAME where it is NAME=PATH.

    Args:
        kind: What the files hold.
        sources: PATH or NAME=PATH.
        model_of: Name -> the fingerprint of the model that the statistics are used on, None where
            it is not known.

    Raises:
        UserError: A file that is not of this kind, two of one name, or one that was collected on
            another model.
    """
    what = kind.__name__.lower()
    found: dict[str, File] = {}
    for name, path in map(named, sources):
        file: File = kind.load(path)
        name = name or file.meta.get("task", Path(path).stem)
        if name in found:
            raise UserError(f"{path} is a second {what} of '{name}': pass one file for each name")
        collected, used = file.meta.get("model_fingerprint"), model_of(name)
        if collected and used and collected != used:
            raise UserError(
                f"{path} was collected on {file.meta.get('model', 'a model')} with fingerprint"
                f" {collected}, but the model of '{name}' has {used}: collect it on that model"
            )
        found[name] = file
    return found


def models_of(adapters: Sequence[Adapter]) -> Callable[[str], str | None]:
    """Adapter name -> the fingerprint of the model that it records; None if there is none."""
    return {a.name: a.info.get("model_fingerprint") for a in adapters}.get


def load_statistics(
    config: Namespace, adapters: Sequence[Adapter], method: Method
) -> dict[str, dict[str, Tensor]] | None:
    """Adapter name -> module -> tensor, from the files that flags name; None if there are none.

    Raises:
        UserError: Files that the method does not read, or that `read_files` refuses.
    """
    for flag, kind in STATISTICS.items():
        if config[flag] and kind != method.needs:
            raise UserError(
                f"method '{method.name}' reads no {kind}: leave out --{flag}, or choose a method"
                f" that does ({readers(kind) or 'none'})"
            )
    if not (config.covariances or config.fishers):
        return None
    from osrm import (  # seconds of imports that other merges need not wait for
        Covariance,
        Fisher,
        with_prefix_of,
    )

    models = models_of(adapters)
    if config.covariances:
        modules = [module for adapter in adapters for module in adapter.updates]
        files = read_files(Covariance, config.covariances, models)
        check_tuned(files, adapters)
        read = with_prefix_of(files, modules)
        return {name: file.by_module() for name, file in read.items()}
    information = read_files(Fisher, config.fishers, models)
    check_tuned(information, adapters)
    return {name: file.by_module() for name, file in information.items()}


def check_tuned(files: Mapping[str, Covariance | Fisher], adapters: Sequence[Adapter]) -> None:
    """UserError for covariances of the base model beside those of fine-tuned ones, or of others.

    The Fisher information is always of a fine-tuned model.
    """
    tuned = [name for name, file in files.items() if "tuned" in file.meta]
    untuned = [name for name in files if name not in tuned]
    if tuned and untuned:
        raise UserError(
            f"the covariance of '{tuned[0]}' was collected with its adapter in the model (--tuned),"
            f" that of '{untuned[0]}' without: collect all in one way"
        )
    merged = {adapter.name: adapter for adapter in adapters}
    for name, file in files.items():
        known = file.meta.get("tuned_fingerprint")
        if known and name in merged and merged[name].fingerprint != known:
            what = type(file).__name__.lower()
            flag = " --tuned" if name in tuned else ""
            raise UserError(
                f"the {what} of '{name}' was collected with another adapter in the model than the"
                f" one to merge: collect it with osrm {what}{flag} and that adapter"
            )


def check_untuned(covariances: Iterable[Covariance]) -> None:
    """UserError if one was collected from a model that carried an adapter."""
    for covariance in covariances:
        if "tuned" in covariance.meta:
            raise UserError(
                f"the covariance of task '{covariance.meta.get('task', '?')}' was collected with"
                " --tuned, so it is of inputs that an adapter in training does not see: pass one of"
                " the base model"
            )


def check_padded(covariances: Iterable[Covariance]) -> None:
    """UserError unless their means are over padded rows, as the released code's are."""
    for covariance in covariances:
        if covariance.meta.get("padded") != "True":
            raise UserError(
                f"the covariance of task '{covariance.meta.get('task', '?')}' has means over real"
                " tokens only: --subspace.init official needs it collected with osrm covariance"
                " --padded"
            )


def named(source: str) -> tuple[str | None, str]:
    """NAME=PATH as the two, a PATH alone as (None, PATH)."""
    name, equals, path = source.partition("=")
    return (name, path) if equals and not Path(source).exists() else (None, source)


def readers(kind: str) -> str:
    """The methods that read this kind of statistics."""
    return ", ".join(name for name, method in methods().items() if method.needs == kind)
