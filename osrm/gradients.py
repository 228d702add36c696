"""What a task reads of a module's output: the second moment of its loss's gradients there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from merge_algorithms.errors import UserError
from osrm.backward import Calls, Predict, backpropagate
from osrm.statistics_file import StatisticsFile
from osrm.targets import resolve_targets

_FILE = StatisticsFile("gradients", version=1)


@dataclass(frozen=True)
class Gradients:
    """Second moments of the gradients of modules' outputs, on the CPU.

    The other Kronecker factor beside the input covariance (K-FAC, arXiv 1503.05671): to second
    order an update dW raises a task's loss by tr(dW^T G dW C) / 2, if inputs and gradients are
    independent.

    Attributes:
        moments: Name of a module inside the base model -> G (d_out, d_out) float32, the mean over
            examples of the sum of g g^T over positions.
        examples: How many examples it is the mean over.
        meta: Where it comes from, such as "task", "adapter" and "model".

    Raises:
        UserError: no module, no example, or matrices that are not square or not finite.
    """

    moments: dict[str, Tensor]
    examples: int
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.moments or self.examples < 1:
            raise UserError("the gradients are of no module or no example: collect them again")
        for module, moment in self.moments.items():
            if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
                raise UserError(
                    f"the gradients of {module} have a moment of shape {tuple(moment.shape)}:"
                    " expected (d_out, d_out)"
                )
            if not moment.isfinite().all():
                raise UserError(f"the gradients of {module} are not finite: collect them again")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same content always gives the same bytes."""
        _FILE.write(path, self.moments, {"examples": self.examples, "meta": self.meta})

    @classmethod
    def load(cls, path: str | Path) -> Gradients:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a gradients file, truncated, or of another version.
        """
        return _FILE.read(path, cls._of_file)

    @classmethod
    def _of_file(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Gradients:
        meta = {str(name): str(text) for name, text in header["meta"].items()}
        return cls(dict(tensors), int(header["examples"]), meta)


def collect_gradients(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    target_modules: Sequence[str],
    *,
    predict: Predict | None = None,
    draws: int | None = 1,
    seed: int = 0,
    meta: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Gradients:
    """Second moments of d log p(y|x) / d output at the target modules, y drawn from p(y|x).

    Arguments and errors are those of `collect_fisher`, but `draws` is 1 where not said otherwise:
    a matrix of all examples needs no exact sum over the classes of each. With draws None it is
    that sum. Memory is one (d_out, d_out) float32 accumulator a module beside the graph of one
    batch.
    """
    sums: dict[str, Tensor] = {}

    def add(calls: Calls, count: int) -> None:
        for name, pairs in calls.items():
            for _, gradient in pairs:
                rows = gradient.reshape(-1, gradient.shape[-1]).float()
                if name not in sums:
                    sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                sums[name].addmm_(rows.T, rows)

    names = resolve_targets(model, target_modules)
    examples = backpropagate(
        model,
        dataloader,
        names,
        add,
        what="gradients",
        predict=predict,
        draws=draws,
        seed=seed,
        progress=progress,
    )
    moments = {name: (sums[name] / examples).cpu() for name in names}
    return Gradients(moments, examples, dict(meta or {}))
