"""The input covariance of a model's modules on one task: all that other tasks need to know of it.

Section 3 of OSRM (arXiv 2505.22934) initialises a task's A from the inputs of the other tasks.
Their second moment C = H^T H / n is sufficient, so a task can publish its covariance file and
keep its data.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from merge_algorithms.errors import UserError, suggest
from merge_algorithms.files import atomic_file

FORMAT = "osrm-covariance"
VERSION = 1


@dataclass(frozen=True)
class Covariance:
    """Second moments and means of what each module reads, on the CPU.

    Modules that read the same tensor (query, key and value of one block) share one key.

    Attributes:
        matrices: key -> (d, d) float32, C = H^T H / n over the n real tokens (not centred).
        means: key -> (d,) float32, the mean over ALL positions, padding included: only the
            `official` mode reads it, because the authors' released code does that.
        modules: Name of a module inside the base model -> its key.
        counts: key -> n, the real tokens that `matrices` average over.
        positions: key -> the positions that `means` average over.
        meta: Where it comes from; "model" and "task" are compared or shown when present.

    Raises:
        UserError: the parts do not fit together, or a value is not finite.
    """

    matrices: dict[str, Tensor]
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
            matrix, mean = self.matrices[key], self.means[key]
            if mean.ndim != 1 or matrix.shape != (len(mean), len(mean)):
                raise UserError(
                    f"the covariance of {key} has a matrix of shape {tuple(matrix.shape)} and a"
                    f" mean of shape {tuple(mean.shape)}: expected (d, d) and (d,)"
                )
            if not (matrix.isfinite().all() and mean.isfinite().all()):
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
        for key in sorted(self.matrices):
            digest.update(key.encode())
            digest.update(self.matrices[key].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def matrix(self, module: str) -> Tensor:
        """C of what `module` reads, (d, d) float32.

        Raises:
            UserError: the module is not in the covariance.
        """
        if module not in self.modules:
            raise UserError(
                f"{self._label()} has no module '{module}', {suggest(module, self.modules)}:"
                " collect it with that target module, on the model that the adapter is for"
            )
        return self.matrices[self.modules[module]]

    def by_module(self) -> dict[str, Tensor]:
        """Module name -> C, (d, d) float32; modules with the same input share one tensor."""
        return {module: self.matrices[key] for module, key in self.modules.items()}

    def __add__(self, other: Covariance) -> Covariance:
        """The covariance of both data sets together, weighted by tokens.

        Raises:
            UserError: the two are of different models, modules or widths.
        """
        return self._pool(other, 1)

    def __sub__(self, other: Covariance) -> Covariance:
        """Undo `+`: the covariance without the data of `other`.

        Raises:
            UserError: the two do not fit together, or `other` has as many tokens or more.
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
            return ((a.double() * n + b.double() * (sign * m)) / (n + sign * m)).float()

        shared = {name: text for name, text in self.meta.items() if other.meta.get(name) == text}
        return Covariance(
            {
                key: mix(self.matrices[key], self.counts[key], c, other.counts[key])
                for key, c in other.matrices.items()
            },
            {
                key: mix(self.means[key], self.positions[key], mean, other.positions[key])
                for key, mean in other.means.items()
            },
            dict(self.modules),
            counts,
            positions,
            shared if sign > 0 else dict(self.meta),
        )

    def _label(self) -> str:
        return f"the covariance of task '{self.meta['task']}'" if "task" in self.meta else "it"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same covariance always gives the same bytes."""
        tensors = {f"matrix/{key}": c.contiguous() for key, c in self.matrices.items()}
        tensors |= {f"mean/{key}": mean.contiguous() for key, mean in self.means.items()}
        header = {"format": FORMAT, "version": VERSION, "modules": self.modules}
        header |= {"counts": self.counts, "positions": self.positions, "meta": self.meta}
        with atomic_file(path) as temporary:
            # One entry: safetensors does not keep the order of several.
            save_file(tensors, temporary, {"osrm": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Covariance:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a covariance file, truncated, or of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a file that `osrm covariance` wrote")
        try:
            with safe_open(path, framework="pt") as file:
                header = _header(path, file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}): collect or copy it again"
            ) from error
        try:
            return cls(
                {k[7:]: t for k, t in tensors.items() if k.startswith("matrix/")},
                {k[5:]: t for k, t in tensors.items() if k.startswith("mean/")},
                {str(name): str(key) for name, key in header["modules"].items()},
                {str(key): int(n) for key, n in header["counts"].items()},
                {str(key): int(n) for key, n in header["positions"].items()},
                {str(name): str(text) for name, text in header["meta"].items()},
            )
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a usable covariance file ({error}): collect it again"
            ) from error


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {}).get("osrm", "null"))
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file but not a covariance: give one that `osrm covariance`"
            " wrote"
        )
    if header.get("version") != VERSION:
        raise UserError(
            f"{path} has covariance format version {header.get('version')}, this release reads"
            f" version {VERSION}: collect it again or use the release that wrote it"
        )
    return header


def check_compatible(covariances: list[Covariance]) -> None:
    """Raise UserError unless all are of one model: same id, modules, sharing and widths."""
    first = covariances[0]
    for other in covariances[1:]:
        pair = f"{first._label()} and {other._label()}"
        models = first.meta.get("model"), other.meta.get("model")
        if all(models) and models[0] != models[1]:
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
        for key, matrix in first.matrices.items():
            if matrix.shape != other.matrices[key].shape:
                raise UserError(
                    f"{pair} have widths {len(matrix)} and {len(other.matrices[key])} at {key}:"
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


def leave_one_out(
    covariances: Mapping[str, Covariance], task: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (key, S, C_t) for every key, both (d, d) float64.

    S, the mean of C_u over u != t, is the second moment of the other tasks (section 3.2 of arXiv
    2505.22934), every task with the same weight whatever its number of tokens.

    Raises:
        UserError: as `others_of`.
    """
    others = others_of(covariances, task)
    for key, own in covariances[task].matrices.items():
        terms = (covariances[name].matrices[key].double() for name in others)
        yield key, functools.reduce(torch.add, terms) / len(others), own.double()
