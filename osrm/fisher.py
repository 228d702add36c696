"""Diagonal Fisher information of a fine-tuned model's weights on its task (arXiv 2111.09832)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.modules import input_of
from osrm.passes import evaluating, model_batches
from osrm.statistics_file import StatisticsFile
from osrm.targets import base_model, linear_modules, resolve_targets

_FILE = StatisticsFile("fisher", version=1)

# The model's arguments -> logits (n, outputs)
Predict = Callable[[dict[str, Any]], Tensor]


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


@torch.inference_mode(False)
@torch.enable_grad()
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
    if draws is not None and draws < 1:
        raise UserError(f"draws is {draws}: draw at least 1 class per example, or sum all")
    layers = linear_modules(model)
    names = resolve_targets(model, target_modules)
    generator = torch.Generator().manual_seed(seed)
    # Module name -> its (input, output) in every call on the current batch.
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    sums: dict[str, Tensor] = {}
    examples = 0
    with evaluating(base_model(model)), ExitStack() as hooks:
        for name in names:
            hook = functools.partial(_record, calls, name)
            hooks.callback(layers[name].register_forward_hook(hook, with_kwargs=True).remove)
        for number, inputs in model_batches(model, dataloader, "Fisher information", progress):
            calls.clear()
            logits = predict(inputs) if predict else model(**inputs).logits
            _check(logits, number)
            examples += len(logits)
            outputs = [output for pairs in calls.values() for _, output in pairs]
            for direction in _directions(logits.detach(), draws, generator):
                gradients = torch.autograd.grad(
                    logits, outputs, direction, retain_graph=True, allow_unused=True
                )
                _add_squares(sums, calls, gradients, len(logits))
    for name in names:
        if name not in sums:
            raise UserError(f"{name} never ran on the data: leave it out of the target modules")
    diagonals = {name: (sums[name] / examples).cpu() for name in names}
    return Fisher(diagonals, examples, dict(meta or {}))


def _record(
    calls: dict[str, list[tuple[Tensor, Tensor]]],
    name: str,
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> Tensor:
    """Forward hook, with keywords. The model goes on with a copy, so that it may write into it."""
    if not output.requires_grad:
        output.requires_grad_()
    calls.setdefault(name, []).append((input_of(args, kwargs).detach(), output))
    return output.clone()


def _check(logits: Tensor, batch: int) -> None:
    if logits.ndim != 2:
        raise UserError(
            f"the logits of batch {batch} have shape {tuple(logits.shape)}: expected (n, outputs)"
            " of a classifier or regressor"
        )
    if not logits.isfinite().all():
        raise UserError(
            f"the logits of batch {batch} have a NaN or infinite value: check the data and the"
            " model's weights, or load the model in float32"
        )
    if not logits.requires_grad:
        raise UserError(
            "the logits do not depend on the target modules: predict has to run the model with"
            " them, and with gradients"
        )


def _directions(logits: Tensor, draws: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield l (n, outputs) such that F is the mean over examples of sum_l (d (l . logits) / dW)^2.

    The log-likelihood's gradient in the logits is e_y - p for class y. Summed over y ~ p its
    outer products give diag(p) - p p^T = L L^T, with the columns of the Cholesky factor
    l_k = sqrt(p_k p_{>k} / p_{>=k}) (e_k - p restricted to the classes after k / p_{>k}).
    """
    if logits.shape[1] == 1:
        yield torch.ones_like(logits)
        return
    p = logits.double().softmax(1)
    if draws is not None:
        for y in torch.multinomial(p.cpu(), draws, replacement=True, generator=generator).T:
            chosen = nn.functional.one_hot(y, p.shape[1]).to(p)
            yield ((chosen - p) / draws**0.5).to(logits.dtype)
        return
    rest = p.flip(1).cumsum(1).flip(1).clamp(min=torch.finfo(p.dtype).tiny)  # p_{>=k}
    for k in range(p.shape[1] - 1):
        direction = torch.zeros_like(p)
        direction[:, k] = 1
        direction[:, k + 1 :] = -p[:, k + 1 :] / rest[:, k + 1, None]
        scale = (p[:, k] * rest[:, k + 1] / rest[:, k]).sqrt()
        yield (scale[:, None] * direction).to(logits.dtype)


def _add_squares(
    sums: dict[str, Tensor],
    calls: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    gradients: Sequence[Tensor | None],
    count: int,
) -> None:
    """Add every example's squared gradient of every weight; one gradient for each output."""
    remaining = iter(gradients)
    for name, pairs in calls.items():
        found = [(x, g) for (x, _), g in zip(pairs, remaining, strict=False) if g is not None]
        parts = [(_by_example(x, count, name), _by_example(g, count, name)) for x, g in found]
        x, output = pairs[0]
        if name not in sums:
            sums[name] = x.new_zeros(output.shape[-1], x.shape[-1], dtype=torch.float32)
        for i in range(count if parts else 0):
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
