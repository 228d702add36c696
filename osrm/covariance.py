"""The input covariance of a model's modules on one task: all that other tasks need to know of it.

Section 3 of OSRM (arXiv 2505.22934) initialises a task's A from the inputs of the other tasks.
Their second moment C = H^T H / n is sufficient, so a task can publish its covariance file and
keep its data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_algorithms.errors import UserError, suggest
from osrm.sketch import Moments, Sketch
from osrm.statistics_file import StatisticsFile

# Version 2 has sketches and float64.
_FILE = StatisticsFile("covariance", version=2)


@dataclass(frozen=True)
class Covariance:
    """Second moments and means of what each module reads, on the CPU.

    Modules that read the same tensor (query, key and value of one block) share one key.

    Attributes:
        matrices: key -> (d, d) float32 or float64, C = H^T H / n over the n real tokens (not
            centred). Of a sketch each look makes the dense matrix anew.
        means: key -> (d,), in the same dtype, the mean over ALL positions, padding included: only
            the `official` mode reads it, because the authors' released code does that.
        modules: Name of a module inside the base model -> its key.
        counts: key -> n, the real tokens that `matrices` average over.
        positions: key -> the positions that `means` average over.
        meta: Where it comes from; "model" and "task" are compared or shown when present.

    Raises:
        UserError: the parts do not fit together, or a value is not finite.
    """

    matrices: Mapping[str, Tensor]
    means: dict[str, Tensor]
    modules: dict[str, str]
    counts: dict[str, int]
    positions: dict[str, int]
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = set(self.modules.values())
        for part in ("matrices", "means", "counts", "positions"):
            if set(getattr(self, part)) != keys:
                raise UserError(f"the covariance's {part} and modules name different keys")
        if not keys:
            raise UserError("the covariance holds no module")
        for key in keys:
            kept, mean = self._kept[key], self.means[key]
            tensor = kept.rows if isinstance(kept, Sketch) else kept
            rows = min(kept.k, len(tensor)) if isinstance(kept, Sketch) else mean.numel()
            if mean.ndim != 1 or tensor.shape != (rows, len(mean)):
                raise UserError(
                    f"the covariance of {key} has a matrix of shape {tuple(tensor.shape)} and a"
                    f" mean of shape {tuple(mean.shape)}: expected (d, d) and (d,), of a sketch"
                    " (k, d) and (d,)"
                )
            if not (_is_finite(tensor) and _is_finite(mean)):
                raise UserError(f"the covariance of {key} is not finite: collect it again")
            if self.counts[key] < 1 or self.positions[key] < 1:
                raise UserError(f"the covariance of {key} is over no token: collect it again")

    @property
    def tokens(self) -> int:
        """Real tokens that the covariance was collected from."""
        return max(self.counts.values())

    @property
    def fingerprint(self) -> str:
        """Short hash of the matrices, to record which covariance something was made with."""
        digest = hashlib.sha256()
        for key in sorted(self._kept):
            kept = self._kept[key]
            digest.update(key.encode())
            if isinstance(kept, Sketch):
                digest.update(repr((kept.trace, kept.k)).encode())
                kept = kept.rows
            digest.update(kept.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def _kept(self) -> Mapping[str, Tensor | Sketch]:
        """The second moments as they are kept."""
        return self.matrices.kept if isinstance(self.matrices, Moments) else self.matrices

    def matrix(self, module: str) -> Tensor:
        """C of what `module` reads, (d, d).

        Raises:
            UserError: the module is not in the covariance.
        """
        if module not in self.modules:
            raise UserError(
                f"{self._label()} has no module '{module}', {suggest(module, self.modules)}:"
                " collect it with that target module, on the model that the adapter is for"
            )
        return self.matrices[self.modules[module]]

    def remainder(self, key: str) -> float:
        """The energy of each direction that a sketch has left out; 0 for an exact matrix."""
        kept = self._kept[key]
        return kept.remainder if isinstance(kept, Sketch) else 0.0

    def by_module(self) -> dict[str, Tensor]:
        """Module name -> C, (d, d); modules with the same input share one tensor."""
        dense = dict(self.matrices)
        return {module: dense[key] for module, key in self.modules.items()}

    @property
    def pooled(self) -> int:
        """How many tasks' data it is of: as many it counts for among others, unless weights say."""
        return int(self.meta.get("pooled", "1"))

    def __add__(self, other: Covariance) -> Covariance:
        """The covariance of both data sets together, weighted by tokens, in the wider dtype.

        Sketches add up to a sketch with as many directions as the larger has; the trace is exact.
        Covariances that record the same task (meta["task"]), or none, count as shards of one
        task's data, others as a pool of several tasks (`pooled`).

        Raises:
            UserError: the two are of different models, modules or widths, or only one is a sketch.
        """
        return self._pool(other, 1)

    def __sub__(self, other: Covariance) -> Covariance:
        """Undo `+`: the covariance without the data of `other`.

        Raises:
            UserError: the two do not fit together, `other` has as many tokens or more, or they
                are sketches.
        """
        return self._pool(other, -1)

    def _pool(self, other: Covariance, sign: int) -> Covariance:
        check_compatible([self, other])
        counts = {key: n + sign * other.counts[key] for key, n in self.counts.items()}
        positions = {key: n + sign * other.positions[key] for key, n in self.positions.items()}
        for key in counts:
            if counts[key] < 1 or positions[key] < 1:
                raise UserError(
                    f"cannot take {other.counts[key]} tokens from the {self.counts[key]} of"
                    f" {self._label()} at {key}: subtract only what was added before"
                )

        def mix(a: Tensor, n: int, b: Tensor, m: int) -> Tensor:
            mean = (a.double() * n + b.double() * (sign * m)) / (n + sign * m)
            return mean.to(torch.promote_types(a.dtype, b.dtype))

        def pool(key: str) -> Tensor | Sketch:
            a, b, n, m = self._kept[key], other._kept[key], self.counts[key], other.counts[key]
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                return mix(a, n, b, m)
            if isinstance(a, Tensor) or isinstance(b, Tensor):
                raise UserError(
                    f"{self._label()} and {other._label()} are a sketch and an exact one at {key}:"
                    " collect both alike"
                )
            if sign < 0:
                raise UserError(
                    f"{self._label()} is a sketch at {key}, and what a sketch leaves out cannot be"
                    " subtracted: add up those that are wanted instead"
                )
            return a.pooled(n / (n + m), b)

        shared = {name: text for name, text in self.meta.items() if other.meta.get(name) == text}
        meta = shared if sign > 0 else dict(self.meta)
        pools = max(self.pooled, other.pooled) > 1
        apart = pools or self.meta.get("task") != other.meta.get("task")  # or shards of one task
        tasks = self.pooled + sign * other.pooled * apart
        meta.pop("pooled", None)
        meta |= {"pooled": str(tasks)} if tasks > 1 else {}
        return Covariance(
            Moments({key: pool(key) for key in self._kept}),
            {
                key: mix(self.means[key], self.positions[key], mean, other.positions[key])
                for key, mean in other.means.items()
            },
            dict(self.modules),
            counts,
            positions,
            meta,
        )

    def _label(self) -> str:
        return f"the covariance of task '{self.meta['task']}'" if "task" in self.meta else "it"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same covariance always gives the same bytes."""
        tensors = {f"mean/{key}": mean for key, mean in self.means.items()}
        sketches = {}
        for key, kept in self._kept.items():
            if isinstance(kept, Sketch):
                tensors[f"sketch/{key}"] = kept.rows
                sketches[key] = {"trace": kept.trace, "k": kept.k}
            else:
                tensors[f"matrix/{key}"] = kept
        header = {"modules": self.modules, "counts": self.counts, "sketches": sketches}
        header |= {"positions": self.positions, "meta": self.meta}
        _FILE.write(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Covariance:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a covariance file, truncated, or of another version.
        """
        return _FILE.read(path, cls._of_file)

    @classmethod
    def _of_file(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Covariance:
        kept: dict[str, Tensor | Sketch] = {
            k[7:]: t for k, t in tensors.items() if k.startswith("matrix/")
        }
        for key, found in header.get("sketches", {}).items():
            kept[str(key)] = Sketch(
                tensors[f"sketch/{key}"], float(found["trace"]), int(found["k"])
            )
        return cls(
            Moments(kept),
            {k[5:]: t for k, t in tensors.items() if k.startswith("mean/")},
            {str(name): str(key) for name, key in header["modules"].items()},
            {str(key): int(n) for key, n in header["counts"].items()},
            {str(key): int(n) for key, n in header["positions"].items()},
            {str(name): str(text) for name, text in header["meta"].items()},
        )


def _is_finite(tensor: Tensor) -> bool:
    """Without a mask as large as the tensor; a NaN is both the least and the greatest."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def check_compatible(covariances: list[Covariance]) -> None:
    """Raise UserError unless all are of one model: same id, modules, sharing and widths.

    Fingerprints decide where both have one: a team mate's copy may lie under another path.
    """
    first = covariances[0]
    for other in covariances[1:]:
        pair = f"{first._label()} and {other._label()}"
        names, prints = (
            (first.meta.get(key), other.meta.get(key)) for key in ("model", "model_fingerprint")
        )
        decisive = prints if all(prints) else names
        if all(decisive) and decisive[0] != decisive[1]:
            models = names if names[0] != names[1] else prints
            raise UserError(
                f"{pair} are of different models, {models[0]} and {models[1]}: collect both on"
                " the same one"
            )
        if first.modules != other.modules:
            differing = sorted(set(first.modules.items()) ^ set(other.modules.items()))
            raise UserError(
                f"{pair} are of different modules ({differing[0][0]} differs): collect both with"
                " the same target modules"
            )
        for key, mean in first.means.items():
            if mean.shape != other.means[key].shape:
                raise UserError(
                    f"{pair} have widths {len(mean)} and {len(other.means[key])} at {key}:"
                    " collect both on the same model"
                )


def others_of(covariances: Mapping[str, Covariance], task: str) -> list[str]:
    """The other tasks, sorted so that sums do not depend on the order they were given in.

    Raises:
        UserError: the task is unknown, is the only one, or the covariances do not fit together.
    """
    if task not in covariances:
        raise UserError(f"there is no covariance of task '{task}'; {suggest(task, covariances)}")
    others = sorted(set(covariances) - {task})
    if not others:
        raise UserError(
            f"'{task}' is the only task with a covariance: at least one other task is needed"
        )
    check_compatible([covariances[name] for name in [task, *others]])
    return others
