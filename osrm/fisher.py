"""Diagonal Fisher information of a fine-tuned model's weights on its task (arXiv 2111.09832)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from osrm.backward import Calls, Predict, backpropagate
from osrm.statistics_file import StatisticsFile
from osrm.targets import resolve_targets

_FILE = StatisticsFile("fisher", version=1)


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information of modules' weights, on the CPU.

    Attributes:
        diagonals: Name of a module inside the base model -> (d_out, d_in) float32, at least 0.
        examples: How many examples it is the mean over.
        meta: Where it comes from, such as "task", "adapter" and "model".

    Raises:
        UserError: no module, no example, or values that cannot be Fisher information.
    """

    diagonals: dict[str, Tensor]
    examples: int
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.diagonals:
            raise UserError("the Fisher information holds no module")
        if self.examples < 1:
            raise UserError("the Fisher information is over no example: collect it again")
        for module, diagonal in self.diagonals.items():
            if diagonal.ndim != 2:
                raise UserError(
                    f"the Fisher information of {module} has shape {tuple(diagonal.shape)}:"
                    " expected (d_out, d_in)"
                )
            if not (diagonal.isfinite().all() and (diagonal >= 0).all()):
                raise UserError(
                    f"the Fisher information of {module} is not finite or negative: collect it"
                    " again"
                )

    def by_module(self) -> dict[str, Tensor]:
        """Module name -> (d_out, d_in) float32, what `merge(statistics=...)` takes."""
        return dict(self.diagonals)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same content always gives the same bytes."""
        _FILE.write(path, self.diagonals, {"examples": self.examples, "meta": self.meta})

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a Fisher file, truncated, or of another version.
        """
        return _FILE.read(path, cls._of_file)

    @classmethod
    def _of_file(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Fisher:
        meta = {str(name): str(text) for name, text in header["meta"].items()}
        return cls(dict(tensors), int(header["examples"]), meta)


def collect_fisher(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    target_modules: Sequence[str],
    *,
    predict: Predict | None = None,
    draws: int | None = None,
    seed: int = 0,
    meta: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Fisher:
    """Mean over examples x of sum_y p(y|x) (d log p(y|x) / dW)^2 for the target modules' weights.

    Section 3 of arXiv 2111.09832, exactly: gradients of single examples are squared. (The square
    of a batch's summed gradient, which some published codes take, is something else.) W is the
    weight that the module computes with, an active LoRA adapter included. One output is taken as
    a regression with a Gaussian of variance 1 around it, in the unit of the output.

    With K classes the sum over y takes K - 1 backward passes a batch, not K: the logits'
    Fisher matrix diag(p) - p p^T = L L^T has rank K - 1, and sum_k (d (l_k . logits) / dW)^2 over
    the columns of L is the same sum. The labels of the data are not read. Of a linear module with
    inputs H and output gradients G, (tokens, d), an example's gradient is G^T H; memory is one
    (d_out, d_in) float32 accumulator a module beside the graph of one batch.

    Args:
        model: The fine-tuned model or its backbone: with the adapter merged in, or wrapped by
            PEFT with the adapter active. Its parameters may be frozen. It runs on the device it
            is on, in evaluation mode, and is afterwards as before.
        dataloader: Batches: mappings of the model's arguments; "labels" is left out.
        target_modules: As in PEFT: full names or last parts of names of linear layers.
        predict: Batch -> logits (n, outputs), by running `model`; default: what the model's
            output calls `logits`.
        draws: Draw as many y per example from p(y|x), for many classes, in place of the sum.
        seed: Of the drawn classes.
        meta: Kept with the result.
        progress: Show a progress bar.

    Raises:
        UserError: a target matches nothing or never runs, logits that are not finite or not
            (n, outputs), a module that mixes the examples of a batch, draws below 1, no data.
    """
    names = resolve_targets(model, target_modules)
    sums: dict[str, Tensor] = {}
    examples = backpropagate(
        model,
        dataloader,
        names,
        functools.partial(_add_squares, sums),
        what="Fisher information",
        predict=predict,
        draws=draws,
        seed=seed,
        progress=progress,
    )
    diagonals = {name: (sums[name] / examples).cpu() for name in names}
    return Fisher(diagonals, examples, dict(meta or {}))


def _add_squares(sums: dict[str, Tensor], calls: Calls, count: int) -> None:
    """Add every example's squared gradient of every weight."""
    for name, pairs in calls.items():
        parts = [(_by_example(x, count, name), _by_example(g, count, name)) for x, g in pairs]
        x, g = pairs[0]
        if name not in sums:
            sums[name] = x.new_zeros(g.shape[-1], x.shape[-1], dtype=torch.float32)
        for i in range(count):
            gradient = functools.reduce(torch.add, (g[i].T @ x[i] for x, g in parts))
            sums[name].addcmul_(gradient, gradient)


def _by_example(x: Tensor, count: int, module: str) -> Tensor:
    """(examples, positions, d) float32."""
    if count > 1 and len(x) != count:
        raise UserError(
            f"{module} reads or writes a tensor of shape {tuple(x.shape)} in a batch of {count}"
            " rows: cannot tell which row is whose, so batch single rows or leave the module out"
        )
    return x.reshape(count, -1, x.shape[-1]).float()
