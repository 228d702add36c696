"""The trials of a search on disk, so that one that was stopped goes on where it was.

A search proposes the same values again when it is run again: it is its trials that take minutes,
and these are looked up here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.search import Trial, Values
from merge_algorithms import Adapter, UserError
from merge_algorithms.files import atomic_file
from merge_algorithms.formats import read_json


class TrialLog:
    """Trials by their values, in one JSON file that is complete after every trial.

    Args:
        path: The file. One of another search is replaced by the first trial of this one.
        search: What tells this search from others, see `search_key`.
    """

    def __init__(self, path: Path, search: str) -> None:
        self.path = path
        self._search = search
        content = read_json(path) if path.exists() else {}
        known = content.get("trials") if content.get("search") == search else {}
        if not (isinstance(known, dict) and all(map(_is_trial, known.values()))):
            raise UserError(f"{path} is damaged: delete it, and the search starts anew")
        self._trials: dict[str, dict[str, Any]] = known

    def __len__(self) -> int:
        """How many trials are known."""
        return len(self._trials)

    def find(self, values: Values) -> Trial | None:
        """The trial of these values, if it is known."""
        entry = self._trials.get(_key(values))
        return None if entry is None else Trial(values, entry["scores"], entry["mean"])

    def add(self, values: Values, trial: Trial) -> None:
        """Keep what came of these values."""
        if _key(values) in self._trials:
            return
        self._trials[_key(values)] = {"scores": trial.scores, "mean": trial.mean}
        with atomic_file(self.path) as file:
            content = {"search": self._search, "trials": self._trials}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _is_trial(entry: Any) -> bool:
    return isinstance(entry, dict) and {"scores", "mean"} <= entry.keys()


def search_key(
    adapters: Sequence[Adapter],
    statistics: Mapping[str, Mapping[str, Tensor]] | None,
    **settings: Any,
) -> str:
    """SHA-256 of all that a trial's scores depend on besides its values.

    Args:
        adapters: What is merged; every value counts.
        statistics: What the method reads of their data.
        settings: All else, as JSON holds it.
    """
    # What is in them keeps its order: of a scale's patterns the first that fits decides.
    known = [version("osrm-merge"), sorted(settings.items())]
    digest = hashlib.sha256(json.dumps(known).encode())
    for adapter in adapters:
        digest.update(json.dumps([adapter.name, adapter.info], sort_keys=True).encode())
        for module, update in sorted(adapter.updates.items()):
            _count(digest, f"{module}.b", update.b)
            _count(digest, f"{module}.a", update.a)
        for head, tensors in sorted(adapter.heads.items()):
            for name, tensor in sorted(tensors.items()):
                _count(digest, f"{head}.{name}", tensor)
    for task, by_module in sorted((statistics or {}).items()):
        for module, tensor in sorted(by_module.items()):
            _count(digest, f"{task}.{module}", tensor)
    return digest.hexdigest()


def _count(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)
